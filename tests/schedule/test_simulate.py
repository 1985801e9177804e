"""What a simulated run may claim: its bounds, its order, how ops slow each other down."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexpipe.plan.policy import STRATEGIES, Shares
from flexpipe.schedule.check import find_hazards
from flexpipe.schedule.op import Kind, Lane, Op
from flexpipe.schedule.simulate import RUN_AHEAD, Cost, Pace, simulate
from tests.schedule.plans import OF_ONE_STAGE, ops_of, plans, step_of, steps_for, tiny_plan
from tests.schedule.play import PLAIN, ROWS, op, play, play_ops

_LINKS = {
    "h2d": (Kind.LOAD_WEIGHT, Kind.LOAD_EMBED, Kind.LOAD_CACHE, Kind.LOAD_HIDDEN, Kind.MOVE_OUTPUT),
    "d2h": (Kind.STORE_CACHE, Kind.STORE_HIDDEN, Kind.MOVE_QUERY),
    "disk_read": (Kind.READ_WEIGHT, Kind.READ_EMBED, Kind.READ_CACHE, Kind.READ_HIDDEN),
    "disk_write": (Kind.WRITE_CACHE, Kind.WRITE_HIDDEN),
}
LINK_OF = {kind: link for link, kinds in _LINKS.items() for kind in kinds}
SECONDS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0, 7.0])
COSTS = st.fixed_dictionaries({kind: SECONDS for kind in OF_ONE_STAGE if kind != Kind.BARRIER})
OFF_DEVICE = {"weights": Shares(cpu=1.0), "kv_cache": Shares(cpu=1.0), "hidden": Shares(gpu=1.0)}


class PerKind:
    """Every op of a kind takes the same time; moves are on their links."""

    def __init__(self, seconds: dict[Kind, float], *, faster: float = 1.0) -> None:
        self._seconds = {**seconds, Kind.BARRIER: 0.0}
        self._faster = faster

    def __call__(self, op: Op) -> Cost:
        link = LINK_OF.get(op.kind, "")
        seconds = self._seconds[op.kind] / (self._faster if link else 1.0)
        in_flight_s = seconds / 2 if link else 0.0
        return Cost(seconds, op.kind.value, link=link, num_bytes=8, in_flight_s=in_flight_s)


# -- bounds ---------------------------------------------------------------------------------------


@given(data=st.data(), seconds=COSTS)
def test_no_run_is_shorter_than_the_work_of_its_busiest_lane_or_link(data, seconds):
    plan = data.draw(plans())
    made = play(plan, data.draw(steps_for(plan)), PerKind(seconds))
    for name, work_s in (*made.work_s.items(), *made.link_work_s.items()):
        assert made.seconds >= work_s - 1e-9, name


@given(data=st.data(), seconds=COSTS)
def test_no_run_is_longer_than_its_ops_one_after_the_other(data, seconds):
    plan = data.draw(plans())
    steps, cost_of = data.draw(steps_for(plan)), PerKind(seconds)
    everything = sum(cost_of(op).seconds for op in ops_of(plan, steps))
    assert play(plan, steps, cost_of).seconds <= everything + 1e-9


@given(data=st.data(), seconds=COSTS)
def test_without_overlap_a_run_is_its_ops_one_after_the_other(data, seconds):
    plan = data.draw(plans(strategy="none"))
    made = play(plan, data.draw(steps_for(plan)), PerKind(seconds))
    assert made.seconds == pytest.approx(sum(made.work_s.values()))


@given(data=st.data(), seconds=COSTS)
def test_every_op_that_somebody_waits_for_is_played_once_and_its_bytes_counted(data, seconds):
    plan = data.draw(plans())
    steps = data.draw(steps_for(plan))
    made = play(plan, steps, PerKind(seconds))
    played = Counter(span.op.id for span in made.spans)
    assert set(played.values()) <= {1}
    waited = {wait.op for op in ops_of(plan, steps) if op.id in played for wait in op.waits_for}
    assert waited <= played.keys()
    moved = Counter(LINK_OF[span.op.kind] for span in made.spans if span.op.kind in LINK_OF)
    assert made.link_bytes == {link: 8 * count for link, count in moved.items()}


# -- order ----------------------------------------------------------------------------------------


@given(data=st.data(), seconds=COSTS)
def test_an_op_starts_when_all_it_waits_for_has_ended(data, seconds):
    plan = data.draw(plans())
    made = play(plan, data.draw(steps_for(plan)), PerKind(seconds), Pace(hop_s=0.125))
    ends = {span.op.id: span.end_s for span in made.spans}
    for span in made.spans:
        for wait in span.op.waits_for:
            assert ends[wait.op] <= span.start_s + 1e-9


@given(data=st.data(), seconds=COSTS)
def test_a_lane_plays_one_op_at_a_time(data, seconds):
    plan = data.draw(plans())
    lanes = defaultdict(list)
    for span in play(plan, data.draw(steps_for(plan)), PerKind(seconds)).spans:
        lanes[span.op.lane].append((span.start_s, span.end_s))
    for spans in lanes.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
            assert end <= start + 1e-9


@given(data=st.data(), seconds=COSTS)
def test_the_order_that_was_played_is_a_program_without_hazards(data, seconds):
    plan = data.draw(plans())
    spans = play(plan, data.draw(steps_for(plan)), PerKind(seconds)).spans
    renamed = {span.op.id: index for index, span in enumerate(spans)}
    ordered = [
        span.op._replace(
            id=renamed[span.op.id],
            waits_for=tuple(wait._replace(op=renamed[wait.op]) for wait in span.op.waits_for),
        )
        for span in spans
    ]
    assert find_hazards(ordered) == []


# -- what makes a run longer ----------------------------------------------------------------------


@given(data=st.data(), seconds=COSTS)
def test_overlap_never_costs_time(data, seconds):
    plan = data.draw(plans(strategy="event"))
    steps = data.draw(steps_for(plan))
    chained = dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, strategy="none"))
    least = play(plan, steps, PerKind(seconds)).seconds
    assert least <= play(chained, steps, PerKind(seconds)).seconds + 1e-9


@given(seconds=COSTS, depth=st.integers(1, 3))
@settings(max_examples=50)
def test_a_strategys_barriers_only_add_time(seconds, depth):
    took = []
    for strategy in reversed(STRATEGIES):
        plan = tiny_plan(
            **OFF_DEVICE, micro_batch_size=2, num_micro_batches=3, prefetch_depth=depth,
            strategy=strategy,
        )  # fmt: skip
        took.append(play(plan, [step_of(plan)] * 3, PerKind(seconds)).seconds)
    assert took[0] <= min(took[1:]) + 1e-9
    assert took[-1] >= max(took[:-1]) - 1e-9
    assert {STRATEGIES[0], STRATEGIES[-1]} == {"none", "event"}


@given(
    seconds=COSTS, faster=st.sampled_from([1.5, 2.0, 10.0]), strategy=st.sampled_from(STRATEGIES)
)
@settings(max_examples=50)
def test_faster_links_never_make_a_run_longer(seconds, faster, strategy):
    plan = tiny_plan(**OFF_DEVICE, micro_batch_size=2, num_micro_batches=3, strategy=strategy)
    steps = [step_of(plan)] * 3
    before = play(plan, steps, PerKind(seconds)).seconds
    assert play(plan, steps, PerKind(seconds, faster=faster)).seconds <= before + 1e-9


@given(data=st.data(), seconds=COSTS)
def test_a_hop_between_lanes_only_adds_time_where_ops_are_chained(data, seconds):
    plan = data.draw(plans(strategy="none"))
    steps = data.draw(steps_for(plan))
    least = play(plan, steps, PerKind(seconds)).seconds
    assert play(plan, steps, PerKind(seconds), Pace(hop_s=0.5)).seconds >= least - 1e-9


# -- ops beside each other ------------------------------------------------------------------------


def test_two_ops_on_one_link_have_half_of_it_each():
    made, spans = play_ops(
        [
            (op(0, Kind.LOAD_WEIGHT), Cost(1.0, link="h2d", num_bytes=100)),
            (op(1, Kind.LOAD_CACHE), Cost(3.0, link="h2d", num_bytes=300)),
        ]
    )
    assert spans == {0: (0.0, 2.0), 1: (0.0, 4.0), 2: (4.0, 4.0)}
    assert made.link_bytes == {"h2d": 400}


def test_ops_on_different_links_do_not_meet():
    _, spans = play_ops(
        [
            (op(0, Kind.LOAD_WEIGHT), Cost(1.0, link="h2d")),
            (op(1, Kind.STORE_CACHE), Cost(3.0, link="d2h")),
        ]
    )
    assert (spans[0][1], spans[1][1]) == (1.0, 3.0)


def test_a_slowdown_lasts_as_long_as_both_run():
    pace = Pace(slowdown={("compute", "disk_read"): 1.5})
    _, spans = play_ops(
        [
            (op(0, Kind.READ_WEIGHT), Cost(1.0, "disk_read")),
            (op(1, Kind.COMPUTE), Cost(1.0, "compute")),
        ],
        pace,
    )
    assert spans[0] == (0.0, 1.0)  # the pair says nothing of this way
    assert spans[1] == (0.0, pytest.approx(1 + 1 / 3))  # 2/3 of it were done beside the read


@pytest.mark.parametrize(
    ("own", "others", "factor"),
    [
        (1.0, 1.0, 1.5),
        (1.0, 0.5, 1.25),  # beside an op that disturbs half of the time
        (0.5, 1.0, 1.0),  # half of its time it waits for its link, where nothing slows it
        (0.9, 1.0, 1.35),
    ],
)
def test_an_op_is_slowed_as_far_as_it_and_the_other_are_at_work(own, others, factor):
    _, spans = play_ops(
        [
            (op(0, Kind.READ_WEIGHT), Cost(9.0, "disk_read", duty=others)),
            (op(1, Kind.COMPUTE), Cost(1.0, "compute", duty=own)),
        ],
        Pace(slowdown={("compute", "disk_read"): 1.5}),
    )
    assert spans[1] == (0.0, pytest.approx(factor))


def test_what_waits_for_the_interpreter_holds_up_others_for_longer():
    def wait(*others: Cost) -> float:
        lanes = Kind.LOAD_CACHE, Kind.STORE_CACHE, Kind.WRITE_CACHE
        moves = [(op(i, lanes[i]), cost) for i, cost in enumerate(others)]
        computed = op(len(others), Kind.COMPUTE), Cost(1.0, "compute", calls=1.0)
        _, spans = play_ops([*moves, computed], Pace(slowdown={("calls", "calls"): 5.0}))
        return spans[len(others)][1] - 1.0

    one, two, three = (wait(*[Cost(99.0, "copy", calls=0.2)] * count) for count in (1, 2, 3))
    assert 4 * 0.2 < one < two - one < three - two
    assert three < 3 * 4.0  # what three would cost that do nothing else


def test_the_dispatcher_holds_the_interpreter_for_every_op():
    def took(dispatch_s: float, calls: float) -> float:
        _, spans = play_ops(
            [
                (op(0, Kind.STORE_CACHE), Cost(9.0, "copy")),
                (op(1, Kind.COMPUTE), Cost(1.0, "compute", calls=calls)),
            ],
            Pace(slowdown={("calls", "calls"): 5.0}, dispatch_s=dispatch_s),
        )
        return spans[1][1]

    assert took(0.0, 1.0) == took(3.0, 0.0) == 1.0
    assert took(3.0, 1.0) > 1 + 4 * 3.0 / 9.0


def test_two_that_disturb_an_op_do_so_on_top_of_each_other():
    _, spans = play_ops(
        [
            (op(0, Kind.READ_WEIGHT), Cost(9.0, "disk_read")),
            (op(1, Kind.LOAD_CACHE), Cost(9.0, "copy")),
            (op(2, Kind.COMPUTE), Cost(1.0, "compute")),
        ],
        Pace(slowdown={("compute", "disk_read"): 1.5, ("compute", "copy"): 2.0}),
    )
    assert spans[2] == (0.0, pytest.approx(3.0))


@pytest.mark.parametrize(
    ("link", "waits_s"),
    [
        ("disk_read", 1.0),  # half of the 2 s in flight
        ("disk_write", 1.0),  # of the same disk
        ("h2d", 0.0),
    ],
)
def test_an_op_waits_for_what_another_has_in_flight_on_its_device(link, waits_s):
    reading = Cost(10.0, link="disk_read", in_flight_s=2.0)
    _, spans = play_ops(
        [
            (op(0, Kind.READ_WEIGHT), reading),
            (op(1, Kind.SAMPLE), Cost(3.0)),
            (op(2, Kind.WRITE_CACHE, 1), Cost(1.0, link=link)),
        ]
    )
    shared = 2.0 if link == "disk_read" else 1.0
    assert spans[2] == (pytest.approx(3.0 + waits_s), pytest.approx(3.0 + waits_s + shared))


def test_who_comes_at_the_end_of_a_transfer_waits_for_no_more_than_is_left():
    _, spans = play_ops(
        [
            (op(0, Kind.READ_WEIGHT), Cost(10.0, link="disk_read", in_flight_s=2.0)),
            (op(1, Kind.SAMPLE), Cost(9.5)),
            (op(2, Kind.WRITE_CACHE, 1), Cost(1.0, link="disk_write")),
        ]
    )
    assert spans[2] == (pytest.approx(9.75), pytest.approx(10.75))


@pytest.mark.parametrize(
    ("own", "others", "factor"),
    [(1.0, 1.0, 5.0), (0.1, 1.0, 1.4), (0.1, 0.5, 1.274), (0.0, 1.0, 1.0)],
)
def test_calls_of_all_lanes_slow_each_other_down_by_their_shares(own, others, factor):
    _, spans = play_ops(
        [
            (op(0, Kind.STORE_CACHE), Cost(99.0, "copy", calls=others)),
            (op(1, Kind.COMPUTE), Cost(1.0, "compute", calls=own)),
        ],
        Pace(slowdown={("calls", "calls"): 5.0}),
    )
    assert spans[1] == (0.0, pytest.approx(factor, abs=1e-3))


def test_a_hop_passes_before_another_lane_goes_on_and_not_on_the_same_one():
    _, spans = play_ops(
        [
            (op(0, Kind.LOAD_WEIGHT), Cost(1.0)),
            (op(1, Kind.COMPUTE, 0), Cost(1.0)),
            (op(2, Kind.COMPUTE, 1), Cost(1.0)),
        ],
        Pace(hop_s=0.25),
    )
    assert (spans[1], spans[2]) == ((1.5, 2.5), (2.5, 3.5))  # the load's start is a hop too


def test_a_hop_is_hidden_while_the_lane_is_busy():
    _, spans = play_ops(
        [
            (op(0, Kind.LOAD_WEIGHT), Cost(1.0)),
            (op(1, Kind.COMPUTE), Cost(3.0)),
            (op(2, Kind.COMPUTE, 0), Cost(1.0)),
        ],
        Pace(hop_s=0.25),
    )
    assert (spans[1], spans[2]) == ((0.25, 3.25), (3.25, 4.25))


def test_a_turn_passes_between_two_ops_of_a_lane():
    _, spans = play_ops(
        [
            (op(0, Kind.LOAD_WEIGHT), Cost(1.0)),
            (op(1, Kind.COMPUTE, 0), Cost(1.0)),
            (op(2, Kind.COMPUTE, 1), Cost(1.0)),
            (op(3, Kind.COMPUTE), Cost(1.0)),
        ],
        Pace(hop_s=0.25, turn_s=0.125),
    )
    assert [spans[i] for i in (3, 1, 2)] == [(0.25, 1.25), (1.5, 2.5), (2.625, 3.625)]


def test_turns_and_hops_take_longer_beside_calls_and_where_several_lanes_begin_at_once():
    pace = Pace(hop_s=0.25, turn_s=0.125, slowdown={("calls", "calls"): 5.0})
    one = op(0, Kind.LOAD_WEIGHT), Cost(3.0)
    two, three = ((op(i, Kind.COMPUTE, i - 1), Cost(1.0)) for i in (1, 2))
    _, spans = play_ops([one, two, three], pace)
    assert (spans[1], spans[2]) == ((3.5, 4.5), (4.625, 5.625))
    beside = op(3, Kind.STORE_CACHE), Cost(99.0, "copy", calls=0.5)
    _, spans = play_ops([one, two, three, beside], pace)
    begun = 0.25 * (1 + 4 * 1)  # the other lane begins as well
    there = begun + 3.0 + 0.25 * (1 + 4 * 0.5)  # beside calls half of the time
    assert spans[0] == (begun, begun + 3.0)
    assert spans[1] == (pytest.approx(there), pytest.approx(there + 1.0))
    assert spans[2][0] == pytest.approx(there + 1.0 + 0.125 * (1 + 4 * 0.5))


def test_a_lane_that_computes_wakes_the_later_the_longer_nothing_came_to_it():
    _, spans = play_ops(
        [
            (op(0, Kind.COMPUTE), Cost(1.0)),
            (op(1, Kind.LOAD_WEIGHT), Cost(3.0)),
            (op(2, Kind.COMPUTE, 1), Cost(1.0)),
            (op(3, Kind.COMPUTE, 2), Cost(1.0)),
            (op(4, Kind.LOAD_WEIGHT, 3), Cost(1.0)),
        ],
        Pace(wake_s=lambda idle_s: idle_s / 4),
    )
    assert [spans[i] for i in (2, 3, 4)] == [(3.5, 4.5), (4.5, 5.5), (5.5, 6.5)]


# -- how far ahead --------------------------------------------------------------------------------


def test_nothing_is_taken_past_a_micro_batch_whose_rows_are_not_known():
    taken: list[int] = []
    committed: list[float] = []

    def ops() -> Iterator[Op | None]:
        taken.append(0)
        yield op(0, Kind.COMMIT)
        while not committed:
            yield None
        taken.append(1)
        yield op(1, Kind.COMMIT, 0)
        while len(committed) < 2:
            yield None

    def commit(batch: object, now_s: float) -> None:
        assert batch is ROWS
        assert len(taken) == len(committed) + 1
        committed.append(now_s)

    simulate(ops(), lambda one: Cost(2.0), PLAIN, on_commit=commit)
    assert committed == [2.0, 4.0]


@example(extra=0)
@given(extra=st.integers(-3, 300))
@settings(max_examples=20)
def test_no_more_ops_are_taken_ahead_than_the_dispatcher_takes(extra):
    num_ops, ahead = RUN_AHEAD + extra, 0
    taken: list[int] = []
    ended: list[int] = []

    def ops() -> Iterator[Op | None]:
        for index in range(num_ops):
            taken.append(index)
            yield op(index, Kind.COMPUTE)
        yield op(num_ops, Kind.COMMIT, num_ops - 1)
        while not done:
            yield None

    def cost_of(one: Op) -> Cost:  # asked when an op starts, so all before it on the lane ended
        nonlocal ahead
        ahead = max(ahead, len(taken) - len(ended))
        ended.append(one.id)
        return Cost(1.0)

    done: list[float] = []
    simulate(ops(), cost_of, PLAIN, on_commit=lambda batch, now_s: done.append(now_s))
    assert ahead == min(num_ops, RUN_AHEAD)


def test_a_load_that_nobody_waits_for_does_not_hold_up_the_end():
    committed: list[float] = []

    def ops() -> Iterator[Op | None]:
        yield op(0, Kind.LOAD_WEIGHT)
        yield op(1, Kind.COMMIT)
        while not committed:
            yield None

    cost = {Kind.LOAD_WEIGHT: Cost(9.0), Kind.COMMIT: Cost(1.0)}
    made = simulate(
        ops(),
        lambda one: cost[one.kind],
        PLAIN,
        on_commit=lambda batch, now_s: committed.append(now_s),
    )
    assert (made.seconds, dict(made.num_ops)) == (1.0, {Lane.HOST: 1})
