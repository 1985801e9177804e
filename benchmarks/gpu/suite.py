"""The tests marked `gpu`, where there is a CUDA device."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.gpu.part import Bench, Finding
from benchmarks.trial import REPO

_PYTEST = (
    "-m pytest -o addopts= --import-mode=importlib -p no:cacheprovider -m gpu -q -rfE tests/gpu"
)


def check(bench: Bench) -> Finding:
    """Run tests/gpu; none of pytest's optional plugins is needed."""
    if bench.is_emulated:
        return Finding(passed=None, summary="needs a CUDA device")
    ran = subprocess.run(
        [sys.executable, *_PYTEST.split()],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    print(ran.stdout, ran.stderr, sep="\n")
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    return Finding(
        passed=ran.returncode == 0,
        summary=lines[-1].strip("= ") if lines else f"pytest ended with {ran.returncode}",
        details=[line for line in lines if line.startswith(("FAILED", "ERROR"))],
    )
