"""What stages hand each other: when it is sent, received, and what waits for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.policy import STRATEGIES
from flexpipe.schedule.check import Graph, edge_kinds, find_hazards, without_edges
from flexpipe.schedule.op import MESSAGE_LANES, Kind, Lane, Op
from tests.schedule.plans import ops_of, steps_for
from tests.schedule.ring import Shape, full_steps, random_steps, ranks_of, shapes

PERCENTS = st.sampled_from(
    [
        (100, 0, 100, 0, 100, 0),
        (0, 100, 0, 100, 0, 100),
        (0, 0, 0, 0, 0, 0),
        (0, 50, 50, 0, 50, 50),
    ]
)


@st.composite
def one_rank(draw: st.DrawFn, **changes: str) -> list[Op]:
    """A stage of any pipeline, at any steps."""
    shape = replace(draw(shapes(most_stages=4, percents=PERCENTS)), **changes)
    try:
        plan = draw(st.sampled_from(shape.plans))
    except PolicyError:  # few micro-batches leave a share empty
        assume(False)
    return ops_of(plan, draw(steps_for(plan, most=3 * shape.num_blocks)))


@settings(max_examples=120)
@given(ops=one_rank())
def test_no_stage_of_a_pipeline_has_a_hazard(ops):
    assert find_hazards(ops) == []


@pytest.mark.parametrize("percent", [(100, 0, 100, 0, 0, 100), (100, 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_hidden_that_comes_round_the_ring_finds_a_slot_that_nobody_uses(num_blocks, percent):
    """It comes to the first rank amid another block's visit, several micro-batches in a row."""
    shape = Shape(
        num_stages=2, num_blocks=num_blocks, num_micro_batches=4, num_chunks=2, percent=percent
    )
    for ops in ranks_of(shape, full_steps(shape, 3 * num_blocks)):
        assert find_hazards(ops) == []


@settings(max_examples=100)
@given(ops=one_rank(strategy="event"), data=st.data())
def test_every_single_edge_of_a_stage_is_needed(ops, data):
    edges = [(op, wait) for op in ops for wait in op.waits_for]
    assume(edges)
    op, wait = data.draw(st.sampled_from(edges))
    kept = tuple(other for other in op.waits_for if other != wait)
    mutant = [op._replace(waits_for=kept) if other is op else other for other in ops]
    assert find_hazards(mutant), f"{op} need not wait for {wait}"


@pytest.mark.parametrize("async_comm", [True, False])
def test_every_kind_of_edge_around_messages_is_missed_when_it_is_dropped(async_comm):
    shape = Shape(num_chunks=2, async_comm=async_comm, percent=(100, 0, 100, 0, 0, 100))
    found: set[str] = set()
    for ops in ranks_of(shape, full_steps(shape, 12)):
        kinds = [why for why in edge_kinds(ops) if "hidden" in why or "order" in why]
        for why in kinds:
            assert find_hazards(without_edges(ops, why)), why
        found |= set(kinds)
    assert any(why.startswith("order:") for why in found)
    assert {"freed:hidden_slot", "produced:hidden_slot"} <= found


def test_one_stage_alone_has_no_messages():
    shape = Shape(num_stages=1, num_blocks=2)
    (ops,) = ranks_of(shape, full_steps(shape, 6))
    assert not [op for op in ops if op.lane in MESSAGE_LANES]
    assert sum(op.kind == Kind.COMMIT for op in ops) == 6


@settings(max_examples=40)
@given(shape=shapes(most_stages=4), seed=st.integers(0, 10**6))
def test_every_micro_batch_of_a_step_is_committed_once_on_the_first_rank_alone(shape, seed):
    steps = random_steps(shape, 3 * shape.num_blocks, seed)
    ranks = ranks_of(shape, steps)
    commits = [(op.step, op.mb) for op in ranks[0] if op.kind == Kind.COMMIT]
    formed = [(index, batch.index) for index, step in enumerate(steps) for batch in step]
    assert sorted(commits) == formed
    assert not [op for ops in ranks[1:] for op in ops if op.kind == Kind.COMMIT]


@settings(max_examples=40)
@given(shape=shapes(most_stages=4), seed=st.integers(0, 10**6))
def test_the_last_stage_returns_one_message_of_tokens_per_step_with_rows(shape, seed):
    assume(shape.num_stages > 1)
    steps = random_steps(shape, 3 * shape.num_blocks, seed)
    ranks = ranks_of(shape, steps)
    expected = [(index, step) for index, step in enumerate(steps) if step]
    for ops, kind in ((ranks[-1], Kind.SEND_TOKENS), (ranks[0], Kind.RECEIVE_TOKENS)):
        assert [(op.step, op.batches) for op in ops if op.kind == kind] == expected


def test_receiving_the_next_hidden_overlaps_computing_this_one():
    shape = Shape(num_stages=3, num_blocks=1, num_micro_batches=2)
    ops = ranks_of(shape, full_steps(shape, 1))[1]
    graph = Graph(ops)
    second = next(op for op in ops if op.kind == Kind.RECEIVE_HIDDEN and op.mb == 1)
    first = [op for op in ops if op.mb == 0 and op.kind in (Kind.COMPUTE, Kind.SEND_HIDDEN)]
    assert not any(graph.must_precede(op, second) for op in first)


def test_without_asynchrony_a_rank_has_one_message_at_a_time():
    shape = Shape(num_stages=3, num_blocks=3, num_chunks=2, async_comm=False)
    for ops in ranks_of(shape, full_steps(shape, 9)):
        graph = Graph(ops)
        messages = [op for op in ops if op.lane in MESSAGE_LANES]
        for one, other in pairwise(messages):
            assert graph.must_precede(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_event_lets_a_block_go_on_before_the_round_is_back(strategy):
    """The others drain: no compute of a round precedes a token of the round before."""
    shape = Shape(num_stages=2, num_blocks=4, strategy=strategy)
    ops = ranks_of(shape, full_steps(shape, 8))[0]
    graph = Graph(ops)
    last = next(op for op in ops if op.kind == Kind.RECEIVE_TOKENS and op.step == 3)
    again = next(op for op in ops if op.kind == Kind.COMPUTE and op.step == 4)
    assert graph.must_precede(last, again) == (strategy != "event")


def test_a_blocks_next_step_waits_for_its_own_tokens():
    shape = Shape(num_stages=2, num_blocks=4)
    ops = ranks_of(shape, full_steps(shape, 8))[0]
    graph = Graph(ops)
    own = next(op for op in ops if op.kind == Kind.RECEIVE_TOKENS and op.step == 0)
    again = next(op for op in ops if op.kind == Kind.COMPUTE and op.step == 4)
    assert graph.must_precede(own, again)


def test_the_first_rank_receives_before_it_sends_what_others_could_not_take_in():
    shape = Shape(num_stages=4, num_blocks=8)
    ops = ranks_of(shape, full_steps(shape, 16))[0]
    order = [op for op in ops if op.lane in MESSAGE_LANES]
    for receive in (op for op in order if op.lane == Lane.RECEIVE):
        sent = [op.step for op in order[: order.index(receive)] if op.lane == Lane.SEND]
        assert max(sent) - receive.step <= shape.num_stages - 2


def test_with_virtual_stages_weights_are_loaded_in_the_order_of_the_visits():
    """Also where blocks have ended and their visits have no rows."""
    shape = Shape(num_stages=2, num_blocks=3, num_chunks=2, percent=(0, 0, 100, 0, 100, 0))
    for seed in range(20):
        for ops in ranks_of(shape, random_steps(shape, 12, seed)):
            in_slot: dict[int, int] = {}
            for op in ops:
                if op.kind == Kind.LOAD_WEIGHT:
                    in_slot[op.weight_slot] = op.layer
                elif op.kind == Kind.COMPUTE and op.weight_slot is not None:
                    assert in_slot[op.weight_slot] == op.layer
