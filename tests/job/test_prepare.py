"""What a job chooses before it plans."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flexpipe.job import prepare
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.model.matmul import multiplies_bfloat16_faster


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_a_cpu_computes_in_bfloat16_only_where_it_is_stored_and_faster(
    hf_checkpoint: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    stored: str,
    faster: bool,
) -> None:
    monkeypatch.setattr(prepare, "multiplies_bfloat16_faster", lambda: faster)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt_token_ids": [5, 6]}) + "\n")
    spec = JobSpec(
        model=str(hf_checkpoint("llama3", dtype=stored)),
        input_path=tmp_path / "in.jsonl",
        output_path=tmp_path / "out.jsonl",
        max_tokens=2,
        device="cpu",
        given={} if asked == "auto" else {"compute_dtype": asked},
        offload_dir=tmp_path / "offload",
        progress=False,
    )
    expected = asked
    if asked == "auto":
        expected = "bfloat16" if stored == "bfloat16" and faster else "float32"
    report = run_job(spec)
    assert (report.compute_dtype, report.num_finished) == (expected, 1)


def test_the_trial_leaves_no_thread_behind() -> None:
    num_threads = torch.get_num_threads()
    before = set(threading.enumerate())
    multiplies_bfloat16_faster.cache_clear()
    first = multiplies_bfloat16_faster()
    assert multiplies_bfloat16_faster.cache_info().misses == 1
    assert multiplies_bfloat16_faster() is first
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() == num_threads
