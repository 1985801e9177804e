"""Shards of a decoder say together what the whole one says, and each does its part of the work."""

from __future__ import annotations

import json
import random
from math import prod

import pytest
import torch

from flexpipe.errors import ModelError
from flexpipe.model import cost
from flexpipe.model.config import ModelConfig, Shard, shard_config
from flexpipe.model.families import read_config
from flexpipe.plan.codec import Codec
from flexpipe.plan.placement import model_tensors
from tests.hf import OTHERS, TOLERANCE, VARIANTS
from tests.model.loop import Decoder, SplitDecoder, generate
from tests.model.test_parity import check
from tests.schedule.plans import tiny_config

LENGTHS, MAX_NEW = (1, 31, 65, 130), 6
# what has biases behind sums, projections, norms behind sums, learned positions, norms per head,
# tied embeddings, a vocabulary that does not divide
SAMPLE = [("opt-350m", 2), ("llama-linear", 2), ("qwen3", 2), ("llama-eight", 4)]
FITTING = [
    (variant, size)
    for variant, (_, keys) in {**VARIANTS, **OTHERS}.items()
    for size in (2, 4)
    if keys.get("num_key_value_heads", keys["num_attention_heads"]) % size == 0
]
REST = [case for case in FITTING if case not in SAMPLE]


def shards_of(config: ModelConfig, size: int) -> list[ModelConfig]:
    return [shard_config(config, Shard(index, size)) for index in range(size)]


@pytest.mark.parametrize(
    ("variant", "size"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_shards_together_match_the_reference(variant, size, hf_checkpoint, hf_reference):
    """Ragged rows, prefilled whole or in chunks beside others that decode."""
    reference = hf_reference(variant, lengths=LENGTHS, max_new=MAX_NEW)
    chunk = random.Random(f"{variant} {size}").choice([None, 50])
    decoder = SplitDecoder(hf_checkpoint(variant), size, num_rows=len(LENGTHS))
    check(reference, generate(decoder, reference.prompts, MAX_NEW, chunk=chunk))


def test_shards_with_a_compressed_cache_say_what_the_whole_model_says(hf_checkpoint):
    """Keys and values are compressed head by head, which no split parts."""
    path, prompts = hf_checkpoint("qwen3"), [[5] * 3, list(range(3, 83))]
    how = {"num_rows": 2, "kv": Codec(bits=8, group_size=32)}
    whole = generate(Decoder(path, **how), prompts, 3)
    split = generate(SplitDecoder(path, 2, **how), prompts, 3)
    for one, other in zip(whole, split, strict=True):
        assert (one - other).abs().max() < 0.05  # a code may turn over


@pytest.mark.parametrize("left_out", ["part", "bias"])
def test_a_sum_that_lacks_or_doubles_something_is_noticed(left_out, hf_checkpoint, hf_reference):
    reference = hf_reference("llama-linear", lengths=LENGTHS, max_new=MAX_NEW)
    decoder = SplitDecoder(hf_checkpoint("llama-linear"), 2, num_rows=len(LENGTHS))
    first, second = decoder.shards
    if left_out == "part":
        down = second.layers[1].down_proj
        assert isinstance(down, torch.Tensor)
        second.layers[1].down_proj = torch.zeros_like(down)
    else:
        second.layers[1].o_bias = first.layers[1].o_bias
    outputs = generate(decoder, reference.prompts, 1)
    pairs = zip(outputs, reference.logits, strict=True)
    assert max((one[0] - other[0]).abs().max() for one, other in pairs) > 10 * TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", ["opt-350m", "llama-eight"])
def test_shards_have_every_number_of_the_model_once(variant, size):
    model_type, keys = {**VARIANTS, **OTHERS}[variant]
    architecture = {"opt": "OPTForCausalLM", "llama": "LlamaForCausalLM"}[model_type]
    config = read_config({"architectures": [architecture], **json.loads(json.dumps(keys))})
    whole = {spec.name: spec for spec in model_tensors(config)}
    held: dict[str, int] = {}
    for shard in shards_of(config, size):
        for spec in model_tensors(shard):
            held[spec.name] = held.get(spec.name, 0) + prod(spec.shape)
    copied = {"attn_norm", "mlp_norm", "final_norm", "project_in", "project_out"}
    assert held.keys() == whole.keys()
    for name, spec in whole.items():
        copies = size if spec.role.removesuffix("_bias") in copied else 1
        assert held[name] == copies * spec.num_elements, name


def test_shards_do_equal_parts_of_the_work():
    config = tiny_config(num_key_value_heads=4, vocab_size=322)
    shards = shards_of(config, 4)
    for flops in (cost.qkv_flops, cost.attend_flops, cost.out_flops, cost.mlp_flops):
        assert [flops(shard, 24) for shard in shards] == [flops(config, 24) // 4] * 4
    assert sum(cost.head_flops(shard, 24) for shard in shards) == cost.head_flops(config, 24)
    rows = [shard.vocab_rows for shard in shards]
    assert [row for one in rows for row in one] == list(range(322))
    assert {len(one) for one in rows} == {80, 81}


@pytest.mark.parametrize(
    ("changes", "size", "what"),
    [
        ({}, 3, "4 attention heads"),
        ({"num_key_value_heads": 2}, 4, "2 KV heads"),
        ({"intermediate_size": 98}, 4, "98 MLP features"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_with_the_sizes_that_do(changes, size, what):
    with pytest.raises(ModelError, match=rf"{what} cannot be split over .*-size {size}; .* 1, 2"):
        shard_config(tiny_config(**changes), Shard(0, size))
