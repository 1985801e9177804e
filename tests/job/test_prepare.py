"""What a job chooses before it plans."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.profile import read_profile, render_profile


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
    rates = {"float32": 1e11, "bfloat16": 2e11 if faster else 5e10}
    matmul = {dtype: Surface.of({1.0: Curve.flat(rate)}) for dtype, rate in rates.items()}
    known = read_profile(Path(os.environ["FLEXPIPE_PROFILE"]))
    changed = replace(known, compute=replace(known.compute, matmul=matmul))
    (tmp_path / "profile.yaml").write_text(render_profile(changed))
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(tmp_path / "profile.yaml"))
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
