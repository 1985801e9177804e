"""A lane performs its ops one after the other, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from flexpipe.runtime.lane import ThreadLane
from flexpipe.runtime.record import Recorder
from flexpipe.schedule.op import Kind, Lane, Op


def op(number: int) -> Op:
    return Op(number, Kind.COMPUTE, 0, 0, None, ())


@dataclass
class Told:
    """What a lane reports; `all_done` waits for so many ops."""

    done: list[int] = field(default_factory=list)
    failed: list[tuple[int, BaseException]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_done(self, op: Op) -> None:
        with self.changed:
            self.done.append(op.id)
            self.changed.notify_all()

    def on_failed(self, op: Op, error: BaseException) -> None:
        with self.changed:
            self.failed.append((op.id, error))
            self.changed.notify_all()

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self.done) + len(self.failed) >= count, timeout=10
            )


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(keep_spans=True)


@pytest.fixture
def lane(told: Told, recorder: Recorder) -> Iterator[Callable[..., ThreadLane]]:
    """`lane(perform, num_threads=…)`: a lane that has started."""
    made = []

    def start(perform: Callable[[Op], None], num_threads: int = 1) -> ThreadLane:
        lane = ThreadLane(
            Lane.COMPUTE,
            perform,
            told.on_done,
            told.on_failed,
            recorder,
            num_threads=num_threads,
        )
        lane.start(time.perf_counter())
        made.append(lane)
        return lane

    yield start
    for each in made:
        each.quit()
        assert each.join(10)


def test_ops_are_performed_in_the_order_they_were_put(lane, told):
    performed = []
    started = lane(lambda op: performed.append(op.id))
    for number in range(100):
        started.put(op(number))
    told.wait(100)
    assert performed == told.done == list(range(100))


def test_of_ops_that_wait_the_one_issued_first_goes_first(lane, told):
    """Else a block in flight would be held up by layers of the blocks behind it."""
    busy, go_on = threading.Event(), threading.Event()

    def perform(op: Op) -> None:
        busy.set()
        assert go_on.wait(10)

    made = lane(perform)
    made.put(op(1))
    assert busy.wait(10)
    for number in (9, 3, 12, 4):
        made.put(op(number))
    go_on.set()
    told.wait(5)
    assert told.done == [1, 3, 4, 9, 12]


def test_an_op_is_recorded_with_its_times_before_it_is_reported(lane, told, recorder):
    started = lane(lambda op: time.sleep(0.02))
    started.put(op(0))
    started.put(op(1))
    told.wait(2)
    first, second = recorder.spans
    assert 0 <= first.start_s <= first.end_s <= second.start_s <= second.end_s
    assert first.end_s - first.start_s >= 0.02
    assert recorder.num_ops[Kind.COMPUTE] == 2
    assert recorder.lane_busy_s(Lane.COMPUTE) >= 0.04


def test_a_failure_is_reported_with_its_op(lane, told):
    def perform(op: Op) -> None:
        if op.id == 1:
            raise ValueError("broken")

    started = lane(perform)
    for number in range(2):
        started.put(op(number))
    told.wait(2)
    assert told.done == [0]
    ((number, error),) = told.failed
    assert number == 1 and str(error) == "broken"


def test_quitting_finishes_the_op_at_work_and_drops_the_rest(lane, told):
    go_on, begun = threading.Event(), threading.Event()

    def perform(op: Op) -> None:
        begun.set()
        assert go_on.wait(10)

    started = lane(perform)
    for number in range(5):
        started.put(op(number))
    assert begun.wait(10)
    started.quit()
    assert not started.join(0.05)
    go_on.set()
    assert started.join(10)
    assert told.done == [0]


def test_a_lane_waits_for_the_events_of_other_lanes(lane, told):
    class Event:
        fired = threading.Event()

        def synchronize(self) -> None:
            assert self.fired.wait(10)

    performed = []
    started = lane(lambda op: performed.append(op.id))
    started.put(op(0), [Event()])  # type: ignore[list-item]
    time.sleep(0.02)
    assert performed == []
    Event.fired.set()
    told.wait(1)
    assert performed == [0]


@pytest.mark.parametrize("number", [1, 2])
def test_a_lane_has_the_threads_it_was_given_and_computes_without_gradients(lane, told, number):
    seen = []
    here = torch.get_num_threads()
    started = lane(
        lambda op: seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled())),
        num_threads=number,
    )
    started.put(op(0))
    told.wait(1)
    assert seen == [(number, True)]
    assert torch.get_num_threads() == here
