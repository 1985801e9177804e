"""Qwen 2 and 2.5: Llama's shape with biases on query, key and value; windows in upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.model.config import ModelConfig
from flexpipe.model.families.reading import layer_windows, llama_like

ARCHITECTURE = "Qwen2ForCausalLM"


def describe(hf: Mapping[str, Any]) -> ModelConfig:
    return llama_like(
        hf,
        family="qwen2",
        head_dim=hf.get("head_dim"),
        num_kv_heads=hf.get("num_key_value_heads", 32),
        qkv_bias=True,
        windows=layer_windows(hf),
    )
