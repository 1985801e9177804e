"""Lanes: where ops run, one after the other per lane.

A lane that may block its host thread (disk, CPU compute, emulated links) owns a thread. On an
accelerator compute and copies are streams, fed by the dispatcher's thread; what an op there leaves
behind is an event. Only the lanes that compute use torch's intra-op threads: another team would
fight theirs for the cores.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

import torch

from flexpipe.runtime.record import Recorder
from flexpipe.schedule.op import Lane, Op

Perform = Callable[[Op], None]
Done = Callable[[Op], None]
Failed = Callable[[Op, BaseException], None]


class ThreadLane:
    """Ops that are ready, and the thread that performs them.

    Of those waiting, the one that was issued first goes first: where several blocks are in flight,
    an older one is not held up by the layers of those behind it.
    """

    def __init__(
        self,
        lane: Lane,
        perform: Perform,
        done: Done,
        failed: Failed,
        recorder: Recorder,
        *,
        num_threads: int = 1,
    ) -> None:
        self.lane = lane
        self._perform = perform
        self._done = done
        self._failed = failed
        self._recorder = recorder
        self._num_threads = num_threads
        # A heap by op id; a smaller one than any wakes the thread to quit. Each push and pop is one
        # call into C, so no other thread comes in between: a queue.PriorityQueue locks in Python,
        # for which all lanes would wait.
        self._ready: list[tuple[int, Op | None, Sequence[torch.Event]]] = []
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._quit = False
        self._start_s = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name=f"flexpipe-{lane}", daemon=True)

    def start(self, start_s: float) -> None:
        self._start_s = start_s
        self._thread.start()

    def put(self, op: Op, events: Sequence[torch.Event] = ()) -> None:
        """Queue an op whose host dependencies are met; its thread waits for `events`."""
        self._put(op.id, op, events)

    def quit(self) -> None:
        """Perform nothing more; the op now running is finished."""
        self._quit = True
        self._put(-1, None, ())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _put(self, order: int, op: Op | None, events: Sequence[torch.Event]) -> None:
        heappush(self._ready, (order, op, events))
        self._news.put(None)

    def _run(self) -> None:
        torch.get_num_threads()  # lets torch set up this thread before it is overruled
        torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            while True:
                self._news.get()
                _, op, events = heappop(self._ready)
                if op is None or self._quit:
                    return
                self._do(op, events)

    def _do(self, op: Op, events: Sequence[torch.Event]) -> None:
        try:
            for event in events:
                event.synchronize()
            start = time.perf_counter()
            self._perform(op)
            end = time.perf_counter()
            self._recorder.add(op, start - self._start_s, end - self._start_s)
            self._done(op)
        except BaseException as error:
            self._failed(op, error)


class StreamLane:
    """A stream of an accelerator; issued to by the dispatcher's thread alone."""

    def __init__(
        self, lane: Lane, device: torch.device, perform: Perform, recorder: Recorder
    ) -> None:
        self.lane = lane
        self.stream = torch.Stream(device)
        self._device = device
        self._perform = perform
        self._recorder = recorder
        self._running: deque[tuple[Op, torch.Event, torch.Event]] = deque()

    def start(self, origin: torch.Event) -> None:
        """Take times relative to `origin`, an event already recorded."""
        self._origin = origin

    def issue(self, op: Op, events: Iterable[torch.Event]) -> torch.Event:
        """Enqueue an op behind `events`; the event returned fires when it is done."""
        begin = torch.Event(self._device, enable_timing=True)
        end = torch.Event(self._device, enable_timing=True)
        with self.stream:
            for event in events:
                self.stream.wait_event(event)
            begin.record(self.stream)
            self._perform(op)
            end.record(self.stream)
        self._running.append((op, begin, end))
        self.collect()
        return end

    @property
    def oldest(self) -> Op | None:
        """The first op that is not known to be done."""
        return self._running[0][0] if self._running else None

    def collect(self, *, wait: bool = False) -> None:
        """Report the ops that are done; with `wait`, all of them."""
        while self._running:
            op, begin, end = self._running[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            start_s = self._origin.elapsed_time(begin) / 1e3
            self._recorder.add(op, start_s, start_s + begin.elapsed_time(end) / 1e3)
            self._running.popleft()
