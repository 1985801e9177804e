"""Shares are met over the model, within one tensor, evenly from layer to layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.model.config import DTYPE_BYTES, attention_tensors, mlp_tensors
from flexpipe.plan.placement import (
    Diffusion,
    Placement,
    deal_places,
    is_shared,
    model_tensors,
    place_weights,
)
from flexpipe.plan.policy import Shares
from flexpipe.plan.tier import Tier
from tests.schedule.plans import stored_tensors, tiny_config

SIZES = st.lists(st.sampled_from([64, 96, 100, 256, 4096, 10_000]), min_size=1, max_size=60)


@st.composite
def any_shares(draw: st.DrawFn) -> Shares:
    low, high = sorted((draw(st.integers(0, 1000)), draw(st.integers(0, 1000))))
    return Shares(gpu=low / 1000, cpu=(high - low) / 1000, disk=(1000 - high) / 1000)


def dealt(shares: Shares, sizes: Sequence[int]) -> list[dict[Tier, int]]:
    """Bytes per tier after each item."""
    diffusion, history = Diffusion(shares), []
    for size in sizes:
        diffusion.deal(size)
        history.append(dict(diffusion.given))
    return history


@given(shares=any_shares(), sizes=SIZES)
def test_every_tier_holds_what_was_asked_within_one_tensor_at_every_prefix(shares, sizes):
    largest, seen = 0, 0
    for size, given_bytes in zip(sizes, dealt(shares, sizes), strict=True):
        largest, seen = max(largest, size), seen + size
        assert sum(given_bytes.values()) == seen
        for tier in Tier:
            assert abs(given_bytes[tier] - shares.of(tier) * seen) <= largest


@given(sizes=SIZES, data=st.data())
def test_a_larger_share_never_holds_less_by_more_than_one_tensor(sizes, data):
    small, large = sorted((data.draw(st.integers(0, 100)), data.draw(st.integers(0, 100))))
    held = [
        dealt(Shares(gpu=percent / 100, cpu=1 - percent / 100), sizes)[-1][Tier.GPU]
        for percent in (small, large)
    ]
    assert held[1] >= held[0] - max(sizes)


@given(sizes=SIZES)
def test_a_whole_share_takes_everything_and_none_takes_nothing(sizes):
    for tier in Tier:
        given_bytes = dealt(Shares(**{tier.value: 1.0}), sizes)[-1]
        assert given_bytes == {other: sum(sizes) * (other == tier) for other in Tier}


def placed(shares: Shares, *, layers: int = 40, **changes: object) -> Placement:
    config = tiny_config(num_hidden_layers=layers, **changes)
    return place_weights(
        model_tensors(config),
        shares,
        stored_tensors(config, "float16"),
        device_tier=Tier.GPU,
        compute_dtype="float16",
        resident_dtype="compute",
    )


def streamed_bytes(placement: Placement, layers: int) -> list[int]:
    config = tiny_config(num_hidden_layers=layers)
    return [
        sum(
            placement.tensors[spec.name].num_bytes
            for spec in (*attention_tensors(config, layer), *mlp_tensors(config, layer))
            if placement.tensors[spec.name].home != Tier.GPU
        )
        for layer in range(layers)
    ]


@given(percent=st.integers(5, 95), vocab=st.sampled_from([96, 320, 2000]))
def test_every_layer_streams_about_as_much_as_the_next(percent, vocab):
    """However large the embedding and the head are, and wherever they rest."""
    placement = placed(Shares(gpu=percent / 100, cpu=1 - percent / 100), vocab_size=vocab)
    streamed = streamed_bytes(placement, 40)
    largest = 96 * 64 * 2
    assert max(streamed) - min(streamed) <= 2 * largest


@given(shares=any_shares(), vocab=st.sampled_from([96, 320, 2000]), tied=st.booleans())
def test_over_the_model_every_tier_holds_what_was_asked_within_one_tensor(shares, vocab, tied):
    """And on the way there, within one more tensor of a layer."""
    try:
        placement = placed(shares, layers=12, vocab_size=vocab, tie_word_embeddings=tied)
    except PolicyError:
        return
    seen, held = 0, dict.fromkeys(Tier, 0)
    tensors = [tensor for tensor in placement.tensors.values() if is_shared(tensor.spec)]
    largest = max(tensor.num_bytes for tensor in tensors)
    for tensor in tensors:
        seen += tensor.num_bytes
        held[tensor.home] += tensor.num_bytes
        for tier in Tier:
            assert abs(held[tier] - shares.of(tier) * seen) <= largest + 96 * 64 * 2
    for tier in Tier:
        assert abs(held[tier] - shares.of(tier) * seen) <= largest


@given(data=st.data(), vocab=st.sampled_from([96, 320, 2000]))
def test_a_larger_share_of_the_weights_never_holds_less_by_more_than_one_tensor(data, vocab):
    small, large = sorted((data.draw(st.integers(1, 99)), data.draw(st.integers(1, 99))))
    placements = [
        placed(Shares(gpu=percent / 100, cpu=1 - percent / 100), vocab_size=vocab)
        for percent in (small, large)
    ]
    held = [placement.achieved_bytes[Tier.GPU] for placement in placements]
    largest = max(tensor.num_bytes for tensor in placements[0].tensors.values())
    assert held[1] >= held[0] - largest


def test_weights_are_met_over_the_model_within_one_tensor():
    """FlexLLMGen's rule of midpoints gives 0 of a layer's tensors to a share of 5 %."""
    placement = placed(Shares(gpu=0.05, cpu=0.9, disk=0.05), vocab_size=96)
    total = sum(placement.achieved_bytes.values())
    for tier, share in ((Tier.GPU, 0.05), (Tier.CPU, 0.9), (Tier.DISK, 0.05)):
        assert abs(placement.achieved_bytes[tier] - share * total) <= 96 * 64 * 2


@given(shares=any_shares(), layers=st.integers(1, 6), tied=st.booleans())
def test_all_tensors_get_a_home_and_small_ones_stay_beside_the_device(shares, layers, tied):
    try:
        placement = placed(shares, layers=layers, tie_word_embeddings=tied)
    except PolicyError as error:
        assert "no whole tensor fits it" in str(error)
        return
    config = tiny_config(num_hidden_layers=layers, tie_word_embeddings=tied)
    assert set(placement.tensors) == {spec.name for spec in model_tensors(config)}
    for tensor in placement.tensors.values():
        assert is_shared(tensor.spec) or tensor.home == Tier.GPU
        assert tensor.num_bytes == tensor.spec.num_elements * DTYPE_BYTES[tensor.dtype]
    by_tier = defaultdict(int)
    for tensor in placement.tensors.values():
        if is_shared(tensor.spec):
            by_tier[tensor.home] += tensor.num_bytes
    assert {tier: by_tier[tier] for tier in Tier} == placement.achieved_bytes


@pytest.mark.parametrize(
    ("compute", "resident", "tier", "dtypes"),
    [
        ("float32", "compute", Tier.GPU, ("float32", "float16", "float16")),
        ("float32", "checkpoint", Tier.GPU, ("float16", "float16", "float16")),
        ("float16", "compute", Tier.GPU, ("float16", "float16", "float16")),
    ],
)
def test_weights_at_home_wait_in_the_compute_dtype_and_others_travel_small(
    compute, resident, tier, dtypes
):
    config = tiny_config()
    placement = place_weights(
        model_tensors(config),
        Shares(gpu=0.4, cpu=0.3, disk=0.3),
        stored_tensors(config, "float16"),
        device_tier=tier,
        compute_dtype=compute,
        resident_dtype=resident,
    )
    for tensor in placement.tensors.values():
        if is_shared(tensor.spec):
            assert tensor.dtype == dtypes[list(Tier).index(tensor.home)]
        else:
            assert tensor.dtype == compute  # norms are never converted on the way


def test_wide_weights_are_narrowed_in_host_memory_but_not_on_disk():
    config = tiny_config()
    placement = place_weights(
        model_tensors(config),
        Shares(cpu=0.5, disk=0.5),
        stored_tensors(config, "float32"),
        device_tier=Tier.GPU,
        compute_dtype="float16",
        resident_dtype="compute",
    )
    found = {tensor.home: tensor.dtype for tensor in placement.tensors.values()}
    assert found == {Tier.GPU: "float16", Tier.CPU: "float16", Tier.DISK: "float32"}


@given(shares=any_shares(), sizes=SIZES)
def test_a_tier_that_was_asked_for_and_got_nothing_is_an_error(shares, sizes):
    held = dealt(shares, sizes)[-1]
    empty = [tier for tier in shares.tiers if not held[tier]]
    assume(empty)
    with pytest.raises(PolicyError, match=rf"kv_cache\.{empty[0].value} asks for a share of"):
        deal_places("kv_cache", "row", shares, sizes)
