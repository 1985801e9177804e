"""OPT: learned positions, layer norms with biases, a plain MLP.

opt-350m is the odd one: narrower embeddings between two projections, norms after the halves
instead of before, and no final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.errors import ModelError
from flexpipe.model.config import ModelConfig
from flexpipe.model.families.reading import (
    activation,
    checked,
    dtype,
    eos_ids,
    heads_divide,
    names,
    positive,
)

ARCHITECTURE = "OPTForCausalLM"
POSITION_OFFSET = 2  # the table's first two rows belong to no position

LAYER = "model.decoder.layers.{layer}."
NAMES: Mapping[str, str] = {
    "embed_tokens": "model.decoder.embed_tokens.weight",
    "embed_positions": "model.decoder.embed_positions.weight",
    "project_in": "model.decoder.project_in.weight",
    "attn_norm": LAYER + "self_attn_layer_norm.weight",
    "attn_norm_bias": LAYER + "self_attn_layer_norm.bias",
    "q_proj": LAYER + "self_attn.q_proj.weight",
    "k_proj": LAYER + "self_attn.k_proj.weight",
    "v_proj": LAYER + "self_attn.v_proj.weight",
    "q_bias": LAYER + "self_attn.q_proj.bias",
    "k_bias": LAYER + "self_attn.k_proj.bias",
    "v_bias": LAYER + "self_attn.v_proj.bias",
    "o_proj": LAYER + "self_attn.out_proj.weight",
    "o_bias": LAYER + "self_attn.out_proj.bias",
    "mlp_norm": LAYER + "final_layer_norm.weight",
    "mlp_norm_bias": LAYER + "final_layer_norm.bias",
    "up_proj": LAYER + "fc1.weight",
    "up_bias": LAYER + "fc1.bias",
    "down_proj": LAYER + "fc2.weight",
    "down_bias": LAYER + "fc2.bias",
    "final_norm": "model.decoder.final_layer_norm.weight",
    "final_norm_bias": "model.decoder.final_layer_norm.bias",
    "project_out": "model.decoder.project_out.weight",
    "lm_head": "lm_head.weight",
}


def describe(hf: Mapping[str, Any]) -> ModelConfig:
    _refuse_bare(hf)
    num_heads = positive(hf, "num_attention_heads")
    max_positions = positive(hf, "max_position_embeddings")
    norm_before = bool(hf.get("do_layer_norm_before", True))
    tied = bool(hf.get("tie_word_embeddings", True))
    hidden_size = positive(hf, "hidden_size")
    config = ModelConfig(
        family="opt",
        num_layers=positive(hf, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=heads_divide(hf, "hidden_size", num_heads),
        ffn_size=positive(hf, "ffn_dim"),
        vocab_size=positive(hf, "vocab_size"),
        max_positions=max_positions,
        dtype=dtype(hf),
        norm="layer",
        norm_eps=1e-5,
        activation=activation(hf, "activation_function", "relu"),
        gated_mlp=False,
        tied=tied,
        tensor_names=names(NAMES, tied),
        post_norm=not norm_before,
        final_norm=norm_before and not hf.get("_remove_final_layer_norm", False),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=max_positions + POSITION_OFFSET,
        position_offset=POSITION_OFFSET,
        embed_size=hf.get("word_embed_proj_dim") or hidden_size,
        eos_token_ids=eos_ids(hf, 2),
    )
    return checked(config)


def _refuse_bare(hf: Mapping[str, Any]) -> None:
    for key in ("enable_bias", "layer_norm_elementwise_affine"):
        if not hf.get(key, True):
            raise ModelError(
                f"{key} is false in config.json; only OPT models where it is true are known."
            )
