"""Compressed weights end to end: the tokens of a model that holds what is left of its matrices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexpipe.job.run import Probes
from flexpipe.kernels.codec import compress, widen
from flexpipe.model.families import read_config
from flexpipe.plan.codec import Codec
from flexpipe.plan.placement import is_shared, meets_vocabulary, model_tensors
from flexpipe.plan.policy import percent_shares
from tests.hf import load_reference_model, ragged_prompts, reference_generate
from tests.job.test_run import MAX_NEW, Logits, check_logits, check_records, run

LENGTHS = (1, 31, 64, 130, 7)
BOTH = {"compress_weight": "4", "compress_vocabulary": "8"}

# (variant, dtype, device, shares, knobs): together every home, tied and untied, heads in slices
CASES: Mapping[str, tuple[str, str, str, tuple[int, ...], Mapping[str, Any]]] = {
    "resident": ("llama3", "float32", "cpu", (0, 100, 0, 100, 0, 100), BOTH),
    "tied from disk": ("qwen2", "bfloat16", "cpu", (0, 0, 0, 100, 0, 100), BOTH),
    "tied, resident": (
        *("llama3-tied", "float16", "cpu", (0, 100, 0, 50, 0, 100)),
        {**BOTH, "compress_vocabulary": "4", "strategy": "none"},
    ),
    "projections on every tier": (
        *("opt-350m", "float32", "emulated", (30, 40, 30, 40, 50, 50)),
        {**BOTH, "compress_group": 32},
    ),
    "all tiers": (
        *("mistral", "bfloat16", "emulated", (30, 40, 100, 0, 100, 0)),
        {**BOTH, "strategy": "none", "separate_layers": True},
    ),
    "from host memory": (
        *("opt", "float16", "emulated", (0, 100, 0, 100, 100, 0)),
        {**BOTH, "compress_weight": "8", "compress_group": 96},
    ),
    "resident on the accelerator": (
        *("qwen3", "float32", "emulated", (100, 0, 0, 100, 0, 100)),
        {"compress_weight": "8", "compress_vocabulary": "4", "strategy": "none"},
    ),
    "vocabulary alone": (
        *("qwen2", "float32", "emulated", (0, 0, 0, 100, 0, 100)),
        {"compress_vocabulary": "4"},
    ),
    "matrices alone": (
        *("llama-linear", "float32", "cpu", (0, 30, 0, 40, 0, 100)),
        {"compress_weight": "4", "resident_dtype": "checkpoint"},
    ),
}


def widened_checkpoint(source: Path, target: Path, knobs: Mapping[str, Any]) -> Path:
    """A copy in float32 whose compressed matrices hold what compression leaves of them."""
    shutil.copytree(source, target)
    config = read_config(json.loads((source / "config.json").read_text()))
    tensors = {name: t.float() for name, t in load_file(target / "model.safetensors").items()}
    for spec in model_tensors(config):
        knob = "compress_vocabulary" if meets_vocabulary(spec) else "compress_weight"
        if is_shared(spec) and knob in knobs:
            group = knobs.get("compress_group", 64)
            codec = Codec(bits=int(knobs[knob]), group_size=group)
            matrix = tensors[spec.name]
            rows = torch.empty(len(matrix), codec.row_bytes(matrix.shape[1]), dtype=torch.uint8)
            compress(matrix, codec, rows)
            widen(rows, codec, matrix)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_are_those_of_the_widened_matrices(
    hf_checkpoint: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    variant, dtype, device, shares, knobs = CASES[case]
    source = hf_checkpoint(variant, dtype=dtype)
    model = load_reference_model(widened_checkpoint(source, tmp_path / "widened", knobs))
    reference = reference_generate(model, ragged_prompts(LENGTHS), MAX_NEW)
    given = {
        **percent_shares(shares),
        **knobs,
        "micro_batch_size": 2,
        "num_micro_batches": 2,
        "max_batch_tokens": 90,
        "compute_dtype": "float32",
    }
    seen = Logits()
    probes = Probes(before_op=seen.before_op, on_stage=seen.on_stage, poison=True)
    _, records = run(source, tmp_path, reference.prompts, device, given, probes=probes)
    check_records(reference, records)
    check_logits(reference, records, seen)
