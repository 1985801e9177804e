"""Puts ops on lanes as what they wait for is done.

The dispatcher takes ops in issue order, a bounded number ahead, and counts for each the
dependencies that the host must wait for. At zero the op enters its lane. An op on a stream counts
as met once it is issued: other streams wait for its event on the device, threads wait for it
themselves.

The schedule may have nothing to give until there is news: a COMMIT, or, for a stage that follows
another one's steps, whatever `wake` is called for.

The first failure stops every lane and is told with its op; nothing that is still queued is
performed. Another thread may end a run as well, with `abort`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch

from flexpipe.errors import FlexpipeError, RunError
from flexpipe.memory.disk import Stopped
from flexpipe.runtime.device import Device
from flexpipe.runtime.lane import StreamLane, ThreadLane
from flexpipe.runtime.record import Recorder
from flexpipe.schedule.op import PEER_LANES, Kind, Lane, Op

RUN_AHEAD = 512  # ops submitted and not done; bounds memory, far above what hides latency
_AT_EASE, _PAUSE_S = 64, 5e-5  # with so many ahead nobody waits for more: let lanes go first
_KEPT_EVENTS = 4 * RUN_AHEAD
_JOIN_TIMEOUT_S = 30.0

STREAMS = (Lane.COMPUTE, Lane.LOAD_WEIGHT, Lane.LOAD_CACHE, Lane.STORE_CACHE)
ALL_CORES = (Lane.COMPUTE, Lane.ATTEND_CPU)
HOST_LANES = (Lane.READ_WEIGHT, Lane.READ_CACHE, Lane.DISK_WRITE, Lane.HOST)
EVERYWHERE = (*HOST_LANES, *PEER_LANES, Lane.COMPUTE)

log = logging.getLogger("flexpipe")


@dataclass(slots=True)
class _Pending:
    op: Op
    num_unmet: int
    dependents: list[int] = field(default_factory=list)


class Dispatcher:
    """Runs one stream of ops to its end."""

    def __init__(
        self,
        device: Device,
        perform: Callable[[Op], None],
        recorder: Recorder,
        *,
        describe: Callable[[Op], str] = str,
        num_threads: int = 1,
        peer_lanes: Collection[Lane] = (),
        end_messages: Callable[[], None] = lambda: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`end_messages` is called when a run fails, to free the lanes that wait for a peer.
        `on_failure` is told the first failure before that, since peers notice."""
        self._device = device
        self._describe = describe
        self._end_messages = end_messages
        self._on_failure = on_failure
        self._recorder = recorder
        self._changed = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._events: dict[int, torch.Event] = {}
        self._to_issue: deque[Op] = deque()
        self._num_news = 0
        self._num_messages = 0
        self._waiting = False
        self._failure: BaseException | None = None
        self._streams: dict[Lane, StreamLane] = {}
        self._threads: dict[Lane, ThreadLane] = {}
        for lane in Lane:
            if lane in PEER_LANES and lane not in peer_lanes:
                continue
            if device.has_streams and lane in STREAMS:
                self._streams[lane] = StreamLane(lane, device.torch_device, perform, recorder)
            elif device.tier.value == "gpu" or lane in EVERYWHERE:
                self._threads[lane] = ThreadLane(
                    lane,
                    perform,
                    self._done,
                    self._failed,
                    recorder,
                    num_threads=num_threads if lane in ALL_CORES else 1,
                )

    def run(self, ops: Iterator[Op | None]) -> float:
        """Perform all ops; returns the seconds it took. Loads nobody waits for are dropped.

        Raises RunError, naming the op, for whatever an op raised.
        """
        start = time.perf_counter()
        self._start(start)
        try:
            self._feed(ops)
        except BaseException:
            self._end_messages()
            raise
        finally:
            self._device.stop.set()
            self._end()
        if self._failure is not None:
            raise self._failure
        return time.perf_counter() - start

    def wake(self) -> None:
        """There is news: ask the schedule again."""
        with self._changed:
            self._num_news += 1
            self._changed.notify()

    def abort(self, error: BaseException) -> None:
        """End the run with `error`, unless it has failed already."""
        with self._changed:
            self._failure = self._failure or error
            self._stop()
        self._end_messages()

    @property
    def stuck(self) -> list[Lane]:
        """Lanes whose thread has not ended."""
        return [lane for lane, thread in self._threads.items() if not thread.join(0)]

    def _start(self, start: float) -> None:
        for thread in self._threads.values():
            thread.start(start)
        if self._streams:
            origin = torch.Event(self._device.torch_device, enable_timing=True)
            torch.accelerator.synchronize()
            origin.record(torch.accelerator.current_stream())
            origin.synchronize()  # times are taken from it, so it must be over
            for stream in self._streams.values():
                stream.start(origin)

    def _feed(self, ops: Iterator[Op | None]) -> None:
        while True:
            seen = self._num_news  # read before asking, or what comes in between would be missed
            try:
                op = next(ops)
            except StopIteration:
                self._wait(lambda: not self._num_messages)  # the others need what is on its way
                return
            if op is None:
                if not self._wait(lambda: self._num_news != seen):  # noqa: B023
                    return
                continue
            self._submit(op)
            if len(self._pending) > _AT_EASE and not self._streams:
                time.sleep(_PAUSE_S)  # else a burst of new ops would keep the interpreter
            if len(self._pending) >= RUN_AHEAD:
                if not self._wait(lambda: len(self._pending) < RUN_AHEAD * 3 // 4):
                    return
            elif self._failure is not None:
                return

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Issue to streams and sleep until `ready`; False when the run failed."""
        while True:
            self._issue_all()
            with self._changed:
                if self._failure is not None:
                    return False
                if ready():
                    return True
                if not self._to_issue:
                    self._waiting = True
                    self._changed.wait()
                    self._waiting = False

    def _submit(self, op: Op) -> None:
        with self._changed:
            entry = _Pending(op, 0)
            for wait in op.waits_for:
                before = self._pending.get(wait.op)
                if before is not None:
                    before.dependents.append(op.id)
                    entry.num_unmet += 1
            self._pending[op.id] = entry
            self._num_messages += op.lane in PEER_LANES
            if not entry.num_unmet:
                self._enter(op)
        self._issue_all()

    def _enter(self, op: Op) -> None:
        """Called with the lock: nothing on the host keeps `op` from its lane."""
        thread = self._threads.get(op.lane)
        if thread is None:
            self._to_issue.append(op)
            return
        thread.put(op, self._events_of(op) if self._streams else ())

    def _events_of(self, op: Op) -> list[torch.Event]:
        events = (self._events.get(wait.op) for wait in op.waits_for)
        return [event for event in events if event is not None]

    def _issue_all(self) -> None:
        """Put onto streams what may go there; the dispatcher's thread alone does, without lock."""
        while self._to_issue and self._failure is None:
            with self._changed:
                op = self._to_issue.popleft()
                events = self._events_of(op)
            try:
                event = self._streams[op.lane].issue(op, events)
                with self._changed:
                    self._events[op.id] = event
                    if len(self._events) > _KEPT_EVENTS:
                        self._events = {key: e for key, e in self._events.items() if not e.query()}
                    self._met(op)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a device reports late: it may be an earlier op's
                self._failed(op, error)
                return

    def _done(self, op: Op) -> None:
        with self._changed:
            self._met(op)
            if self._waiting:
                self._changed.notify()

    def _met(self, op: Op) -> None:
        if op.kind == Kind.COMMIT:
            self._num_news += 1
        self._num_messages -= op.lane in PEER_LANES
        for dependent in self._pending.pop(op.id).dependents:
            entry = self._pending[dependent]
            entry.num_unmet -= 1
            if not entry.num_unmet:
                self._enter(entry.op)

    def _failed(self, op: Op, error: BaseException) -> None:
        told = _told(op, error, self._describe)
        with self._changed:
            ended = isinstance(error, Stopped) and self._device.stop.is_set()  # as all waits do
            is_first = self._failure is None and not ended
            if is_first:
                self._failure = told
            self._stop()
        if is_first:
            self._on_failure(told)
        self._end_messages()

    def _stop(self) -> None:
        """Called with the lock: stop every wait of the run."""
        self._device.stop.set()
        for thread in self._threads.values():
            thread.quit()
        self._changed.notify()

    def _end(self) -> None:
        """Return when nothing of the run is at work any more: no thread, no stream."""
        for thread in self._threads.values():
            thread.quit()
        limit = time.perf_counter() + _JOIN_TIMEOUT_S
        for thread in self._threads.values():
            thread.join(max(0.0, limit - time.perf_counter()))
        if stuck := self.stuck:
            names = ", ".join(stuck)
            log.warning("still at work after %.0f s of waiting: %s", _JOIN_TIMEOUT_S, names)
        for stream in self._streams.values():
            try:
                stream.collect(wait=True)
            except BaseException as error:
                assert stream.oldest is not None
                self._failed(stream.oldest, error)


def _told(op: Op, error: BaseException, describe: Callable[[Op], str]) -> FlexpipeError:
    reason = str(error) or type(error).__name__
    if not isinstance(error, FlexpipeError):
        reason = f"{type(error).__name__}: {reason}"
    kind = type(error) if isinstance(error, RunError) else RunError
    told = kind(f"{describe(op)} failed: {reason}")
    told.__cause__ = error
    return told
