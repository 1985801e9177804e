"""Whatever befalls a rank, whenever: all ranks end and tell it, and the job goes on later."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flexpipe.job.follow import follow_job
from flexpipe.job.probes import Probes
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.hardware import Emulation
from flexpipe.runtime.gang import joined
from flexpipe.runtime.network import Network
from flexpipe.runtime.ranks import Ranks
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.op import Kind, Op
from tests.hf import CheckpointFactory, ragged_prompts
from tests.runtime.gangs import Gang, run_gang
from tests.runtime.jobs import EVERYWHERE

STAGES = 2
LIMIT_S, WITHIN_S = 2.0, 5.0
PROMPTS = ragged_prompts([5, 9, 40, 70, 12, 40, 8, 20, 33])
LENGTHS = (3, 12, 4, 6, 3, 5, 4, 3, 6)
GIVEN: Mapping[str, Any] = {**EVERYWHERE, "micro_batch_size": 1}
PHASES = ("load", "prefill", "decode", "drain")
FAULTS = ("killed", "frozen", "raised", "full")


class Fault(NamedTuple):
    """What happens to which rank, and when."""

    how: str
    phase: str
    rank: int


ALL = [Fault(how, phase, rank) for how in FAULTS for phase in PHASES for rank in range(STAGES)]
SAMPLE = random.Random(6).sample(ALL, 2)
CASES = [fault if fault in SAMPLE else pytest.param(fault, marks=pytest.mark.slow) for fault in ALL]


@pytest.fixture
def spec(hf_checkpoint: CheckpointFactory, tmp_path: Path) -> JobSpec:
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
            line = {"prompt_token_ids": prompt, "max_tokens": length}
            file.write(json.dumps(line) + "\n")
    return JobSpec(
        model=str(hf_checkpoint("llama2")),
        input_path=tmp_path / "prompts.jsonl",
        output_path=tmp_path / "results.jsonl",
        device="emulated",
        emulation=Emulation(h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12),
        given=GIVEN,
        ignore_eos=True,
        offload_dir=tmp_path / "offload",
        progress=False,
        arrangement=Arrangement(num_stages=STAGES, partition="even"),
        network=Network(heartbeat_limit_s=LIMIT_S),
    )


@pytest.mark.parametrize("fault", CASES, ids=lambda fault: "-".join(map(str, fault)))
def test_a_fault_on_any_rank_ends_all_and_the_job_goes_on_later(
    spec: JobSpec, tmp_path: Path, fault: Fault
) -> None:
    hit = tmp_path / "hit"
    with Gang(tmp_path, take_part, spec, fault, hit, stages=STAGES) as gang:
        ended = gang.ended(within_s=60)
        gone_s = time.time()
    assert hit.is_file(), "the fault was never reached"
    limit_s = WITHIN_S + (LIMIT_S if fault.how == "frozen" else 0.0)
    assert gone_s - hit.stat().st_mtime < limit_s
    assert all(rank.code for rank in ended)
    for rank, end in enumerate(ended):
        if rank == fault.rank and fault.how in ("killed", "frozen"):
            assert end.code == -signal.SIGKILL
        else:
            assert end.last_line.startswith(f"flexpipe: error: stage {fault.rank} (rank"), end
            assert REASONS[fault.how] in end.last_line
    with OffloadDirectory(tmp_path / "offload") as offload:
        assert list(offload.job.parent.iterdir()) == [offload.job]

    again = run_gang(tmp_path, take_part, spec, None, hit, stages=STAGES)
    assert [rank.code for rank in again] == [0] * STAGES, again
    assert answers(spec.output_path) == reference(spec, tmp_path)


REASONS = {
    "killed": "ended without a word, as if killed",
    "frozen": "gave no sign of life for 2 s",
    "raised": "the magic smoke came out",
    "full": " is full: ",
}


def take_part(ranks: Ranks, spec: JobSpec, fault: Fault | None, hit: Path) -> None:
    """One rank's part of the job, which the fault strikes."""
    probes = Probes()
    if fault is not None and fault.rank == ranks.rank:
        probes = Probes(before_op=arm(fault, hit))
    with joined(ranks, spec.network) as gang:
        if ranks.rank:
            follow_job(spec, gang, probes)
        else:
            run_job(spec, probes, gang)


def arm(fault: Fault, hit: Path) -> Callable[[Op], None]:
    """Have the fault strike; returns the hook for ops."""
    strike = partial(STRIKES[fault.how], hit)
    if fault.phase == "load" and fault.how == "full":
        os.posix_fallocate = partial(no_space, hit)  # type: ignore[assignment]
    elif fault.phase == "load":
        load = Stage.load

        def struck(stage: Stage, *arguments: Any) -> None:
            strike()
            load(stage, *arguments)

        Stage.load = struck  # type: ignore[method-assign,assignment]

    def before_op(op: Op) -> None:
        if not hit.exists() and op.kind == Kind.COMPUTE and phase_of(op) == fault.phase:
            strike()

    return before_op


def phase_of(op: Op) -> str:
    assert op.batch is not None
    if op.step < 2:
        return "prefill"
    return "drain" if op.step > 8 else "decode"


def no_space(hit: Path, *arguments: Any) -> int:
    hit.touch()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill(hit: Path) -> None:
    hit.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(hit: Path) -> None:
    hit.touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(hit: Path) -> None:
    hit.touch()
    raise RuntimeError("the magic smoke came out")


def fill_disk(hit: Path) -> None:
    """From now on no write finds room."""
    os.pwritev = partial(no_space, hit)  # type: ignore[assignment]


STRIKES: Mapping[str, Callable[[Path], None]] = {
    "killed": kill,
    "frozen": freeze,
    "raised": fail,
    "full": fill_disk,
}


def reference(spec: JobSpec, folder: Path) -> dict[Any, list[int]]:
    """What one process answers."""
    alone = replace(spec, output_path=folder / "alone.jsonl", arrangement=Arrangement())
    run_job(alone)
    return answers(alone.output_path)


def answers(path: Path) -> dict[Any, list[int]]:
    """Tokens by id; every id has one record."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    tokens = {record["id"]: record["token_ids"] for record in records}
    assert len(tokens) == len(records) == len(PROMPTS)
    return tokens
