"""The one command for a GPU machine runs complete on the emulated accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_script(repo: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(repo / "benchmarks/gpu/run.sh"), "--out", str(out), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "2"},
        cwd=out,
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(300)
def test_gpu_script_passes_on_the_emulated_accelerator(repo: Path, tmp_path: Path) -> None:
    ran = run_script(repo, tmp_path, "--device", "emulated", "--small")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "all parts passed" in (tmp_path / "summary.md").read_text()
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    passed = {name: part["passed"] for name, part in parts.items()}
    assert passed.pop("suite") is None
    assert len(passed) == 5 and all(passed.values()), passed


def test_gpu_script_tells_a_failing_part_from_the_others(repo: Path, tmp_path: Path) -> None:
    ran = run_script(repo, tmp_path, "--device", "cuda:99", "--only", "link_bound")
    assert ran.returncode == 1
    assert "failed: link_bound" in ran.stdout
    assert "--device cuda:99" in ran.stdout
