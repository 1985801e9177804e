"""A long input costs a line's few numbers, not its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec

BYTES_PER_LINE = 1000  # an entry, its id and what remembers it: some 400 were seen


def peak_bytes(model: Path, folder: Path, num_lines: int) -> int:
    """What the run took on the cpu tier beyond its plan's slack; every line is answered."""
    with (folder / "in.jsonl").open("w") as file:
        for index in range(num_lines):
            file.write(json.dumps({"id": f"r{index}", "prompt_token_ids": [5 + index % 90, 7]}))
            file.write("\n")
    spec = JobSpec(
        model=str(model),
        input_path=folder / "in.jsonl",
        output_path=folder / "out.jsonl",
        max_tokens=1,
        device="cpu",
        given={"micro_batch_size": 256, "num_micro_batches": 1},
        offload_dir=folder / "offload",
        overwrite=True,
        progress=False,
    )
    report = run_job(spec)
    assert report.num_finished == num_lines
    return next(use.measured_bytes for use in report.tiers if use.tier == "cpu")


@pytest.mark.parametrize("num_lines", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_text(
    hf_checkpoint: Callable[..., Path], tmp_path: Path, num_lines: int
) -> None:
    model = hf_checkpoint("llama3")
    few = peak_bytes(model, tmp_path, 500)
    many = peak_bytes(model, tmp_path, num_lines)
    assert many - few < BYTES_PER_LINE * num_lines
