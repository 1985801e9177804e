"""Qwen 3: queries and keys are normalized per head, and the head's width is its own number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.model.config import ModelConfig
from flexpipe.model.families.reading import layer_windows, llama_like

ARCHITECTURE = "Qwen3ForCausalLM"


def describe(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return llama_like(
        hf,
        family="qwen3",
        head_dim=hf.get("head_dim", 128),
        num_kv_heads=hf.get("num_key_value_heads", 32),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=layer_windows(hf),
    )
