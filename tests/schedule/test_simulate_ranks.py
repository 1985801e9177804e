"""Ranks simulated together: messages couple them, rank 0 tells the steps; and the bubble."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.schedule.build import schedule
from flexpipe.schedule.op import Kind, Lane, Op
from flexpipe.schedule.relay import Relay
from flexpipe.schedule.simulate import Cost, RankOps, Simulated, simulate_ranks
from flexpipe.schedule.step import MicroBatch, Row
from tests.schedule.play import PLAIN, Script, op
from tests.schedule.ring import Shape

LAYER_S = 1.0


def play_ranks(ranks: Sequence[Sequence[tuple[Op, float]]]) -> list[dict[int, tuple[float, float]]]:
    """A few ops of each rank; start and end of each. The job is over when rank 0 has committed."""
    known = [{one.id: seconds for one, seconds in ops} for ops in ranks]
    committed: list[MicroBatch] = []

    def ops_of(rank: int) -> Iterator[Op | None]:
        yield from (one for one, _ in ranks[rank])
        while not committed:
            yield None

    parts = [
        RankOps(
            ops=ops_of(rank),
            cost_of=lambda one, costs=known[rank]: Cost(costs[one.id]),
            pace=PLAIN,
        )
        for rank in range(len(ranks))
    ]
    made = simulate_ranks(
        parts, on_commit=lambda batch, now_s: committed.append(batch), keep_spans=True
    )
    return [{span.op.id: (span.start_s, span.end_s) for span in one.spans} for one in made]


def test_a_message_moves_once_both_sides_have_come_to_it():
    first, second = play_ranks(
        [
            [
                (op(0, Kind.COMPUTE), 2.0),
                (op(1, Kind.SEND_HIDDEN, 0), 0.5),
                (op(2, Kind.RECEIVE_TOKENS), 0.25),
                (op(3, Kind.COMMIT, 2), 1.0),
            ],
            [
                (op(0, Kind.RECEIVE_HIDDEN), 0.5),
                (op(1, Kind.COMPUTE, 0), 3.0),
                (op(2, Kind.SEND_TOKENS, 1), 0.25),
            ],
        ]
    )
    assert first[1] == (2.0, 2.5)
    assert second[0] == (0.0, 2.5)  # there from the start, and kept waiting
    assert second[2] == (5.5, 5.75)
    assert first[2] == (0.0, 5.75)


def test_a_send_is_held_until_its_receiver_is_there():
    first, second = play_ranks(
        [
            [
                (op(0, Kind.SEND_HIDDEN), 0.5),
                (op(1, Kind.COMPUTE, 0), 1.0),
                (op(2, Kind.COMMIT, 1), 1.0),
            ],
            [(op(0, Kind.COMPUTE), 4.0), (op(1, Kind.RECEIVE_HIDDEN, 0), 0.5)],
        ]
    )
    assert first[0] == (0.0, 4.5)
    assert first[1] == (4.5, 5.5)
    assert second[1] == (4.0, 4.5)


def test_the_nth_message_sent_is_the_nth_received():
    first, second = play_ranks(
        [
            [
                (op(0, Kind.SEND_HIDDEN), 1.0),
                (op(1, Kind.SEND_HIDDEN, 0), 2.0),
                (op(2, Kind.COMMIT, 1), 1.0),
            ],
            [(op(0, Kind.RECEIVE_HIDDEN), 1.0), (op(1, Kind.RECEIVE_HIDDEN, 0), 2.0)],
        ]
    )
    assert first == {0: (0.0, 1.0), 1: (1.0, 3.0), 2: (3.0, 4.0)}
    assert second == {0: (0.0, 1.0), 1: (1.0, 3.0)}


def test_an_op_that_is_ready_later_and_was_issued_first_goes_first():
    (first,) = play_ranks(
        [
            [
                (op(0, Kind.LOAD_WEIGHT), 1.0),
                (op(1, Kind.COMPUTE, 0), 1.0),
                (op(2, Kind.COMPUTE), 2.0),
                (op(3, Kind.COMPUTE), 4.0),
                (op(4, Kind.COMMIT, 1, 2, 3), 0.0),
            ]
        ]
    )
    assert first[2] == (0.0, 2.0)
    assert first[1] == (2.0, 3.0)
    assert first[3] == (3.0, 7.0)


def test_ranks_that_wait_for_each_other_are_a_bug_and_said_to_be():
    with pytest.raises(AssertionError, match="every rank waits"):
        play_ranks(
            [
                [(op(0, Kind.RECEIVE_TOKENS), 1.0), (op(1, Kind.SEND_HIDDEN, 0), 1.0)],
                [(op(0, Kind.RECEIVE_HIDDEN), 1.0), (op(1, Kind.SEND_TOKENS, 0), 1.0)],
            ]
        )


# -- whole schedules ------------------------------------------------------------------------------


def play_shape(
    shape: Shape, num_rounds: int, seconds: Mapping[Kind, float] | None = None
) -> list[Simulated]:
    """Every block's step in every round, a token for each row. A decoder layer takes a second, all
    else nothing, or what `seconds` say."""
    plans = shape.plans
    script = Script(
        [
            tuple(MicroBatch(mb, _rows(plans[0].micro_batches[mb].num_places)) for mb in block)
            for _ in range(num_rounds)
            for block in plans[0].blocks
        ],
        shape.num_blocks,
    )
    relay = Relay(script.steps, len(plans))

    def cost_of(plan):
        def cost(one: Op) -> Cost:
            is_layer = one.kind == Kind.COMPUTE and plan.layers[one.layer].layer is not None
            return Cost(LAYER_S if is_layer else (seconds or {}).get(one.kind, 0.0))

        return cost

    parts = [
        RankOps(ops=schedule(plan, steps), cost_of=cost_of(plan), pace=PLAIN)
        for plan, steps in zip(plans, relay.steps, strict=True)
    ]
    return simulate_ranks(parts, on_commit=script.commit, keep_spans=True)


def _rows(count: int) -> tuple[Row, ...]:
    return tuple(Row(place, place, 8, (3,), True) for place in range(count))


@pytest.mark.parametrize("strategy", ["none", "single", "multi"])
@pytest.mark.parametrize(("num_stages", "times"), [(2, 1), (2, 4), (4, 1), (4, 2), (4, 4)])
def test_rounds_that_drain_idle_as_the_formula_says(strategy, num_stages, times):
    num_blocks = num_stages * times
    shape = Shape(num_stages=num_stages, num_blocks=num_blocks, strategy=strategy)
    expected = (num_stages - 1) / (num_stages - 1 + num_blocks)
    for stage in play_shape(shape, num_rounds=3):
        assert stage.bubble == pytest.approx(expected)


@pytest.mark.parametrize(("num_stages", "times"), [(2, 1), (3, 1), (4, 1), (4, 2), (8, 1)])
def test_under_event_equal_stages_idle_while_they_fill_and_drain_and_no_more(num_stages, times):
    num_rounds, num_blocks = 6, num_stages * times
    shape = Shape(num_stages=num_stages, num_blocks=num_blocks)
    busy = num_rounds * num_blocks
    for stage in play_shape(shape, num_rounds):
        assert stage.active_s == busy
        assert stage.seconds == busy + num_stages - 1


def test_several_micro_batches_of_a_block_fill_the_pipe_in_smaller_portions():
    shape = Shape(num_stages=4, num_blocks=4, num_micro_batches=3)
    for stage in play_shape(shape, num_rounds=4):
        assert stage.active_s == 4 * 4 * 3
        assert stage.seconds == 4 * 4 * 3 + 3


@pytest.mark.parametrize("num_chunks", [2, 3])
def test_virtual_stages_fill_and_drain_in_smaller_portions(num_chunks):
    """As much work per rank, in as many chunks: filling takes a chunk's part per stage."""
    shape = Shape(num_stages=4, num_blocks=4, num_chunks=num_chunks)
    for stage in play_shape(shape, num_rounds=3):
        assert stage.active_s == 3 * 4 * num_chunks
        assert stage.seconds == 3 * 4 * num_chunks + 3


def test_fewer_blocks_than_stages_leave_stages_idle():
    shape = Shape(num_stages=4, num_blocks=2)
    for stage in play_shape(shape, num_rounds=20):
        assert stage.bubble == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("async_comm", [True, False])
def test_messages_are_hidden_behind_layers_only_where_they_overlap(async_comm):
    shape = Shape(num_stages=2, num_blocks=4, num_micro_batches=2, async_comm=async_comm)
    seconds = {Kind.SEND_HIDDEN: 0.5, Kind.RECEIVE_HIDDEN: 0.5}
    second = play_shape(shape, 4, seconds)[1]
    assert second.active_s == 4 * 4 * 2
    if async_comm:
        assert second.seconds <= 4 * 4 * 2 + 2
    assert second.seconds >= 4 * 4 * 2 + 1.5  # a stage of the first, and its message


@given(
    seconds=st.fixed_dictionaries(
        dict.fromkeys(
            [Kind.SEND_HIDDEN, Kind.SEND_TOKENS, Kind.COMPUTE, Kind.SAMPLE, Kind.COMMIT],
            st.sampled_from([0.0, 0.25, 1.0]),
        )
    ),
    num_stages=st.integers(2, 4),
    num_blocks=st.integers(1, 5),
    strategy=st.sampled_from(["none", "event"]),
)
@settings(max_examples=25)
def test_every_message_ends_on_both_sides_at_once_and_lanes_do_one_op_at_a_time(
    seconds, num_stages, num_blocks, strategy
):
    both = {
        **seconds,
        Kind.RECEIVE_HIDDEN: seconds[Kind.SEND_HIDDEN],
        Kind.RECEIVE_TOKENS: seconds[Kind.SEND_TOKENS],
    }
    shape = Shape(num_stages=num_stages, num_blocks=num_blocks, strategy=strategy)
    made = play_shape(shape, 2, both)
    for rank, one in enumerate(made):
        lanes = defaultdict(list)
        for span in one.spans:
            lanes[span.op.lane].append((span.start_s, span.end_s))
        for spans in lanes.values():
            for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
                assert end <= start + 1e-9
        after = made[(rank + 1) % num_stages]
        sent, received = (
            [span.end_s for span in stage.spans if span.op.lane == lane]
            for stage, lane in ((one, Lane.SEND), (after, Lane.RECEIVE))
        )
        both_ended = min(len(sent), len(received))  # the job is over with rank 0's last commit
        assert both_ended >= len(sent) - 1 >= 0
        assert sent[:both_ended] == pytest.approx(received[:both_ended])
