"""Messages of all ranks meet, under NCCL's rules and Gloo's; seeded mistakes are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.plan.policy import STRATEGIES
from flexpipe.schedule.check import without_edges
from flexpipe.schedule.op import MESSAGE_LANES, Kind, Lane, Op, Pool, Wait
from flexpipe.schedule.rendezvous import Rules, find_problems, one_for_all, one_per_edge
from tests.schedule.ring import Shape, full_steps, random_steps, ranks_of, shapes

RUN_AHEADS = (1, 7, 512)


def check(shape: Shape, num_steps: int, seed: int) -> None:
    """Whatever the rules, and however far ahead ops are taken."""
    ranks = ranks_of(shape, random_steps(shape, num_steps, seed))
    for rules, run_ahead in product(Rules, RUN_AHEADS):
        found = find_problems(ranks, rules=rules, run_ahead=run_ahead, num_shards=shape.num_shards)
        assert not found, f"{shape}, seed {seed}, {rules}, {run_ahead} ahead: {found[0]}"


@settings(max_examples=60)
@given(shape=shapes(most_shards=4), data=st.data())
def test_messages_and_sums_of_any_pipeline_and_sequence_of_steps_meet(shape, data):
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


def test_sums_need_a_communicator_of_their_own():
    """Nothing says whether a rank posts its sum or its message first."""
    shape = Shape(num_stages=2, num_shards=2, num_blocks=2)
    ranks = ranks_of(shape, full_steps(shape, 6))
    for communicator, problems in ((one_per_edge, False), (one_for_all, True)):
        found = find_problems(ranks, rules=Rules.NCCL, communicator=communicator, num_shards=2)
        assert bool(found) == problems


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
        made.append(op._replace(waits_for=waits))
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
    return op._replace(waits_for=tuple(wait for wait in op.waits_for if wait.op != other.id))


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


# -- seeded mistakes in sums ----------------------------------------------------------------------

SHARDED = Shape(num_stages=2, num_shards=2, num_blocks=2, num_micro_batches=2)


def sums(ops: Sequence[Op]) -> list[int]:
    """Places of the sums over hidden, which all have the same size."""
    return [
        place
        for place, op in enumerate(ops)
        if op.kind == Kind.ALL_REDUCE and op.writes[0][0] == Pool.HIDDEN
    ]


def sharded_ranks() -> list[list[Op]]:
    return ranks_of(SHARDED, full_steps(SHARDED, 6))


@pytest.mark.parametrize("rules", Rules)
def test_shards_that_sum_two_micro_batches_in_different_order_are_found(rules):
    ranks = sharded_ranks()
    ops = ranks[3]
    first = next(one for one, other in pairwise(sums(ops)) if ops[one].mb != ops[other].mb)
    second = next(place for place in sums(ops) if place > first)
    ops[first], ops[second] = ops[second], ops[first]
    found = find_problems(ranks, rules=rules, num_shards=2)
    assert {problem.rank for problem in found} == {3}
    assert "meets 1 of hidden of micro-batch" in str(found[0])


def test_a_sum_that_nothing_orders_behind_the_one_before_is_found():
    ranks = sharded_ranks()
    ranks[1] = list(without_edges(ranks[1], "order:reduce"))
    found = find_problems(ranks, rules=Rules.NCCL, num_shards=2)
    assert {problem.rank for problem in found} == {1}
    assert all("may overtake all_reduce" in str(problem) for problem in found)


@pytest.mark.parametrize("rules", Rules)
def test_a_sum_that_a_shard_leaves_out_is_found(rules):
    ranks = sharded_ranks()
    last = sums(ranks[2])[-1]
    ranks[2] = [op for op in ranks[2] if op.id < ranks[2][last].id]
    found = find_problems(ranks, rules=rules, num_shards=2)
    assert any(problem.what == "has no other end" for problem in found)


@pytest.mark.parametrize("rules", Rules)
def test_a_shard_that_asks_for_the_next_hidden_before_its_sum_is_found(rules):
    """The other shards wait for the sum, and the next hidden for what they make of it."""
    shape = replace(SHARDED, num_blocks=1, num_micro_batches=1)
    ranks = ranks_of(shape, full_steps(shape, 4))
    place, ops = sums(ranks[2])[0], ranks[2]
    first, early, *_ = (op for op in ops if op.kind == Kind.RECEIVE_HIDDEN)
    assert first.id < ops[place].id < early.id
    before = (Wait(first.id, "order:receive"),)
    held = ops[place]._replace(waits_for=(*ops[place].waits_for, Wait(early.id, "order:comm")))
    rest = [op for op in ops[place + 1 :] if op is not early]
    ranks[2] = [*ops[:place], early._replace(waits_for=before), held, *rest]
    found = find_problems(ranks, rules=rules, num_shards=2)
    assert {problem.rank for problem in found} == {0, 1, 2, 3}
    assert all(problem.what == "waits forever" for problem in found)
