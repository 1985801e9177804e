"""The one command for a GPU machine runs complete on the emulated accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.check import TIMED


def run_script(repo: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(repo / "benchmarks/gpu/run.sh"), "--out", str(out), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "2"},
        cwd=out,
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(300)
def test_gpu_script_runs_complete_on_the_emulated_accelerator(repo: Path, tmp_path: Path) -> None:
    ran = run_script(repo, tmp_path, "--device", "emulated", "--small")
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert parts.pop("suite")["passed"] is None and len(parts) == 5
    for name, part in parts.items():
        measured = name in TIMED and part["figures"]  # what a busy machine may fall short of
        assert part["passed"] or measured, ran.stdout + ran.stderr
    passed = all(part["passed"] for part in parts.values())
    assert ("all parts passed" in (tmp_path / "summary.md").read_text()) == passed
    assert ran.returncode == (0 if passed else 1)


def test_gpu_script_tells_a_failing_part_from_the_others(repo: Path, tmp_path: Path) -> None:
    ran = run_script(repo, tmp_path, "--device", "cuda:99", "--only", "link_bound")
    assert ran.returncode == 1
    assert "failed: link_bound" in ran.stdout
    assert "--device cuda:99" in ran.stdout
