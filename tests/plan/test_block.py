"""The shape of a block: places for the longest requests, room for whoever comes after."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.block import KV_PAGE, MicroBatchPlan, Need, Queue, block_shape, longest_first
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.tier import Tier

NEEDS = st.lists(
    st.builds(Need, prompt=st.integers(1, 300), output=st.integers(1, 50)), min_size=1, max_size=30
)


def shape(policy: Policy, needs: list[Need]) -> tuple[MicroBatchPlan, ...]:
    return block_shape(policy, Queue.of(needs), token_bytes=256, hidden_bytes=128)


@given(
    needs=NEEDS,
    size=st.integers(1, 8),
    count=st.integers(1, 5),
    tokens=st.sampled_from([8, 64, 2048]),
)
def test_every_request_finds_room_in_whatever_place_it_takes(needs, size, count, tokens):
    policy = Policy(micro_batch_size=size, num_micro_batches=count, max_batch_tokens=tokens)
    micro_batches = shape(policy, needs)
    assert sum(mb.num_places for mb in micro_batches) == min(len(needs), size * count)
    assert [mb.index for mb in micro_batches] == list(range(len(micro_batches)))
    waiting = [needs[index] for index in longest_first(needs)]
    first = 0
    for mb in micro_batches:
        assert 1 <= mb.num_places <= size
        assert mb.num_places <= mb.max_new_tokens <= tokens
        # all that have not been seated before may come to sit here
        assert all(need.total <= mb.region_tokens for need in waiting[first:])
        first += mb.num_places


@given(needs=NEEDS)
def test_requests_take_places_longest_first(needs):
    order = longest_first(needs)
    assert sorted(order) == list(range(len(needs)))
    totals = [needs[index].total for index in order]
    assert totals == sorted(totals, reverse=True)


def test_rows_and_micro_batches_are_dealt_to_tiers_by_their_shares():
    policy = Policy(
        micro_batch_size=4,
        num_micro_batches=4,
        kv_cache=Shares(gpu=0.5, cpu=0.25, disk=0.25),
        hidden=Shares(gpu=0.5, cpu=0.5),
    )
    micro_batches = shape(policy, [Need(10, 2)] * 16)
    homes = [home for mb in micro_batches for home in mb.kv_homes]
    assert [homes.count(tier) for tier in Tier] == [8, 4, 4]
    assert [mb.hidden_home for mb in micro_batches].count(Tier.GPU) == 2
    for mb in micro_batches:
        assert sorted(place for tier in Tier for place in mb.places(tier)) == [0, 1, 2, 3]


def test_a_share_of_rows_or_micro_batches_that_none_fits_is_refused_by_name():
    needs = [Need(10, 2)] * 4
    with pytest.raises(PolicyError, match=r"kv_cache\.disk asks for a share of 0\.02"):
        shape(Policy(kv_cache=Shares(cpu=0.98, disk=0.02)), needs)
    with pytest.raises(PolicyError, match=r"hidden\.\w+ asks for a share of 0\.5.*micro-batch"):
        shape(Policy(hidden=Shares(cpu=0.5, disk=0.5)), needs)


@given(tokens=st.integers(1, 500))
def test_a_region_is_whole_pages_on_disk_and_exact_in_memory(tokens):
    mb = MicroBatchPlan(
        index=0,
        region_tokens=tokens,
        max_new_tokens=8,
        kv_homes=(Tier.DISK,),
        hidden_home=Tier.CPU,
    )
    assert mb.region_bytes(Tier.CPU, 256) == tokens * 256
    on_disk = mb.region_bytes(Tier.DISK, 256)
    assert on_disk % KV_PAGE == 0
    assert tokens * 256 <= on_disk < tokens * 256 + KV_PAGE
