"""What the shards of a stage sum: when, in which order, and what waits for it."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexpipe.model.config import Shard, shard_config
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Shares, percent_shares
from flexpipe.schedule.check import Graph, edge_kinds, find_hazards, without_edges
from flexpipe.schedule.op import Kind, Op, Pool, Segment
from flexpipe.schedule.rendezvous import size_of
from tests.schedule.plans import ops_of, plans, step_of, steps_for, tiny_config, tiny_plan

EVERYWHERE = {
    **percent_shares([20, 40, 50, 50, 50, 0]),
    "micro_batch_size": 2,
    "num_micro_batches": 4,
    "cpu_attention": True,
}


ON_DEVICE = Shares(gpu=1.0, cpu=0.0)


def shard_plan(index: int = 0, size: int = 2, **knobs: object) -> Plan:
    return tiny_plan(config=shard_config(tiny_config(), Shard(index, size)), **knobs)


@settings(max_examples=80)
@given(data=st.data())
def test_no_shard_has_a_hazard(data):
    plan = data.draw(plans(num_shards=2))
    assert find_hazards(ops_of(plan, data.draw(steps_for(plan)))) == []


@settings(max_examples=80)
@given(data=st.data())
def test_every_single_edge_of_a_shard_is_needed(data):
    plan = data.draw(plans(strategy="event", num_shards=2))
    ops = ops_of(plan, data.draw(steps_for(plan)))
    edges = [(op, wait) for op in ops for wait in op.waits_for]
    assume(edges)
    op, wait = data.draw(st.sampled_from(edges))
    kept = tuple(other for other in op.waits_for if other != wait)
    mutant = [op._replace(waits_for=kept) if other is op else other for other in ops]
    assert find_hazards(mutant), f"{op} need not wait for {wait}"


def test_every_kind_of_edge_around_sums_is_missed_when_it_is_dropped():
    ops = ops_of(plan := shard_plan(**EVERYWHERE), [step_of(plan)] * 3)
    kinds = [why for why in edge_kinds(ops) if "partial" in why or "order" in why]
    assert {"produced:partial_slot", "freed:partial_slot", "order:reduce"} <= set(kinds)
    for why in kinds:
        assert find_hazards(without_edges(ops, why)), why


def sums(ops: list[Op]) -> list[tuple[str, int]]:
    return [size_of(op) for op in ops if op.kind == Kind.ALL_REDUCE]


ELSEWHERE = [[20, 40, 50, 50, 50, 0], [100, 0, 0, 0, 0, 100], [0, 0, 100, 0, 100, 0]]


@settings(max_examples=20)
@given(data=st.data(), separate=st.booleans(), vocab_size=st.sampled_from([320, 1000]))
def test_all_shards_make_the_same_sums_in_the_same_order(data, separate, vocab_size):
    """Also where their tensors rest on other tiers and the head comes in other slices."""
    config = tiny_config(vocab_size=vocab_size)
    each = [
        tiny_plan(
            {**EVERYWHERE, **percent_shares(percent), "separate_layers": separate},
            config=shard_config(config, Shard(index % 2, 2)),
        )
        for index, percent in enumerate(ELSEWHERE)
    ]
    steps = data.draw(steps_for(each[0]))
    first, *others = (sums(ops_of(plan, steps)) for plan in each)
    assert all(other == first for other in others)


def test_a_layer_of_a_shard_is_two_parts_and_two_sums():
    plan = shard_plan(micro_batch_size=7, kv_cache=ON_DEVICE, hidden=ON_DEVICE)
    ops = [op for op in ops_of(plan, [step_of(plan)]) if op.layer == 2 and op.batch is not None]
    assert [(op.kind, op.segment) for op in ops] == [
        (Kind.COMPUTE, Segment.ATTENTION),
        (Kind.ALL_REDUCE, None),
        (Kind.COMPUTE, Segment.MLP),
        (Kind.ALL_REDUCE, None),
    ]


def test_a_sum_holds_back_its_own_micro_batch_and_no_other():
    plan = shard_plan(micro_batch_size=2, num_micro_batches=2)
    ops = ops_of(plan, [step_of(plan)])
    graph = Graph(ops)
    total = next(op for op in ops if op.kind == Kind.ALL_REDUCE and op.layer == 1 and op.mb == 0)
    mlp, other = (
        next(op for op in ops if op.layer == 1 and (op.mb, op.segment) == (mb, segment))
        for mb, segment in ((0, Segment.MLP), (1, Segment.ATTENTION))
    )
    assert graph.must_precede(total, mlp)
    assert not graph.must_precede(total, other)


@pytest.mark.parametrize("index", [0, 1])
def test_only_the_first_shard_samples_and_commits(index):
    plan = shard_plan(index)
    kinds = [op.kind for op in ops_of(plan, [step_of(plan)] * 2)]
    for kind in (Kind.SAMPLE, Kind.FETCH_TOKENS, Kind.COMMIT):
        assert (kind in kinds) == (index == 0)


def test_logits_are_summed_before_a_token_is_sampled():
    config = shard_config(tiny_config(vocab_size=1000), Shard(0, 2))
    plan = tiny_plan(config=config, weights=Shares(gpu=0.0, cpu=1.0))
    assert plan.num_head_layers > 1
    ops = ops_of(plan, [step_of(plan)])
    graph = Graph(ops)
    (total,) = (op for op in ops if op.kind == Kind.ALL_REDUCE and op.writes[0][0] == Pool.LOGITS)
    sample = next(op for op in ops if op.kind == Kind.SAMPLE)
    heads = [op for op in ops if op.kind == Kind.COMPUTE and op.layer >= total.layer - 1]
    assert graph.must_precede(total, sample)
    assert all(graph.must_precede(head, total) for head in heads)
