"""What a decoder is, as data.

One `ModelConfig` describes every supported model: the families in `flexpipe.model.families` only
translate a Hugging Face config.json into it and name the tensors. Nothing here imports torch, so
placement and schedule can be computed without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flexpipe.errors import ModelError

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
# of what a tensor may be held in; a compressed one is rows of bytes
HELD_BYTES: Mapping[str, int] = {**DTYPE_BYTES, "uint8": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how its frequencies are scaled."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True  # yarn rounds its ramp's ends to whole dimensions


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of `size` equal parts of every layer: what one rank of a stage computes."""

    index: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.size, f"no shard {self.index} of {self.size}"

    @property
    def is_first(self) -> bool:
        """Whether it adds what must be added once: biases behind a sum, learned positions."""
        return self.index == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer: shapes, switches and the names of its tensors.

    `tensor_names` maps a role ("q_proj", "embed_tokens", …) to the checkpoint's name, with
    "{layer}" where the layer's index stands. A role the model does not have is absent.
    Of a `shard`, heads and `ffn_size` are those it has; `vocab_size` is the model's.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"]
    gated_mlp: bool
    tied: bool
    tensor_names: Mapping[str, str]
    post_norm: bool = False
    final_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig | None = None
    learned_positions: int | None = None  # rows of the position table; None without one
    position_offset: int = 0
    embed_size: int | None = None  # differs from hidden_size where projections stand between
    windows: tuple[int | None, ...] = ()  # attention window per layer; () means none anywhere
    eos_token_ids: tuple[int, ...] = ()
    shard: Shard = Shard()

    @property
    def is_split(self) -> bool:
        """Whether other ranks compute the rest of every layer."""
        return self.shard.size > 1

    @property
    def vocab_rows(self) -> range:
        """Rows of the embedding and the head that this shard has; they need not divide evenly."""
        index, size = self.shard.index, self.shard.size
        return range(self.vocab_size * index // size, self.vocab_size * (index + 1) // size)

    def window(self, layer: int) -> int | None:
        """Number of tokens a query of `layer` sees, itself included; None sees all."""
        return self.windows[layer] if self.windows else None

    @property
    def input_size(self) -> int:
        """Width of an embedding row."""
        return self.embed_size or self.hidden_size

    @property
    def has_projections(self) -> bool:
        return self.input_size != self.hidden_size


def shard_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """What one shard of a whole model is: a decoder with a part of the heads and of the MLP."""
    counts = {
        "attention heads": config.num_heads,
        "KV heads": config.num_kv_heads,
        "MLP features": config.ffn_size,
    }
    for what, count in counts.items():
        if count % shard.size:
            common = math.gcd(*counts.values())
            fitting = [size for size in range(1, common + 1) if common % size == 0]
            raise ModelError(
                f"{count} {what} cannot be split over --tensor-parallel-size {shard.size}; this "
                f"model can be over {', '.join(map(str, fitting))}."
            )
    return replace(
        config,
        num_heads=config.num_heads // shard.size,
        num_kv_heads=config.num_kv_heads // shard.size,
        ffn_size=config.ffn_size // shard.size,
        shard=shard,
    )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model: its role, its name in the checkpoint, its shape."""

    role: str
    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def embed_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Tensors that turn token ids into the first hidden states."""
    num_rows = len(config.vocab_rows)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (num_rows, config.input_size)}
    if config.learned_positions is not None and config.shard.is_first:
        shapes["embed_positions"] = (config.learned_positions, config.hidden_size)
    if config.has_projections:
        shapes["project_in"] = (config.hidden_size, config.input_size)
    return _named(config, shapes)


def attention_tensors(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """Tensors of the attention half of a decoder layer, in the order they are used."""
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = _norm_shapes(config, "attn_norm")
    shapes |= {"q_proj": (q_size, hidden), "k_proj": (kv_size, hidden), "v_proj": (kv_size, hidden)}
    if config.qkv_bias:
        shapes |= {"q_bias": (q_size,), "k_bias": (kv_size,), "v_bias": (kv_size,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    shapes["o_proj"] = (hidden, q_size)
    if config.out_bias and config.shard.is_first:
        shapes["o_bias"] = (hidden,)
    return _named(config, shapes, layer)


def mlp_tensors(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    """Tensors of the MLP half of a decoder layer, in the order they are used."""
    hidden, ffn = config.hidden_size, config.ffn_size
    shapes: dict[str, tuple[int, ...]] = _norm_shapes(config, "mlp_norm")
    if config.gated_mlp:
        shapes["gate_proj"] = (ffn, hidden)
        if config.mlp_bias:
            shapes["gate_bias"] = (ffn,)
    shapes["up_proj"] = (ffn, hidden)
    if config.mlp_bias:
        shapes["up_bias"] = (ffn,)
    shapes["down_proj"] = (hidden, ffn)
    if config.mlp_bias and config.shard.is_first:
        shapes["down_bias"] = (hidden,)
    return _named(config, shapes, layer)


def head_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Tensors that turn the last hidden states into logits; tied heads name the embedding."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.final_norm:
        shapes |= _norm_shapes(config, "final_norm")
    if config.has_projections:
        shapes["project_out"] = (config.input_size, config.hidden_size)
    shapes["lm_head"] = (len(config.vocab_rows), config.input_size)
    return _named(config, shapes)


def _norm_shapes(config: ModelConfig, role: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {role: (config.hidden_size,)}
    if config.norm == "layer":
        shapes[f"{role}_bias"] = (config.hidden_size,)
    return shapes


def _named(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], layer: int | None = None
) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(role, config.tensor_names[role].format(layer=layer), shape)
        for role, shape in shapes.items()
    )
