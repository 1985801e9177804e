"""Cuts of a model: who has which layers, tensors and pools, and how blocks share micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.block import Need, block_ranges
from flexpipe.plan.layer import LayerKind
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Shares
from flexpipe.plan.tier import Tier
from tests.schedule.plans import tiny_config, tiny_plan

GPU = Shares(gpu=1)
CPU = Shares(cpu=1)


def stages(
    layers: Sequence[int], num_stages: int, *, tied: bool = False, **knobs: object
) -> list[Plan]:
    config = tiny_config(num_hidden_layers=sum(layers), tie_word_embeddings=tied)
    pipeline = Pipeline(layers=tuple(layers), num_stages=num_stages)
    return [
        tiny_plan(config=config, pipeline=pipeline, rank=rank, **knobs)
        for rank in range(num_stages)
    ]


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    num_stages = draw(st.integers(1, 5))
    num_chunks = draw(st.integers(1, 3)) if num_stages > 1 else 1
    count = num_stages * num_chunks
    layers = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    return Pipeline(layers=tuple(layers), num_stages=num_stages)


@given(pipeline=pipelines())
def test_every_layer_belongs_to_one_rank_and_hidden_passes_them_in_order(pipeline):
    passed = [
        pipeline.chunk(rank, chunk)
        for chunk in range(pipeline.num_chunks)
        for rank in range(pipeline.num_stages)
    ]
    assert list(chain.from_iterable(passed)) == list(range(pipeline.num_layers))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layers": (2, 2, 2), "num_stages": 2}, "got 3 groups"),
        ({"layers": (), "num_stages": 2}, "got 0 groups"),
        ({"layers": (3, 0), "num_stages": 2}, "at least one layer, got 3, 0; use fewer stages"),
        ({"layers": (3, 3), "num_stages": 1}, "virtual stages need more than one stage"),
        ({"layers": (3,), "num_stages": 1, "num_blocks": 0}, "at least one stage and one block"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(fields, text):
    with pytest.raises(PolicyError, match=text):
        Pipeline(**fields)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_each_tensor_once_but_for_a_tied_table(tied):
    whole = tiny_plan(config=tiny_config(num_hidden_layers=6, tie_word_embeddings=tied))
    names = [name for plan in stages([2, 1, 3], 3, tied=tied) for name in plan.placement.tensors]
    twice = {name for name in names if names.count(name) > 1}
    assert set(names) == set(whole.placement.tensors)
    assert twice == ({whole.config.tensor_names["embed_tokens"]} if tied else set())


def test_layers_begin_and_end_with_messages_where_the_model_does_not():
    for layers in ([2, 1, 3], [1, 1, 1, 1, 1, 1]):
        for plan in stages(layers, 3):
            for index, chunk in enumerate(plan.chunks):
                first, *between, last = chunk
                begins = plan.rank == 0 and index == 0
                ends = plan.rank == 2 and index + 1 == len(plan.chunks)
                assert first.kind == (LayerKind.EMBED if begins else LayerKind.RECEIVE)
                assert last.kind == (LayerKind.HEAD if ends else LayerKind.SEND)
                assert [layer.layer for layer in between] == list(
                    plan.pipeline.chunk(plan.rank, index)
                )


def test_only_the_stage_that_embeds_fetches_embedding_rows():
    plans = stages([1, 1, 1], 3, weights=CPU)
    assert [plan.embed_streams for plan in plans] == [True, False, False]
    assert [bool(plan.embed_slot_bytes) for plan in plans] == [True, False, False]


def test_only_the_stage_with_the_head_has_room_for_logits():
    for plan in stages([1, 1, 1], 3, weights=GPU):
        pools = {pool.name for pool in plan.pools}
        assert ({"logits", "head input"} <= pools) == plan.has_head
        assert bool({"logits", "head input"} & pools) == plan.has_head


def test_a_stage_has_the_kv_cache_of_its_own_layers():
    plans = stages([2, 1, 3], 3, kv_cache=CPU)
    whole = tiny_plan(config=tiny_config(num_hidden_layers=6), kv_cache=CPU)

    def room(plan: Plan) -> int:
        return sum(pool.num_bytes for pool in plan.pools if pool.name == "KV cache")

    assert [room(plan) * 6 for plan in plans] == [room(whole) * count for count in (2, 1, 3)]


@given(count=st.integers(0, 40), num_blocks=st.integers(1, 9))
def test_blocks_share_the_micro_batches_evenly_and_in_order(count, num_blocks):
    blocks = block_ranges(count, num_blocks)
    assert list(chain.from_iterable(blocks)) == list(range(count))
    sizes = [len(block) for block in blocks]
    assert len(sizes) == num_blocks
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_several_blocks_in_flight_are_as_many_more_places():
    needs = [Need(9, 6)] * 20
    config = tiny_config()
    for num_blocks in (1, 3):
        plan = tiny_plan(
            config=config,
            needs=needs,
            micro_batch_size=2,
            num_micro_batches=2,
            pipeline=Pipeline.whole(config.num_layers, num_blocks=num_blocks),
        )
        assert len(plan.micro_batches) == 2 * num_blocks
        assert [len(block) for block in plan.blocks] == [2] * num_blocks


def test_rows_are_put_in_order_for_messages_only_where_their_homes_differ():
    one, two = Shares(cpu=1), Shares(cpu=0.5, disk=0.5)
    for kv_cache, reorders in ((one, False), (two, True)):
        for plan in stages([1, 1], 2, kv_cache=kv_cache, micro_batch_size=4):
            assert plan.reorders_messages == reorders
            assert any(pool.name == "messages" for pool in plan.pools) == reorders
    assert not tiny_plan(kv_cache=two, micro_batch_size=4).reorders_messages


def test_a_head_elsewhere_comes_in_slices_on_the_last_stage_alone():
    config = tiny_config(num_hidden_layers=2, vocab_size=2000)
    pipeline = Pipeline(layers=(1, 1), num_stages=2)
    plans = [
        tiny_plan(config=config, pipeline=pipeline, rank=rank, weights=CPU, tier=Tier.GPU)
        for rank in range(2)
    ]
    assert [plan.num_head_layers > 1 for plan in plans] == [False, True]
