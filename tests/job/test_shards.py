"""A job whose stages have several ranks, as processes: the tokens of one, whatever rests where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexpipe.job.follow import follow_job
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.memory.form import FOLDER
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.policy import percent_shares
from flexpipe.runtime.gang import joined
from flexpipe.runtime.network import Network
from flexpipe.runtime.ranks import Ranks
from tests.hf import CheckpointFactory, ragged_prompts
from tests.runtime.gangs import run_gang
from tests.runtime.jobs import EVERYWHERE, FAST

PROMPTS = ragged_prompts([5, 40, 9, 70, 12])
LENGTHS = (4, 6, 3, 5, 4)
CASES: Mapping[str, tuple[Arrangement, Mapping[str, Any]]] = {
    "two shards": (Arrangement(num_shards=2), {**EVERYWHERE, "micro_batch_size": 2}),
    "two stages of two shards": (
        Arrangement(num_stages=2, num_shards=2, partition="even"),
        {**EVERYWHERE, "micro_batch_size": 1},
    ),
    "four shards": (Arrangement(num_shards=4), percent_shares([0, 0, 0, 100, 0, 100])),
}
SAMPLED = [
    "two shards",
    *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "two shards"),
]


@pytest.fixture
def spec(hf_checkpoint: CheckpointFactory, tmp_path: Path) -> JobSpec:
    lines = [
        json.dumps({"prompt_token_ids": prompt, "max_tokens": length})
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return JobSpec(
        model=str(hf_checkpoint("llama-eight")),
        input_path=tmp_path / "prompts.jsonl",
        output_path=tmp_path / "results.jsonl",
        device="emulated",
        emulation=FAST,
        ignore_eos=True,
        offload_dir=tmp_path / "offload",
        progress=False,
    )


@pytest.mark.parametrize("case", SAMPLED)
def test_ranks_that_share_every_layer_give_the_tokens_of_one(
    spec: JobSpec, tmp_path: Path, case: str
) -> None:
    arrangement, given = CASES[case]
    run_job(replace(spec, given=given))
    alone = answers(spec)
    spec.output_path.unlink()

    shared = replace(spec, given=given, arrangement=arrangement, network=Network())
    how = {"stages": arrangement.num_stages, "num_shards": arrangement.num_shards}
    ended = run_gang(tmp_path, take_part, shared, **how)
    assert [(rank.code, rank.stderr) for rank in ended if rank.code] == []
    assert answers(spec) == alone
    on_disk = list((tmp_path / "offload" / "cache" / FOLDER).glob("*[!k]"))
    assert on_disk, "no tensor on disk was repacked"


def take_part(ranks: Ranks, spec: JobSpec) -> None:
    with joined(ranks, spec.network) as gang:
        if ranks.rank:
            follow_job(spec, gang)
        else:
            run_job(spec, gang=gang)


def answers(spec: JobSpec) -> Mapping[int, Any]:
    lines = [json.loads(line) for line in spec.output_path.read_text().splitlines()]
    return {line["id"]: line["token_ids"] for line in lines}
