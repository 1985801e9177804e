"""config.json becomes a `ModelConfig`, or is refused with a reason."""

from __future__ import annotations

import json

import pytest
import torch

from flexpipe.errors import ModelError
from flexpipe.model import config as model_config
from flexpipe.model.config import RopeConfig
from flexpipe.model.families import FAMILIES, read_config
from flexpipe.model.rope import inverse_frequencies
from tests.hf import VARIANTS
from tests.model.loop import read_tensors

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 50272,
    "hidden_size": 1024,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
    "torch_dtype": "float16",
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def without(config: dict, key: str) -> dict:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_exactly_those_of_the_checkpoint(variant, hf_checkpoint):
    path = hf_checkpoint(variant)
    config = read_config(json.loads((path / "config.json").read_text()))
    described = {
        spec.name: spec.shape
        for specs in (
            model_config.embed_tensors(config),
            model_config.head_tensors(config),
            *(model_config.attention_tensors(config, n) for n in range(config.num_layers)),
            *(model_config.mlp_tensors(config, n) for n in range(config.num_layers)),
        )
        for spec in specs
    }
    stored = {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    assert described == stored
    head, embedding = config.tensor_names["lm_head"], config.tensor_names["embed_tokens"]
    assert config.tied is (head == embedding)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("opt")])
def test_rotary_frequencies_are_the_reference_ones_to_the_bit(variant, hf_checkpoint):
    from transformers import AutoModelForCausalLM

    path = hf_checkpoint(variant)
    config = read_config(json.loads((path / "config.json").read_text()))
    assert config.rope is not None
    rotary = AutoModelForCausalLM.from_pretrained(path).model.rotary_emb
    ours = inverse_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(ours, rotary.inv_freq, rtol=1e-7, atol=0)
    assert (config.rope.attention_factor or 1.0) == rotary.attention_scaling


def test_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ModelError) as refusal:
        read_config({**LLAMA, "architectures": ["MambaForCausalLM"]})
    for name in ("MambaForCausalLM", *FAMILIES):
        assert name in str(refusal.value)


def test_model_type_decides_where_no_architecture_is_named():
    assert read_config({**without(LLAMA, "architectures"), "model_type": "qwen2"}).qkv_bias
    with pytest.raises(ModelError, match="mamba"):
        read_config({**without(LLAMA, "architectures"), "model_type": "mamba"})
    with pytest.raises(ModelError, match="none"):
        read_config({})


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_4bit": True}, "an unnamed method"),
        ("fp8", "an unnamed method"),
    ],
)
def test_quantized_checkpoint_is_refused_by_its_method_and_told_what_to_use(quantization, method):
    with pytest.raises(ModelError) as refusal:
        read_config({**LLAMA, "quantization_config": quantization})
    for word in (f"quantized with {method}", "unquantized checkpoint", "--compress-weight"):
        assert word in str(refusal.value)


def test_an_empty_quantization_config_says_nothing():
    assert read_config({**LLAMA, "quantization_config": None}) == read_config(LLAMA)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_missing_key_is_named(key):
    with pytest.raises(ModelError, match=key):
        read_config(without(LLAMA, key))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_attention_heads": 24}, "hidden_size 4096"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_act": "relu6"}, "relu6"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 65}, "head_dim 65"),
    ],
)
def test_contradictions_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        read_config({**LLAMA, **change})


def test_both_spellings_of_rotary_scaling_mean_the_same():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = read_config({**LLAMA, "rope_theta": 500000.0, "rope_scaling": scaling})
    new = read_config(
        {
            **without(LLAMA, "torch_dtype"),
            "dtype": "bfloat16",
            "rope_parameters": {**scaling, "rope_theta": 500000.0},
        }
    )
    assert old == new
    assert old.rope == RopeConfig(
        theta=500000.0, kind="llama3", factor=8.0, original_max_positions=8192
    )


def test_a_config_without_rotary_keys_has_plain_rotary_positions():
    assert read_config(LLAMA).rope == RopeConfig(theta=10000.0)


def test_yarn_scale_follows_mscale_or_the_given_factor():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    plain = read_config({**LLAMA, "rope_scaling": yarn}).rope
    given = read_config({**LLAMA, "rope_scaling": {**yarn, "attention_factor": 1.25}}).rope
    both = {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}
    cancelled = read_config({**LLAMA, "rope_scaling": both}).rope
    assert plain and plain.attention_factor == pytest.approx(1.1386, abs=1e-4)
    assert given and given.attention_factor == 1.25
    assert cancelled and cancelled.attention_factor == 1.0


def test_opt_350m_has_projections_post_norm_and_no_final_norm():
    config = read_config(OPT)
    assert config.has_projections and config.input_size == 512
    assert config.post_norm and not config.final_norm
    assert config.learned_positions == 2050 and config.position_offset == 2
    assert config.tied and config.dtype == "float16" and config.eos_token_ids == (2,)
    roles = [spec.role for spec in model_config.head_tensors(config)]
    assert roles == ["project_out", "lm_head"]


def test_old_opt_checkpoints_lack_the_final_norm():
    assert read_config({**OPT, "do_layer_norm_before": True}).final_norm
    old = {**OPT, "do_layer_norm_before": True, "_remove_final_layer_norm": True}
    assert not read_config(old).final_norm


@pytest.mark.parametrize("key", ["enable_bias", "layer_norm_elementwise_affine"])
def test_opt_without_biases_or_norm_weights_is_refused(key):
    with pytest.raises(ModelError, match=key):
        read_config({**OPT, key: False})


def test_mistral_has_its_window_in_every_layer_or_none():
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert read_config({**mistral, "sliding_window": 100}).windows == (100,) * 4
    assert read_config({**mistral, "sliding_window": None}).windows == ()
    with pytest.raises(ModelError, match="layer_types"):
        read_config({**mistral, "layer_types": ["sliding_attention", "full_attention"] * 2})


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, ()),
        ({"sliding_window": 9}, ()),
        ({"use_sliding_window": True, "sliding_window": 9}, ()),  # from layer 28 on
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4}, ()),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            (None, None, None, 9),
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 0,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (None, 9, None, 9),
        ),
    ],
)
def test_qwen_windows_are_those_of_its_upper_layers_or_of_layer_types(keys, windows):
    assert read_config({**QWEN2, **keys}).windows == windows


@pytest.mark.parametrize(
    "keys",
    [
        {"layer_types": ["sliding_attention"] * 4},
        {"layer_types": ["linear_attention"] * 4},
        {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3},
    ],
)
def test_contradicting_layer_types_are_refused(keys):
    with pytest.raises(ModelError, match="layer_types"):
        read_config({**QWEN2, **keys})


def test_qwen3_has_its_own_head_dim():
    config = read_config({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert config.head_dim == 128 and config.qk_norm and not config.qkv_bias


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (None, ())])
def test_end_tokens_may_be_one_several_or_none(eos, ids):
    assert read_config({**LLAMA, "eos_token_id": eos}).eos_token_ids == ids
