"""What becomes of a machine without a compiler for kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from flexpipe.kernels import team

WITHOUT = """
import sys
sys.modules["llvmlite"] = None
import torch
from flexpipe.kernels import attend, codec, team
from flexpipe.plan.codec import Codec

assert not team.available()
assert not attend.runs_here(torch.device("cpu"))
x, kind = torch.randn(3, 70), Codec(bits=8)
rows, back = torch.empty(3, kind.row_bytes(70), dtype=torch.uint8), torch.empty(3, 70)
codec.compress(x, kind, rows)
codec.widen(rows, kind, back)
assert (x - back).abs().max() < 0.05
"""


def test_kernels_run_wherever_their_compiler_is_installed() -> None:
    """Or the tests of kernels would be left out without a word."""
    assert team.available() == (importlib.util.find_spec("llvmlite") is not None)


def test_without_llvmlite_torch_serves() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
