"""Reading config.json: what families share when they translate it.

Knows the spellings of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of
transformers 5 (`rope_parameters`, `dtype`), and the defaults that those libraries assume for absent
keys. What cannot be computed exactly is refused by name, never approximated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from flexpipe.errors import ModelError
from flexpipe.model.config import (
    DTYPE_BYTES,
    ModelConfig,
    RopeConfig,
    attention_tensors,
    embed_tensors,
    head_tensors,
    mlp_tensors,
)

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

LLAMA_NAMES: Mapping[str, str] = {
    "embed_tokens": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "q_proj": "model.layers.{layer}.self_attn.q_proj.weight",
    "k_proj": "model.layers.{layer}.self_attn.k_proj.weight",
    "v_proj": "model.layers.{layer}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "o_proj": "model.layers.{layer}.self_attn.o_proj.weight",
    "o_bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate_proj": "model.layers.{layer}.mlp.gate_proj.weight",
    "gate_bias": "model.layers.{layer}.mlp.gate_proj.bias",
    "up_proj": "model.layers.{layer}.mlp.up_proj.weight",
    "up_bias": "model.layers.{layer}.mlp.up_proj.bias",
    "down_proj": "model.layers.{layer}.mlp.down_proj.weight",
    "down_bias": "model.layers.{layer}.mlp.down_proj.bias",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


def llama_like(
    hf: Mapping[str, Any],
    *,
    family: str,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] = (),
    eos: int | None = None,
) -> ModelConfig:
    """The shape Llama made common: RMS norms, rotary positions, gated MLP, grouped KV heads."""
    num_heads = positive(hf, "num_attention_heads")
    head_dim = head_dim or heads_divide(hf, "hidden_size", num_heads)
    tied = bool(hf.get("tie_word_embeddings", False))
    config = ModelConfig(
        family=family,
        num_layers=positive(hf, "num_hidden_layers"),
        hidden_size=positive(hf, "hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim,
        ffn_size=positive(hf, "intermediate_size"),
        vocab_size=positive(hf, "vocab_size"),
        max_positions=positive(hf, "max_position_embeddings"),
        dtype=dtype(hf),
        norm="rms",
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        activation=activation(hf, "hidden_act", "silu"),
        gated_mlp=True,
        tied=tied,
        tensor_names=names(LLAMA_NAMES, tied),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        rope=rope(hf),
        windows=windows,
        eos_token_ids=eos_ids(hf, eos),
    )
    return checked(config)


def checked(config: ModelConfig) -> ModelConfig:
    """`config` with the names of the tensors it has, if heads and windows add up."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads "
            f"{config.num_kv_heads} in config.json. The checkpoint is damaged or mislabelled."
        )
    if config.rope is not None and config.head_dim % 2:
        raise ModelError(f"head_dim {config.head_dim} is odd, but rotary positions turn pairs.")
    if config.windows and len(config.windows) != config.num_layers:
        raise ModelError(
            f"layer_types in config.json lists {len(config.windows)} layers, but "
            f"num_hidden_layers is {config.num_layers}."
        )
    tensors = (
        *embed_tensors(config),
        *attention_tensors(config, 0),
        *mlp_tensors(config, 0),
        *head_tensors(config),
    )
    return replace(
        config, tensor_names={tensor.role: config.tensor_names[tensor.role] for tensor in tensors}
    )


def required(hf: Mapping[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise ModelError(
            f"config.json lacks the key {key}. Fetch the model's complete config.json."
        )
    return hf[key]


def positive(hf: Mapping[str, Any], key: str) -> int:
    value = required(hf, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{key} in config.json must be a positive integer, not {value!r}.")
    return value


def heads_divide(hf: Mapping[str, Any], key: str, num_heads: int) -> int:
    """Width of one head, where config.json does not say it."""
    size = positive(hf, key)
    if size % num_heads:
        raise ModelError(
            f"{key} {size} is not a multiple of num_attention_heads {num_heads} in config.json."
        )
    return size // num_heads


def dtype(hf: Mapping[str, Any]) -> str:
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ModelError(
            f"the checkpoint's dtype {name} cannot be read; known are {', '.join(DTYPE_BYTES)}."
        )
    return name


def activation(hf: Mapping[str, Any], key: str, default: str) -> Activation:
    name = str(hf.get(key) or default)
    if name not in ACTIVATIONS:
        raise ModelError(f"{key} {name} is unknown; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def names(known: Mapping[str, str], tied: bool) -> dict[str, str]:
    return {**known, "lm_head": known["embed_tokens"]} if tied else dict(known)


def eos_ids(hf: Mapping[str, Any], default: int | None) -> tuple[int, ...]:
    """Tokens that end a sequence; config.json holds one, several or none."""
    eos = hf.get("eos_token_id", default)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Windows of the Qwen families: per layer, and only where `use_sliding_window` is true."""
    num_layers = positive(hf, "num_hidden_layers")
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28) if window is not None else num_layers
        kinds = ["sliding_attention" if n >= first else "full_attention" for n in range(num_layers)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ModelError(
            f"layer_types in config.json holds {', '.join(unknown)}; known are "
            "full_attention and sliding_attention."
        )
    if "sliding_attention" not in kinds:
        return ()
    if window is None:
        raise ModelError(
            "layer_types in config.json asks for sliding_attention, but use_sliding_window is "
            "false or sliding_window is null. Correct config.json."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Rotary parameters in either spelling, all defaults filled in."""
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = given.get("rope_type") or given.get("type") or "default"
    theta = float(given.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    partial = given.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelError(f"partial_rotary_factor {partial} is unknown; only 1.0 is.")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=float(required(given, "factor")))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=float(required(given, "factor")),
            low_freq_factor=float(required(given, "low_freq_factor")),
            high_freq_factor=float(required(given, "high_freq_factor")),
            original_max_positions=_original_max(hf, given),
        )
    if kind == "yarn":
        return _yarn(hf, given, theta)
    raise ModelError(
        f"the rotary scaling {kind} is unknown; known are default, linear, llama3 and yarn."
    )


def _yarn(hf: Mapping[str, Any], given: Mapping[str, Any], theta: float) -> RopeConfig:
    original = _original_max(hf, given)
    factor = float(given.get("factor") or positive(hf, "max_position_embeddings") / original)
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(given, factor),
        truncate=bool(given.get("truncate", True)),
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """Multiplies cos and sin; the paper's 0.1 ln(s) + 1 unless config.json says else."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(float(given["mscale"])) / scale(float(given["mscale_all_dim"]))
    return scale(1.0)


def _original_max(hf: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """Positions the model was first trained on; a key beside the rotary ones takes precedence."""
    original = (
        hf.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or positive(hf, "max_position_embeddings")
    )
    return int(original)
