"""A stage of several ranks gives the tokens of one, whatever rests where.

The shards run in this process, a thread each; every policy is a plan's like any other.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.policy import percent_shares
from tests.hf import (
    OTHERS,
    VARIANTS,
    Reference,
    load_reference_model,
    ragged_prompts,
    reference_generate,
    widened_checkpoint,
)
from tests.runtime.policies import policies
from tests.runtime.ring import Ring, Tokens

LENGTHS = (40, 9, 30, 20, 3)
LIMITS = (5, 3, 4, 3, 2)
SHARDED = [
    variant
    for variant, (_, keys) in {**VARIANTS, **OTHERS}.items()
    if keys.get("num_key_value_heads", 4) > 1 and keys["num_hidden_layers"] < 8
]
FEW = ["opt-350m", "llama-eight", "qwen3"]
# weights, KV cache and hidden on gpu and cpu; the rest on disk
PERCENT = [
    [100, 0, 100, 0, 100, 0],
    [0, 100, 0, 100, 0, 100],
    [0, 0, 0, 0, 0, 0],
    [20, 40, 40, 40, 50, 0],
]


@pytest.fixture(scope="session")
def rings(hf_checkpoint, hf_reference, tmp_path_factory) -> Any:
    made: dict[str, tuple[Ring, Tokens]] = {}

    def ring_of(variant: str) -> tuple[Ring, Tokens]:
        if variant not in made:
            answers = hf_reference(variant, lengths=LENGTHS, max_new=max(LIMITS))
            folder = tmp_path_factory.mktemp(variant)
            ring = Ring(hf_checkpoint(variant), folder, answers.prompts, LIMITS)
            made[variant] = ring, expected_of(answers)
        return made[variant]

    return ring_of


def expected_of(answers: Reference) -> Tokens:
    """Each prompt's tokens up to its limit, or to the one that ends a text."""
    pairs = zip(answers.tokens, LIMITS, strict=True)
    return tuple(t[: t.index(2) + 1][:limit] if 2 in t else t[:limit] for t, limit in pairs)


def check(ring: Ring, expected: Tokens, data: st.DataObject) -> None:
    most = 4 if ring.config.num_kv_heads == 4 else 2
    num_shards = data.draw(st.sampled_from([size for size in (1, 2, 4) if size <= most]))
    num_stages = data.draw(st.sampled_from([1, 1, 2]))
    cut = {1: (3,), 2: (2, 1)}[num_stages]
    num_blocks = data.draw(st.sampled_from([1, 2]))
    pipeline = Pipeline(layers=cut, num_stages=num_stages, num_blocks=num_blocks)
    device = data.draw(st.sampled_from(["cpu", "emulated", "emulated"]))
    try:
        given = data.draw(policies(device, PERCENT))
        tokens = ring(given, pipeline, num_shards=num_shards, device=device)
    except PolicyError as error:
        assert "asks for a share" in str(error)
        assume(False)
    assert tokens == expected


@settings(max_examples=4)
@given(data=st.data(), variant=st.sampled_from(FEW))
def test_any_stage_of_shards_gives_the_reference_tokens(rings, variant, data):
    check(*rings(variant), data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=600)
@given(data=st.data(), variant=st.sampled_from(SHARDED))
def test_hundreds_of_stages_of_shards_give_the_reference_tokens(rings, variant, data):
    check(*rings(variant), data)


EVERYWHERE = {
    **percent_shares([20, 40, 40, 40, 50, 0]),
    "micro_batch_size": 2,
    "num_micro_batches": 2,
    "max_batch_tokens": 8,
    "cpu_attention": True,
}


@pytest.mark.parametrize("variant", FEW)
def test_two_shards_with_everything_everywhere_give_the_reference_tokens(rings, variant):
    ring, expected = rings(variant)
    assert ring(EVERYWHERE, num_shards=2) == expected


def test_two_stages_of_two_shards_give_the_reference_tokens(rings):
    ring, expected = rings("llama-eight")
    pipeline = Pipeline(layers=(2, 1), num_stages=2, num_blocks=2)
    assert ring(EVERYWHERE, pipeline, num_shards=2) == expected


@pytest.mark.parametrize("weight", ["4", "8"])
def test_shards_compressed_by_themselves_give_the_tokens_of_the_widened_model(
    weight, hf_checkpoint, tmp_path
):
    """A group of numbers ends where a shard does."""
    knobs = {"compress_weight": weight, "compress_vocabulary": "8"}
    source = hf_checkpoint("llama-linear")
    widened = widened_checkpoint(source, tmp_path / "widened", knobs, num_shards=2)
    prompts = ragged_prompts(LENGTHS)
    answers = reference_generate(load_reference_model(widened), prompts, max(LIMITS))
    ring = Ring(source, tmp_path, prompts, LIMITS)
    assert ring({**EVERYWHERE, **knobs}, num_shards=2) == expected_of(answers)


def test_shards_of_another_dtype_with_a_compressed_cache_give_the_tokens_of_one(
    hf_checkpoint, tmp_path
):
    """Weights are converted part by part, keys and values compressed head by head."""
    source, knobs = hf_checkpoint("llama2", dtype="bfloat16"), {"compress_cache": "8"}
    ring = Ring(source, tmp_path, ragged_prompts(LENGTHS), LIMITS)
    assert ring({**EVERYWHERE, **knobs}, num_shards=4) == ring({**EVERYWHERE, **knobs})
