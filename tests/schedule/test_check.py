"""The checker finds no hazard in what the builder makes, and every hazard in what a mutant does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexpipe.plan.policy import STRATEGIES, percent_shares
from flexpipe.plan.tier import Tier
from flexpipe.schedule.check import Graph, Hazard, edge_kinds, find_hazards, without_edges
from flexpipe.schedule.op import Kind, Op, Pool, Wait
from tests.schedule.plans import EDGE_KINDS, ops_of, plans, step_of, steps_for, tiny_plan

EVERYWHERE = percent_shares([20, 40, 30, 30, 30, 30])


def event_ops() -> list[Op]:
    plan = tiny_plan(EVERYWHERE, micro_batch_size=2, num_micro_batches=4)
    return ops_of(plan, [step_of(plan)] * 3)


@settings(max_examples=80)
@given(data=st.data())
def test_any_plan_strategy_and_sequence_of_steps_is_without_hazard(data):
    plan = data.draw(plans())
    assert find_hazards(ops_of(plan, data.draw(steps_for(plan)))) == []


@pytest.mark.slow
@settings(max_examples=4000)
@given(data=st.data())
def test_thousands_of_schedules_are_without_hazard(data):
    plan = data.draw(plans())
    assert find_hazards(ops_of(plan, data.draw(steps_for(plan, most=8)))) == []


@settings(max_examples=60)
@given(data=st.data())
def test_every_kind_of_edge_that_is_dropped_is_missed(data):
    plan = data.draw(plans(strategy="event"))
    ops = ops_of(plan, data.draw(steps_for(plan)))
    for why in edge_kinds(ops):
        assert find_hazards(without_edges(ops, why)), why


@settings(max_examples=60)
@given(data=st.data())
def test_every_single_edge_that_is_dropped_is_missed(data):
    """The schedule has no edge too many: each one is needed by itself."""
    plan = data.draw(plans(strategy="event"))
    ops = ops_of(plan, data.draw(steps_for(plan)))
    edges = [(op, wait) for op in ops for wait in op.waits_for]
    assume(edges)
    op, wait = data.draw(st.sampled_from(edges))
    kept = tuple(other for other in op.waits_for if other != wait)
    mutant = [op._replace(waits_for=kept) if other is op else other for other in ops]
    assert find_hazards(mutant), f"{op} need not wait for {wait}"


@settings(max_examples=60)
@given(data=st.data())
def test_the_kinds_of_edges_are_those_that_are_proven_to_be_needed(data):
    """What the mutation proof drops, on ops and in real runs, is all there is."""
    plan = data.draw(plans(strategy="event"))
    ops = ops_of(plan, data.draw(steps_for(plan)))
    assert set(edge_kinds(ops)) <= EDGE_KINDS[plan.device_tier]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tier", [Tier.GPU, Tier.CPU])
def test_a_long_run_is_without_hazard(strategy, tier):
    """Longer than the window within which edges are reduced."""
    percent = [20, 40, 30, 30, 30, 30] if tier == Tier.GPU else [0, 50, 0, 50, 0, 50]
    plan = tiny_plan(
        percent_shares(percent),
        tier=tier,
        micro_batch_size=2,
        num_micro_batches=4,
        strategy=strategy,
    )
    ops = ops_of(plan, [step_of(plan)] * 40)
    assert len(ops) > 2000
    assert find_hazards(ops) == []


def problems(ops: Sequence[Op]) -> set[str]:
    return {hazard.problem for hazard in find_hazards(ops)}


def test_an_op_that_waits_for_a_later_one_is_found():
    ops = event_ops()
    ops[3] = ops[3]._replace(waits_for=(*ops[3].waits_for, Wait(ops[9].id, "produced:kv")))
    assert "waits for a later op" in problems(ops)


def test_two_ops_that_changed_places_are_found():
    ops = event_ops()
    load = next(index for index, op in enumerate(ops) if op.kind == Kind.LOAD_WEIGHT)
    compute = next(
        index
        for index, op in enumerate(ops)
        if op.kind == Kind.COMPUTE and op.weight_slot == ops[load].weight_slot
    )
    ops[load], ops[compute] = ops[compute], ops[load]
    assert problems(ops)


def test_a_reader_of_an_empty_slot_is_found():
    ops = event_ops()
    load = next(op for op in ops if op.kind == Kind.LOAD_WEIGHT)
    rest = [
        op._replace(waits_for=tuple(wait for wait in op.waits_for if wait.op != load.id))
        for op in ops
        if op is not load
    ]
    assert "reads a slot nobody filled" in problems(rest)


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        (Kind.LOAD_WEIGHT, Pool.WEIGHT_SLOT),
        (Kind.READ_WEIGHT, Pool.WEIGHT_STAGE),
        (Kind.LOAD_CACHE, Pool.KV_SLOT),
        (Kind.READ_CACHE, Pool.KV_READ_STAGE),
        (Kind.LOAD_HIDDEN, Pool.HIDDEN_SLOT),
    ],
)
def test_a_slot_that_holds_something_else_than_its_reader_wants_is_found(kind, pool):
    ops = event_ops()
    index, op = next((index, op) for index, op in enumerate(ops) if op.kind == kind)
    other = next(o for o in ops if o.kind == kind and (o.layer, o.mb) != (op.layer, op.mb))
    if pool == Pool.HIDDEN_SLOT:
        other = next(o for o in ops if o.kind == kind and o.mb != op.mb)
    ops[index] = op._replace(layer=other.layer, batch=other.batch)
    found = [hazard for hazard in find_hazards(ops) if hazard.resource[0] == pool]
    assert {hazard.problem for hazard in found} & {
        "holds something else than its reader wants",
        "holds something else than it works on",
    }


def test_a_load_into_the_wrong_slot_is_found():
    ops = event_ops()
    index, op = next((i, op) for i, op in enumerate(ops) if op.kind == Kind.LOAD_WEIGHT)
    assert op.weight_slot is not None
    wrong = (op.weight_slot + 1) % 2
    ops[index] = op._replace(weight_slot=wrong, writes=((Pool.WEIGHT_SLOT, wrong, 0, 0),))
    assert problems(ops)


def test_a_hazard_says_who_and_where():
    ops = event_ops()
    hazards = find_hazards(without_edges(ops, "freed:weight_slot"))
    text = str(hazards[0])
    assert "load_weight (step" in text and "compute (step" in text
    assert "weight_slot[" in text and "may be overwritten before it is read" in text
    assert isinstance(hazards[0], Hazard)


def test_must_precede_follows_edges_through_others():
    first, second, third = (Op(i, Kind.BARRIER, 0, 0, None, ()) for i in range(3))
    second = second._replace(waits_for=(Wait(0, "strategy"),))
    third = third._replace(waits_for=(Wait(1, "strategy"),))
    graph = Graph([first, second, third])
    assert graph.must_precede(first, third)
    assert not graph.must_precede(third, first)
    assert not graph.must_precede(first, first)


def test_edges_of_the_strategy_are_no_kind_of_dependency():
    plan = tiny_plan(EVERYWHERE, micro_batch_size=2, num_micro_batches=4, strategy="multi")
    ops = ops_of(plan, [step_of(plan)])
    assert "strategy" not in edge_kinds(ops)
    assert "strategy" in {wait.why for op in ops for wait in op.waits_for}


def test_without_edges_drops_one_kind_and_passes_not_yet_on():
    ops = event_ops()
    mutant = list(without_edges([None, *ops], "produced:kv_slot"))
    assert mutant[0] is None
    kept = [op for op in mutant if op is not None]
    assert edge_kinds(kept) == [why for why in edge_kinds(ops) if why != "produced:kv_slot"]
