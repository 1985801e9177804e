"""Messages of all ranks meet, under NCCL's rules and Gloo's; seeded mistakes are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.plan.policy import STRATEGIES
from flexpipe.schedule.op import MESSAGE_LANES, Kind, Lane, Op, Wait
from flexpipe.schedule.rendezvous import Rules, find_problems, one_for_all
from tests.schedule.ring import Shape, full_steps, random_steps, ranks_of, shapes

RUN_AHEADS = (1, 7, 512)


def check(shape: Shape, num_steps: int, seed: int) -> None:
    """Whatever the rules, and however far ahead ops are taken."""
    ranks = ranks_of(shape, random_steps(shape, num_steps, seed))
    for rules, run_ahead in product(Rules, RUN_AHEADS):
        found = find_problems(ranks, rules=rules, run_ahead=run_ahead)
        assert not found, f"{shape}, seed {seed}, {rules}, {run_ahead} ahead: {found[0]}"


@settings(max_examples=60)
@given(shape=shapes(), data=st.data())
def test_messages_of_any_pipeline_and_sequence_of_steps_meet(shape, data):
    num_steps = data.draw(st.integers(1, 4 * shape.num_blocks))
    check(shape, num_steps, data.draw(st.integers(0, 10**6)))


@pytest.mark.parametrize("async_comm", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_messages_of_two_stages_meet_from_the_first_round_on(strategy, async_comm, num_blocks):
    for num_chunks, num_rounds in product((1, 2), (1, 2, 3)):
        shape = Shape(
            num_stages=2,
            num_blocks=num_blocks,
            num_chunks=num_chunks,
            strategy=strategy,
            async_comm=async_comm,
        )
        ranks = ranks_of(shape, full_steps(shape, num_rounds * num_blocks))
        for rules in Rules:
            assert find_problems(ranks, rules=rules) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_messages_of_every_pipeline_meet(num_stages):
    """Some steps of every shape up to eight stages, and every length of a job."""
    chunks = (1, 2) if num_stages > 1 else (1,)
    blocks = range(1, 2 * num_stages + 1)
    for num_blocks, num_batches, num_chunks, strategy, async_comm in product(
        blocks, (1, 3), chunks, STRATEGIES, (True, False)
    ):
        shape = Shape(
            num_stages=num_stages,
            num_blocks=num_blocks,
            num_micro_batches=num_batches,
            num_chunks=num_chunks,
            strategy=strategy,
            async_comm=async_comm,
        )
        for seed in range(3):
            check(shape, 1 + (7 * seed + num_blocks) % (3 * num_blocks), seed)


@given(shape=shapes(most_stages=4), seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_without_asynchrony_one_communicator_serves_all_edges(shape, seed):
    shape = replace(shape, async_comm=False)
    ranks = ranks_of(shape, random_steps(shape, 3 * shape.num_blocks, seed))
    assert find_problems(ranks, rules=Rules.NCCL, communicator=one_for_all) == []


def test_with_asynchrony_one_communicator_for_all_edges_is_refused():
    """Nothing says whether a rank posts its receive or its send first."""
    shape = Shape(num_stages=3, num_blocks=3)
    found = find_problems(
        ranks_of(shape, full_steps(shape, 9)), rules=Rules.NCCL, communicator=one_for_all
    )
    assert {problem.rank for problem in found} >= {1, 2}
    assert "may overtake" in str(found[0])


# -- seeded mistakes ------------------------------------------------------------------------------

BLOCKING = Shape(num_stages=4, num_blocks=8, async_comm=False)


def reordered(ops: Sequence[Op]) -> list[Op]:
    """The same ops with the order of messages that the list has."""
    made: list[Op] = []
    last: int | None = None
    for op in ops:
        waits = tuple(wait for wait in op.waits_for if not wait.why.startswith("order:"))
        if op.lane in MESSAGE_LANES:
            if last is not None:
                waits = (*waits, Wait(last, "order:comm"))
            last = op.id
        made.append(replace(op, waits_for=waits))
    return made


def sends_first(ops: Sequence[Op]) -> list[Op]:
    """Every message that comes back, and its COMMIT, behind the sends that follow it."""
    made, held = list[Op](), list[Op]()
    for op in ops:
        if op.kind in (Kind.RECEIVE_TOKENS, Kind.COMMIT):
            held.append(op)
            continue
        made.append(op)
        if op.lane == Lane.SEND:
            made += held
            held = []
    return reordered([*made, *held])


def test_everyone_sending_first_without_asynchrony_is_a_deadlock_of_all_ranks():
    ranks = ranks_of(BLOCKING, full_steps(BLOCKING, 16))
    ranks[0] = sends_first(ranks[0])
    found = find_problems(ranks, rules=Rules.NCCL)
    assert {problem.rank for problem in found} == {0, 1, 2, 3}
    assert all(problem.op.lane == Lane.SEND for problem in found)
    assert str(found[0]).startswith("rank 0: send_hidden (step 3,")
    assert str(found[0]).endswith("waits forever")


def test_what_deadlocks_where_sends_block_may_pass_where_they_do_not():
    ranks = ranks_of(BLOCKING, full_steps(BLOCKING, 16))
    ranks[0] = sends_first(ranks[0])
    assert find_problems(ranks, rules=Rules.GLOO) == []


@pytest.mark.parametrize("rank", [1, 2])
def test_a_swapped_pair_of_messages_of_different_sizes_is_found(rank):
    steps = [*full_steps(BLOCKING, 16)]
    longer = [replace(row, tokens=(1, 2, 3)) for row in steps[4][0].rows]
    steps[4] = (replace(steps[4][0], rows=tuple(longer)),)
    ranks = ranks_of(BLOCKING, steps)
    ops = ranks[rank]
    one, other = (
        next(i for i, op in enumerate(ops) if op.kind == Kind.RECEIVE_HIDDEN and op.step == step)
        for step in (4, 5)
    )
    ops[one], ops[other] = ops[other], ops[one]
    found = find_problems(ranks, rules=Rules.GLOO)
    assert {problem.rank for problem in found} == {rank}
    assert any(problem.what == "meets 3 of hidden" for problem in found)


def test_a_rank_that_receives_before_it_sends_what_the_last_one_waits_for_is_found():
    """On the last rank the next hidden comes behind the tokens; not the other way round."""
    ranks = ranks_of(BLOCKING, full_steps(BLOCKING, 16))
    made, held = list[Op](), list[Op]()
    for op in ranks[3]:
        (held if op.kind == Kind.SEND_TOKENS else made).append(op)
    ranks[3] = reordered([*made, *held])
    found = find_problems(ranks, rules=Rules.NCCL)
    assert {problem.rank for problem in found} == {0, 1, 2, 3}


def _without(op: Op, other: Op) -> Op:
    return replace(op, waits_for=tuple(wait for wait in op.waits_for if wait.op != other.id))


@pytest.mark.parametrize("rules", Rules)
@pytest.mark.parametrize("kind", [Kind.SEND_HIDDEN, Kind.RECEIVE_TOKENS])
def test_a_message_too_few_is_found(rules, kind):
    ranks = ranks_of(BLOCKING, full_steps(BLOCKING, 16))
    lacking = next(op for op in reversed(ranks[0]) if op.kind == kind)
    ranks[0] = reordered([_without(op, lacking) for op in ranks[0] if op is not lacking])
    found = find_problems(ranks, rules=rules)
    assert [problem.what for problem in found] == ["has no other end"]


def test_a_wait_that_crosses_ranks_in_a_circle_is_found_under_gloo_too():
    """A stage that asks for the next hidden before it hands on this one, with one block."""
    shape = Shape(num_stages=3, num_blocks=1, async_comm=False)
    ranks = ranks_of(shape, full_steps(shape, 4))
    held: list[Op] = []
    made: list[Op] = []
    for op in ranks[1]:
        if op.kind == Kind.SEND_HIDDEN:
            held.append(op)
            continue
        made.append(op)
        if op.kind == Kind.RECEIVE_HIDDEN:
            made += held
            held = []
    ranks[1] = reordered([*made, *held])
    for rules in Rules:
        assert {problem.rank for problem in find_problems(ranks, rules=rules)} == {0, 1, 2}
