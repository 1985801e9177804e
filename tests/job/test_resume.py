"""Whatever ends a run, the same command goes on: every id once, equal to an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexpipe.errors import InputError, RunError
from flexpipe.job.journal import SystemCalls, path_for
from flexpipe.job.probes import Probes
from flexpipe.job.report import Report
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.schedule.op import Kind, Op
from tests.hf import ragged_prompts

MAX_NEW = 24
LENGTHS = (3, 40, 17, 8, 120, 25, 5, 60, 33, 2)


def write_input(path: Path, lengths: Sequence[int] = LENGTHS, **own: Any) -> None:
    """Prompts with a bad line among them; every third line samples."""
    lines = []
    for index, prompt in enumerate(ragged_prompts(lengths)):
        line: dict[str, Any] = {"id": f"r{index}", "prompt_token_ids": prompt, **own}
        if index % 3 == 1:
            line |= {"temperature": 0.8, "top_k": 20, "seed": 5}
        lines.append(json.dumps(line))
    lines.insert(4, '{"prompt": 3}')
    path.write_text("\n".join(lines) + "\n")


def job(model: Path, folder: Path, **changes: Any) -> JobSpec:
    return JobSpec(
        **{
            "model": str(model),
            "input_path": folder / "in.jsonl",
            "output_path": folder / "out.jsonl",
            "max_tokens": MAX_NEW,
            "device": "cpu",
            "given": {"micro_batch_size": 3, "num_micro_batches": 2},
            "offload_dir": folder / "offload",
            "progress": False,
            "ignore_eos": True,
            **changes,
        }
    )


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "out.jsonl").read_text().splitlines()
    made = [json.loads(line) for line in lines]
    keyed = {str(record.get("line", record["id"])): record for record in made}
    assert len(keyed) == len(made), "a record appears twice"
    return keyed


@pytest.fixture(scope="module")
def model(hf_checkpoint: Callable[..., Path]) -> Path:
    return hf_checkpoint("llama3")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The records of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    write_input(folder / "in.jsonl")
    run_job(job(model, folder))
    return records(folder)


def forked(spec: JobSpec, probes: Probes, *, kill_after_s: float | None = None) -> int:
    """Run the job in a child; its exit status, or -9 when it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_job(spec, probes)
            status = 0
        finally:
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(at: int, kinds: frozenset[Kind]) -> Probes:
    """Kills the process before the `at`-th op of these kinds."""
    seen = 0

    def before_op(op: Op) -> None:
        nonlocal seen
        if op.kind in kinds:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    return Probes(before_op=before_op)


def killing_write(at: int, share: float) -> Probes:
    """Kills the process in the journal's `at`-th write, after a share of its bytes."""
    count = 0

    def write(fd: int, data: Any) -> int:
        nonlocal count
        count += 1
        if count == at:
            os.write(fd, data[: int(len(data) * share)])
            os.kill(os.getpid(), signal.SIGKILL)
        return os.write(fd, data)

    return Probes(journal_calls=SystemCalls(write=write))


def check_resumed(
    model: Path, folder: Path, whole: Mapping[str, Mapping[str, Any]], probes: Probes
) -> None:
    write_input(folder / "in.jsonl")
    assert forked(job(model, folder), probes) == -9
    report = run_job(job(model, folder))
    assert records(folder) == whole
    assert report.num_requests == len(whole) and report.num_failed == 1
    assert list((folder / "offload" / "jobs").iterdir()) == []


POINTS = [
    *((f"commit {at}", killing(at, frozenset([Kind.COMMIT]))) for at in (1, 2, 9, 25, 40)),
    *((f"compute {at}", killing(at, frozenset([Kind.COMPUTE]))) for at in (1, 30, 133)),
    *(
        (f"write {at} after {share}", killing_write(at, share))
        for at in (1, 2, 3, 4)
        for share in (0, 0.4, 1)
    ),
]


@pytest.fixture
def eager_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that writes at every step and rotates often."""
    monkeypatch.setattr("flexpipe.job.journal.INTERVAL_S", 0.0)
    monkeypatch.setattr("flexpipe.job.journal.ROTATE_BYTES", 400)


@pytest.mark.usefixtures("eager_journal")
@pytest.mark.parametrize("point", random.Random(1).sample(range(len(POINTS)), 5))
def test_a_killed_job_goes_on(
    model: Path, tmp_path: Path, whole: dict[str, Any], point: int
) -> None:
    check_resumed(model, tmp_path, whole, POINTS[point][1])


@pytest.mark.slow
@pytest.mark.usefixtures("eager_journal")
@pytest.mark.parametrize("point", range(len(POINTS)), ids=[name for name, _ in POINTS])
def test_a_job_killed_anywhere_goes_on(
    model: Path, tmp_path: Path, whole: dict[str, Any], point: int
) -> None:
    check_resumed(model, tmp_path, whole, POINTS[point][1])


@pytest.mark.slow
@pytest.mark.usefixtures("eager_journal")
@pytest.mark.parametrize("after_ms", range(20, 620, 20))
def test_a_job_killed_at_any_time_goes_on(
    model: Path, tmp_path: Path, whole: dict[str, Any], after_ms: int
) -> None:
    write_input(tmp_path / "in.jsonl")
    slow = Probes(before_op=lambda op: time.sleep(0.001) if op.kind == Kind.COMMIT else None)
    forked(job(model, tmp_path), slow, kill_after_s=after_ms / 1000)
    run_job(job(model, tmp_path))
    assert records(tmp_path) == whole


def interrupted(model: Path, folder: Path, **changes: Any) -> None:
    """A run that ends at its 20th commit, as Ctrl-C or a fault would end it."""
    seen = 0

    def fail(op: Op) -> None:
        nonlocal seen
        seen += op.kind == Kind.COMMIT
        if seen == 20:
            raise RunError("enough")

    with pytest.raises(RunError, match="enough"):
        run_job(job(model, folder, **changes), Probes(before_op=fail))


def test_unfinished_rows_are_prefilled_and_not_computed_again(
    model: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    write_input(tmp_path / "in.jsonl")
    interrupted(model, tmp_path)
    report = run_job(job(model, tmp_path))
    assert records(tmp_path) == whole
    assert report.num_earlier > 0
    earlier = sum(len(r.get("token_ids", ())) for r in whole.values()) - report.generated_tokens
    assert earlier >= 20


def test_another_placement_and_batch_shape_may_go_on(
    model: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    write_input(tmp_path / "in.jsonl")
    interrupted(model, tmp_path)
    run_job(job(model, tmp_path, given={"micro_batch_size": 7, "max_batch_tokens": 50}))
    assert records(tmp_path) == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": 9}, "max_tokens"),
        ({"temperature": 0.5}, "temperature"),
        ({"given": {"compute_dtype": "bfloat16"}}, "compute dtype"),
        ({"given": {"compress_cache": "4"}}, "compressed KV cache was absent, is 4 bits in"),
    ],
)
def test_what_changes_tokens_is_refused_by_name_and_overwrite_starts_again(
    model: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    write_input(tmp_path / "in.jsonl")
    run_job(job(model, tmp_path))
    with pytest.raises(InputError, match=named):
        run_job(job(model, tmp_path, **changes))
    report: Report = run_job(job(model, tmp_path, overwrite=True, **changes))
    assert report.num_earlier == 0 and len(records(tmp_path)) == len(LENGTHS) + 1


def test_a_finished_job_is_done_and_appended_lines_are_new_work(
    model: Path, tmp_path: Path
) -> None:
    write_input(tmp_path / "in.jsonl", LENGTHS[:6])
    run_job(job(model, tmp_path))
    before = records(tmp_path)
    again = run_job(job(model, tmp_path))
    assert records(tmp_path) == before and again.num_earlier == len(before)
    write_input(tmp_path / "in.jsonl", LENGTHS)
    more = run_job(job(model, tmp_path))
    assert more.num_earlier == len(before)
    after = records(tmp_path)
    assert len(after) == len(LENGTHS) + 1 and {key: after[key] for key in before} == before


def test_a_changed_input_is_refused(model: Path, tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl")
    run_job(job(model, tmp_path))
    write_input(tmp_path / "in.jsonl", (4, *LENGTHS[1:]))
    with pytest.raises(InputError, match="input"):
        run_job(job(model, tmp_path))


def test_results_without_a_journal_are_kept_and_refused(model: Path, tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl")
    run_job(job(model, tmp_path))
    path_for(tmp_path / "out.jsonl").unlink()
    before = records(tmp_path)
    with pytest.raises(InputError, match="not empty"):
        run_job(job(model, tmp_path))
    assert records(tmp_path) == before


def test_samples_are_the_same_in_any_order_batch_and_placement(
    model: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    write_input(tmp_path / "in.jsonl")
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    lines = [line for line in lines if "prompt_token_ids" in line]
    random.Random(4).shuffle(lines)
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    run_job(job(model, tmp_path, given={"micro_batch_size": 1, "max_batch_tokens": 16}))
    shuffled = records(tmp_path)
    assert shuffled == {key: record for key, record in whole.items() if "line" not in record}
