"""Ops enter their lanes as what they wait for is done, a bounded number ahead, until one fails."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import FlexpipeError, InputError, RunError
from flexpipe.memory.disk import Stopped
from flexpipe.plan.hardware import Emulation
from flexpipe.runtime.device import Device, open_device
from flexpipe.runtime.dispatcher import RUN_AHEAD, Dispatcher
from flexpipe.runtime.record import Recorder
from flexpipe.schedule.op import LANE_OF, PEER_LANES, Kind, Lane, Op, Wait

ONE_KIND = {LANE_OF[kind]: kind for kind in Kind}  # no COMMIT: "not yet" waits for one


def op(number: int, kind: Kind = Kind.COMPUTE, waits: Iterable[int] = ()) -> Op:
    return Op(number, kind, 0, 0, None, tuple(Wait(other, "produced:kv") for other in waits))


@dataclass
class Work:
    """Performs ops by noting when they began and ended."""

    delays: dict[int, float] = field(default_factory=dict)
    fail: Callable[[Op], BaseException | None] = lambda op: None
    began: dict[int, int] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    _clock: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, op: Op) -> None:
        self._note(self.began, op)
        time.sleep(self.delays.get(op.id, 0))
        error = self.fail(op)
        if error is not None:
            raise error
        self._note(self.ended, op)

    def _note(self, times: dict[int, int], op: Op) -> None:
        with self._lock:
            self._clock += 1
            times[op.id] = self._clock


def dispatcher(work: Callable[[Op], None], device: Device | None = None) -> Dispatcher:
    device = device or open_device("emulated", Emulation())
    return Dispatcher(device, work, Recorder(keep_spans=True), peer_lanes=PEER_LANES)


def run(ops: Iterable[Op | None], work: Callable[[Op], None]) -> None:
    made = dispatcher(work)
    made.run(iter(ops))
    assert made.stuck == []


def ending(ops: list[Op]) -> list[Op | None]:
    """The ops, and a COMMIT behind them all that the end waits for."""
    last = op(len(ops), Kind.COMMIT, [other.id for other in ops])
    return [*ops, last, None]


@st.composite
def graphs(draw: st.DrawFn) -> list[Op]:
    """Ops on all lanes that wait for a few earlier ones each."""
    made: list[Op] = []
    for number in range(draw(st.integers(1, 40))):
        waits = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        made.append(op(number, ONE_KIND[draw(st.sampled_from(list(Lane)))], waits))
    return made


@settings(max_examples=60)
@given(ops=graphs(), seed=st.integers(0, 10**6))
def test_no_op_begins_before_all_it_waits_for_have_ended(ops, seed):
    rng = random.Random(seed)
    work = Work({op.id: rng.choice([0, 0, 0, 0.001, 0.003]) for op in ops})
    run(ending(ops), work)
    assert set(work.ended) >= {op.id for op in ops}
    for each in ops:
        for wait in each.waits_for:
            assert work.ended[wait.op] < work.began[each.id]


@settings(max_examples=20)
@given(ops=graphs())
def test_a_lane_does_one_op_at_a_time(ops):
    work = Work({op.id: 0.0005 for op in ops})
    run(ending(ops), work)
    for lane in Lane:
        spans = sorted((work.began[o.id], work.ended[o.id]) for o in ops if o.lane == lane)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))


def test_an_op_that_waits_does_not_hold_up_its_lane():
    slow = op(0, Kind.READ_WEIGHT)
    ops = [slow, op(1, Kind.COMPUTE, [0]), op(2, Kind.COMPUTE)]
    work = Work({0: 0.05})
    run(ending(ops), work)
    assert work.began[2] < work.ended[0] < work.began[1]


def test_lanes_run_side_by_side():
    meet = threading.Barrier(len(Lane), timeout=10)
    ops = [op(number, kind) for number, kind in enumerate(ONE_KIND.values())]

    def work(op: Op) -> None:
        if op.id < len(ops):
            meet.wait()

    run(ending(ops), work)


def test_not_yet_waits_for_a_commit():
    work = Work({0: 0.05})
    asked_at: list[int] = []

    def ops() -> Iterator[Op | None]:
        yield op(0, Kind.COMMIT)
        while 0 not in work.ended:
            yield None
        asked_at.append(len(work.ended))
        yield op(1, Kind.COMMIT)
        yield None

    run(ops(), work)
    assert asked_at == [1]
    assert set(work.ended) == {0, 1}


def test_not_yet_waits_for_whatever_wakes_it_too():
    """A stage that follows another one's steps has no COMMIT to wait for."""
    work, news, made = Work(), threading.Event(), dispatcher(Work())

    def tell() -> None:
        news.set()
        made.wake()

    def ops() -> Iterator[Op | None]:
        threading.Timer(0.05, tell).start()
        while not news.is_set():
            yield None
        work(op(0))

    made.run(ops())
    assert set(work.ended) == {0}


@pytest.mark.parametrize("kind", [Kind.SEND_HIDDEN, Kind.RECEIVE_TOKENS])
def test_messages_on_their_way_are_waited_for_at_the_end(kind):
    work = Work({0: 0.02, 1: 0.02})
    run([op(0, kind), op(1, kind), op(2, Kind.READ_WEIGHT)], work)
    assert {0, 1} <= set(work.ended)


def test_a_run_that_fails_ends_the_messages_its_lanes_wait_in():
    woken = threading.Event()

    def work(op: Op) -> None:
        if op.kind == Kind.RECEIVE_HIDDEN:
            assert woken.wait(10)
            raise Stopped("nobody will send")
        raise ValueError("too hot")

    made = Dispatcher(
        open_device("emulated", Emulation()),
        work,
        Recorder(keep_spans=False),
        peer_lanes=PEER_LANES,
        end_messages=woken.set,
    )
    with pytest.raises(RunError, match="ValueError: too hot"):
        made.run(iter([op(0, Kind.RECEIVE_HIDDEN), op(1, Kind.COMPUTE), None]))
    assert made.stuck == []


@pytest.mark.parametrize("error", [RunError("stage 2 failed"), Stopped("stage 2 failed")])
def test_another_thread_may_end_a_run(error):
    """Also where whoever does has stopped all waits before."""
    device = open_device("emulated", Emulation())
    made = dispatcher(Work(), device)

    def end() -> None:
        device.stop.set()
        made.abort(error)

    threading.Timer(0.05, end).start()

    def ops() -> Iterator[Op | None]:
        while True:
            yield None

    with pytest.raises(RunError, match=r"^stage 2 failed$"):
        made.run(ops())


def test_stages_without_neighbours_have_no_lanes_for_messages():
    before = threading.active_count()
    made = Dispatcher(open_device("cpu", None), Work(), Recorder(keep_spans=False))
    seen: list[int] = []

    def ops() -> Iterator[Op | None]:
        seen.append(threading.active_count() - before)
        yield op(0, Kind.COMMIT)
        yield None

    made.run(ops())
    away = {Lane.LOAD_WEIGHT, Lane.LOAD_CACHE, Lane.STORE_CACHE, Lane.ATTEND_CPU}
    assert seen == [len(set(Lane) - away - set(PEER_LANES))]


def test_ops_are_taken_a_bounded_number_ahead():
    work = Work()
    gate, taken, furthest = threading.Event(), 0, 0

    def ops() -> Iterator[Op | None]:
        nonlocal taken, furthest
        for number in range(4 * RUN_AHEAD):
            taken += 1
            furthest = max(furthest, taken - len(work.ended))
            if taken == RUN_AHEAD:
                gate.set()
            yield op(number)
        yield op(taken, Kind.COMMIT, [taken - 1])
        yield None

    def held(op: Op) -> None:
        assert gate.wait(10)
        work(op)

    run(ops(), held)
    assert len(work.ended) == 4 * RUN_AHEAD + 1
    assert RUN_AHEAD <= furthest <= RUN_AHEAD + 1


def test_a_load_that_nobody_waits_for_is_dropped_at_the_end():
    work = Work({0: 0.02})
    ops = [op(0, Kind.READ_WEIGHT), op(1, Kind.READ_WEIGHT), op(2, Kind.COMMIT), None]
    run(ops, work)
    assert 2 in work.ended and 1 not in work.began


@pytest.mark.parametrize("lane", list(Lane))
def test_the_first_failure_ends_the_run_and_names_its_op(lane):
    kind = ONE_KIND[lane]
    work = Work(fail=lambda op: ValueError("too hot") if op.id == 5 else None)
    ops = [op(number, kind if number == 5 else Kind.COMPUTE) for number in range(50)]
    ops[6:] = [op(number, Kind.COMPUTE, [5]) for number in range(6, 50)]
    with pytest.raises(
        RunError, match=rf"^{kind.value} \(step 0, layer 0\) failed: ValueError: too"
    ):
        run(ending(ops), work)
    assert 5 in work.began
    assert not set(work.began) & set(range(6, 50))


def test_after_a_failure_nothing_that_is_queued_is_performed():
    work = Work({0: 0.02}, fail=lambda op: OSError("gone") if op.id == 0 else None)
    with pytest.raises(RunError, match="OSError: gone"):
        run(ending([op(number) for number in range(200)]), work)
    assert set(work.began) == {0}


def test_a_failure_wakes_whoever_waits_for_a_commit():
    work = Work({0: 0.02}, fail=lambda op: OSError("gone"))

    def ops() -> Iterator[Op | None]:
        yield op(0)
        while True:
            yield None

    start = time.perf_counter()
    with pytest.raises(RunError):
        run(ops(), work)
    assert time.perf_counter() - start < 5


def test_a_failure_sets_the_stop_flag_that_ends_all_waits():
    device = open_device("emulated", Emulation(h2d_bytes_per_s=1.0))

    def work(op: Op) -> None:
        if op.id == 0:
            device.h2d.deliver(10**6, time.perf_counter())  # would take days
            raise Stopped("ended early")
        time.sleep(0.02)
        raise ValueError("the real one")

    made = dispatcher(work, device)
    start = time.perf_counter()
    with pytest.raises(RunError, match="the real one"):
        made.run(iter([op(0, Kind.LOAD_WEIGHT), op(1, Kind.COMPUTE), None]))
    assert time.perf_counter() - start < 5
    assert made.stuck == []


class Exhausted(RunError):
    """A kind of failure with an exit code of its own."""

    exit_code = 77


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("odd"), RunError, "ValueError: odd"),
        (KeyError(), RunError, "KeyError"),
        (RunError("the disk is full"), RunError, "failed: the disk is full"),
        (Exhausted("no more"), Exhausted, "failed: no more"),
        (InputError("not that"), RunError, "failed: not that"),
    ],
)
def test_what_an_op_raised_is_told_as_a_run_error_with_its_cause(error, kind, text):
    work = Work(fail=lambda op: error)
    with pytest.raises(FlexpipeError, match=text) as told:
        run([op(0), None], work)
    assert type(told.value) is kind
    assert told.value.__cause__ is error


def test_a_schedule_that_fails_leaves_no_thread():
    def ops() -> Iterator[Op | None]:
        yield op(0)
        raise ZeroDivisionError("in the schedule")

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        run(ops(), Work())
    assert threading.active_count() == before


def test_on_the_cpu_there_are_no_lanes_between_host_and_device():
    before = threading.active_count()
    made = dispatcher(Work(), open_device("cpu", None))
    seen: list[int] = []

    def ops() -> Iterator[Op | None]:
        seen.append(threading.active_count() - before)
        yield op(0, Kind.COMMIT)
        yield None

    made.run(ops())
    moves = {Lane.LOAD_WEIGHT, Lane.LOAD_CACHE, Lane.STORE_CACHE, Lane.ATTEND_CPU}
    assert seen == [len(set(Lane) - moves)]
