"""The peers' benchmark without the peers: the checkpoint it writes, flexpipe's runner, its sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.bounds import Bounds, flops_by_matrix, read_model_config
from benchmarks.peers.checkpoint import SHAPES, write_checkpoint
from benchmarks.peers.workload import Clock, Workload, make_prompts
from flexpipe.memory.checkpoint import open_directory

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("peers") / "tiny", SHAPES["tiny"])


def test_checkpoint_has_every_tensor_the_model_needs(tiny: Path) -> None:
    checkpoint = open_directory(tiny)
    for name, shape in SHAPES["tiny"].tensors():
        assert checkpoint.require(name, shape).dtype == "bfloat16"


def test_flexpipe_runner_generates_every_token(tiny: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny), "--batch", "3", "--workload", "8/5", "--threads", "1"]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.peers.runner_flexpipe",
            *words,
            "--options=--device cpu",
        ],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["generated_tokens"] == 15
    assert result["tokens_per_s"] == pytest.approx(15 / result["seconds"])


def test_prompts_are_the_same_for_every_peer() -> None:
    assert make_prompts(4, 6, 512)[:2] == make_prompts(2, 6, 512)


def test_clock_stops_at_the_last_token_or_when_the_budget_is_spent() -> None:
    whole = Clock(3, None)
    assert [whole.token() for _ in range(3)] == [False, False, True]
    spent = Clock(100, 0.0)
    assert [spent.token() for _ in range(5)] == [False, False, False, False, True]
    assert spent.timed().missing_steps == 95


def test_disk_bound_grows_with_the_block_and_ends_where_the_weights_fit(tiny: Path) -> None:
    config, workload = read_model_config(tiny), Workload(8, 4)
    rates = dict.fromkeys(flops_by_matrix(config, workload), 1e9)
    gemm = {"float32": rates, "bfloat16": rates}
    bounds = Bounds(
        gemm=gemm, gemm_beside_disk=gemm, disk_bytes_per_s=1e6,
        disk_beside_gemm_bytes_per_s=1e6, all_rows={},
    )  # fmt: skip
    one, two = (
        bounds.disk_tokens_per_s(config, workload, block=block, cap_bytes=1000) for block in (1, 2)
    )
    assert two == pytest.approx(2 * one)
    assert bounds.disk_tokens_per_s(config, workload, block=1, cap_bytes=10**9) == float("inf")
