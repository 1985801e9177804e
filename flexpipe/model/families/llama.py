"""Llama 2 and 3, and the models that share their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.model.config import ModelConfig
from flexpipe.model.families.reading import llama_like

ARCHITECTURE = "LlamaForCausalLM"


def describe(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return llama_like(
        hf,
        family="llama",
        head_dim=hf.get("head_dim"),
        num_kv_heads=hf.get("num_key_value_heads"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        eos=2,
    )
