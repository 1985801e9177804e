"""The claims that the emulated accelerator stands for, on real streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trial import Trial, llama_shape, run_trial, uniform_prompts
from flexpipe.kernels.codec import compress, widen
from flexpipe.plan.codec import Codec
from flexpipe.plan.policy import STRATEGIES, Shares, percent_shares
from flexpipe.plan.tier import Tier
from tests.hf import check_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (1, 5, 9, 30, 33, 70, 64, 17, 120)
MAX_NEW = 8
PLACEMENTS = {
    "gpu": (100, 0, 100, 0, 100, 0),
    "cpu": (0, 100, 0, 100, 0, 100),
    "disk": (0, 0, 0, 0, 0, 0),
    "mixed": (20, 40, 34, 33, 34, 33),
    "attention on the CPU": (20, 40, 34, 33, 34, 33),
}


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["opt", "llama3"])
def test_every_strategy_and_placement_emits_the_reference_tokens(
    family: str,
    strategy: str,
    placement: str,
    hf_checkpoint: Callable[..., Path],
    hf_reference: Callable[..., Any],
    tmp_path: Path,
) -> None:
    reference = hf_reference(family, lengths=LENGTHS, max_new=MAX_NEW)
    trial = run_trial(
        tmp_path,
        model=hf_checkpoint(family),
        load_format="auto",
        prompts=reference.prompts,
        max_tokens=MAX_NEW,
        device="cuda",
        given={
            **percent_shares(PLACEMENTS[placement]),
            "micro_batch_size": 3,
            "num_micro_batches": 3,
            "strategy": strategy,
            "compute_dtype": "float32",
            "cpu_attention": placement == "attention on the CPU",
        },
    )
    assert not trial.errors
    for index in range(len(LENGTHS)):
        tokens = trial.tokens[str(index)]
        assert len(tokens) == MAX_NEW or tokens[-1] == 2
        check_tokens(reference, index, tokens)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widening_there_gives_the_bits_it_gives_here(bits: int, dtype: torch.dtype) -> None:
    kind = Codec(bits=bits)
    rows = torch.empty(37, kind.row_bytes(200), dtype=torch.uint8)
    compress(torch.randn(37, 200, generator=torch.Generator().manual_seed(0)), kind, rows)
    here, there = torch.empty(37, 200, dtype=dtype), torch.empty(37, 200, dtype=dtype).cuda()
    widen(rows, kind, here)
    widen(rows.cuda(), kind, there)
    assert torch.equal(there.cpu(), here)


def streamed(tmp_path: Path, **given: Any) -> Trial:
    """A model of 100 MB layers, all weights and KV cache on the host."""
    model = llama_shape(tmp_path / "m", layers=8, hidden=2048, ffn=8192, heads=16, vocab=1024)
    return run_trial(
        tmp_path,
        model=model,
        prompts=uniform_prompts(8, 64, 1024),
        max_tokens=4,
        device="cuda",
        given={
            "weights": Shares(cpu=1.0),
            "kv_cache": Shares(cpu=1.0),
            "hidden": Shares(cpu=1.0),
            "micro_batch_size": 4,
            "num_micro_batches": 2,
            "compute_dtype": "float16",
            **given,
        },
    )


def test_no_copy_is_synchronous_where_the_host_is_page_locked(tmp_path: Path) -> None:
    trial = streamed(tmp_path)
    assert trial.link_bytes()["h2d"] > 4 * 8 * 2 * 10**7
    assert not trial.report.notes, trial.report.notes


def test_synchronous_copies_are_told_where_the_host_is_not_page_locked(tmp_path: Path) -> None:
    trial = streamed(tmp_path, pin_weights=False)
    assert any("synchronous" in note for note in trial.report.notes)


def test_measured_peak_of_the_device_is_within_a_tenth_of_the_plan(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trial = streamed(tmp_path)
    gpu = next(use for use in trial.report.tiers if use.tier == Tier.GPU)
    assert gpu.measured_bytes <= 1.10 * gpu.planned_bytes
