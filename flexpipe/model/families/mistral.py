"""Mistral: Llama's shape with a sliding attention window in every layer, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.errors import ModelError
from flexpipe.model.config import ModelConfig
from flexpipe.model.families.reading import llama_like, positive

ARCHITECTURE = "MistralForCausalLM"


def describe(hf: Mapping[str, Any]) -> ModelConfig:
    return llama_like(
        hf,
        family="mistral",
        head_dim=hf.get("head_dim"),
        num_kv_heads=hf.get("num_key_value_heads", 8),
        windows=_windows(hf),
        eos=2,
    )


def _windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    window = hf.get("sliding_window", 4096)
    kinds = set(hf.get("layer_types") or ())
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds - {expected}:
        raise ModelError(
            f"layer_types in config.json mixes {', '.join(sorted(kinds))}, but a Mistral model "
            f"with sliding_window {window} has {expected} in every layer."
        )
    return () if window is None else (window,) * positive(hf, "num_hidden_layers")
