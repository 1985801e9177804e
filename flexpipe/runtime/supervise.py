"""Every rank ends when one does, and the first failure's reason is what all of them tell.

Each rank leaves a sign of life in the store every so often and looks at the others'. The first to
fail writes its reason there, once, and the store wakes the rest. They stop what they are at, as by
Ctrl-C, which every wait of a run heeds; a rank that has not ended after `GRACE_S` runs its
clean-ups and is gone. No timeout of Gloo or NCCL takes part. What waits in the store does so in a
thread of its own, and another looks that it comes back, so a store that is frozen is noticed too.
The watch opens its clients of the store before it counts anything: torch looks up a host's name
for each, and a name server may take its time.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Protocol

from torch.distributed import Store

from flexpipe.errors import FlexpipeError, RunError
from flexpipe.runtime.board import StoreLost, wait_for
from flexpipe.runtime.failure import (
    INTERRUPTED,
    INTERRUPTED_CODE,
    OVER,
    PATIENCE_S,
    Failure,
    Terminated,
)
from flexpipe.runtime.ranks import Ranks

GRACE_S = 2.5  # what a rank may take to end by itself once one has failed
_BEATS_PER_LIMIT = 5
_SLOWEST_BEAT_S = 1.0
_LOOK_S = 0.02
_LEFT = b"left"
_DIED = "ended without a word, as if killed"
_FROZEN = "gave no sign of life for {:g} s: it is frozen, or its host or the network is down"

log = logging.getLogger("flexpipe")


class Pulse:
    """Whose signs of life have stopped, counted in looks at them and not in time: a machine that
    slept finds all others as old as itself."""

    def __init__(self, num_ranks: int, max_looks: int) -> None:
        self._seen: list[bytes] = [b""] * num_ranks
        self._unchanged = [0] * num_ranks
        self._max_looks = max_looks

    def late(self, beats: Sequence[bytes]) -> list[int]:
        """The ranks that gave no sign for too many looks; one that left is none of them."""
        for rank, (seen, beat) in enumerate(zip(self._seen, beats, strict=True)):
            self._unchanged[rank] = self._unchanged[rank] + 1 if seen == beat != _LEFT else 0
        self._seen = list(beats)
        return [rank for rank, looks in enumerate(self._unchanged) if looks > self._max_looks]


class Reach(Protocol):
    """What a rank can see of the others' processes, and do to them; those elsewhere never end."""

    def has_ended(self, rank: int) -> bool: ...

    def kill(self, rank: int) -> None: ...


class Watch:
    """This rank's part in watching over the gang.

    `stage` is what messages call this rank, as exact as is known. `stop` is set when any rank
    failed. `first` is that failure.
    """

    def __init__(self, ranks: Ranks, connect: Callable[[], Store], *, limit_s: float) -> None:
        """Put up the first sign of life; `connect` opens a client of the store."""
        self.ranks = ranks
        self.stop = threading.Event()
        self.first: Failure | None = None
        self._limit_s = limit_s
        self._interval_s = min(_SLOWEST_BEAT_S, limit_s / _BEATS_PER_LIMIT)
        self._max_looks = max(_BEATS_PER_LIMIT, round(limit_s / self._interval_s))
        self._store = connect()  # of the main thread
        self._beating = connect()  # of the thread that beats
        self._telling = connect()  # of whoever tells a failure
        self._on_failure: list[Callable[[], None]] = []
        self._reach: Reach | None = None
        self._threads = [
            threading.Thread(target=self._beat, name="flexpipe-beat", daemon=True),
            threading.Thread(target=self._guard, name="flexpipe-guard", daemon=True),
        ]
        self._clean_ups: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._is_ending = False
        self._shows_bug = False
        self._over = threading.Event()
        self._closed = threading.Event()
        self._unanswered = 0
        self._stages = [f"{ranks.name(rank)} (rank {rank})" for rank in range(ranks.size)]
        self._stage = self._stages[ranks.rank]
        self._put("beat", b"0")
        self.stage = self._stage

    @property
    def stage(self) -> str:
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        self._stage = name
        self._put("stage", name.encode())

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Call this when another rank failed, from another thread: wake who waits for it."""
        self._on_failure.append(callback)

    def clean_up(self, callback: Callable[[], None]) -> None:
        """Call this before the process is ended the hard way."""
        self._clean_ups.append(callback)

    def start(self) -> None:
        """Live from now on, and end when another rank fails."""
        atexit.register(self._at_exit)
        for thread in self._threads:
            thread.start()

    def watch_others(self, reach: Reach) -> None:
        """All ranks are there: notice who dies or falls silent, and end the latter for good."""
        self._reach = reach

    def finish(self) -> None:
        """All went well on every rank."""
        self._over.set()
        self._closed.set()
        self._store.set(OVER, "")
        for thread in self._threads:
            thread.join()
        self._leave()

    def tell(self, error: BaseException) -> None:
        """This rank has failed, though it may take a while to end: let the others know why.

        From any thread. What only shows here is kept for the end.
        """
        if isinstance(error, tuple(PATIENCE_S)):
            return
        with self._lock:
            self._is_ending = True
        with contextlib.suppress(RuntimeError, RunError):
            self._settle(self._own(error).record(self._telling))

    def ended_by(self, error: BaseException) -> BaseException:
        """What to raise when this rank ends with `error`: the first failure of all ranks."""
        self._begin_to_end()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already
        try:
            first = self._first_failure(error)
        except RuntimeError:  # the store is gone, so nobody else can tell
            first = self._own(error)
        self._settle(first)
        with contextlib.suppress(RuntimeError, StoreLost):
            self._leave()
        is_bug = not isinstance(error, FlexpipeError | KeyboardInterrupt)
        self._shows_bug = is_bug and first == self._own(error)
        return error if self._shows_bug else first.error()

    # what this rank tells

    def _begin_to_end(self) -> None:
        """No other rank's failure interrupts this one from here on."""
        while True:
            try:
                with self._lock:
                    self._is_ending = True
                return
            except KeyboardInterrupt:  # of a failure that is about to be told
                continue

    def _first_failure(self, error: BaseException) -> Failure:
        """The first failure of all; what only shows elsewhere leaves others time to tell theirs."""
        patience = (seconds for kind, seconds in PATIENCE_S.items() if isinstance(error, kind))
        self.stop.wait(next(patience, 0.0))
        return self.first or self._own(error).record(self._store)

    def _own(self, error: BaseException) -> Failure:
        text = str(error) or type(error).__name__
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Terminated):
            return Failure(rank=self.ranks.rank, reason=INTERRUPTED, exit_code=INTERRUPTED_CODE)
        if not isinstance(error, FlexpipeError | Terminated):
            text = f"{type(error).__name__}: {text}"
        reason = text if text.startswith("stage ") else f"{self.stage}: {text}"
        code = getattr(error, "exit_code", RunError.exit_code)
        return Failure(rank=self.ranks.rank, reason=reason, exit_code=code)

    def _leave(self) -> None:
        """Beat no more. Who serves the store stays until the others have read what there is."""
        self._put("beat", _LEFT)
        if not self.ranks.serves_store:
            return
        end_s = time.monotonic() + GRACE_S / 2
        while time.monotonic() < end_s and not all(map(self._is_gone, range(self.ranks.size))):
            time.sleep(_LOOK_S)

    def _is_gone(self, rank: int) -> bool:
        beat = f"beat/{rank}"
        return not self._store.check([beat]) or self._store.get(beat) == _LEFT

    def _put(self, what: str, value: bytes) -> None:
        try:
            self._store.set(f"{what}/{self.ranks.rank}", value.decode())
        except RuntimeError as error:
            raise StoreLost("the store of the ranks is gone") from error

    def _all(self, store: Store, what: str) -> list[bytes]:
        return store.multi_get([f"{what}/{rank}" for rank in range(self.ranks.size)])

    # what it learns

    def _beat(self) -> None:
        """Live and look, until a failure is known; waits in the store."""
        pulse = Pulse(self.ranks.size, self._max_looks)
        count = 0
        store = self._beating
        try:
            while not self._over.is_set():
                count += 1
                store.set(f"beat/{self.ranks.rank}", str(count))
                if self._reach is not None:
                    self._look(store, pulse, self._reach)
                self._unanswered = 0
                if wait_for(store, OVER, timedelta(seconds=self._interval_s)):
                    self._learn(Failure.read(store))
                    return
        except (RuntimeError, RunError):
            if not self._over.is_set():
                self._learn(self._no_store(_DIED))

    def _look(self, store: Store, pulse: Pulse, reach: Reach) -> None:
        """Record who died, which the beats read afterwards tell from who left, and who is late."""
        ended = [rank for rank in range(self.ranks.size) if reach.has_ended(rank)]
        self._stages = [name.decode() for name in self._all(store, "stage")]
        beats = self._all(store, "beat")
        for rank in ended:
            if beats[rank] != _LEFT:
                self._failure_of(rank, _DIED).record(store)
        for rank in pulse.late(beats):
            self._failure_of(rank, _FROZEN.format(self._limit_s)).record(store)
            reach.kill(rank)

    def _failure_of(self, rank: int, what: str) -> Failure:
        return Failure(rank=rank, reason=f"{self._stages[rank]} {what}")

    def _no_store(self, what: str) -> Failure:
        """The store fails with whoever serves it."""
        if self.ranks.store_is_served:
            return Failure(rank=0, reason=f"what started the ranks {what}")
        if self._reach is not None:
            self._reach.kill(0)
        return self._failure_of(0, what)

    def _learn(self, failure: Failure | None) -> None:
        """Another rank failed: stop this one, unless it is ending already."""
        if failure is None or not self._settle(failure) or self._is_ending:
            return
        for callback in self._on_failure:
            try:
                callback()
            except Exception as error:  # the others must still be called
                log.warning("while stopping: %s", error)
        with self._lock:
            if not self._is_ending:
                signal.pthread_kill(_main_thread(), signal.SIGINT)

    def _settle(self, failure: Failure) -> bool:
        """Remember the first failure; whether this is it."""
        with self._lock:
            is_first = self.first is None
            self.first = self.first or failure
        self.stop.set()
        self._over.set()
        return is_first

    def _guard(self) -> None:
        """Notice a store that does not answer, and end what does not end by itself."""
        while not self._over.wait(self._interval_s):
            self._unanswered += 1
            if self._unanswered > self._max_looks:
                self._learn(self._no_store(_FROZEN.format(self._limit_s)))
        if not self._closed.wait(GRACE_S):
            self._end_hard()

    def _end_hard(self) -> None:
        for clean_up in self._clean_ups:
            with contextlib.suppress(Exception):
                clean_up()
        self._print_reason()
        self._at_exit()

    def _print_reason(self) -> None:
        assert self.first is not None
        with contextlib.suppress(OSError, ValueError):
            print(f"flexpipe: error: {self.first.reason}", file=sys.stderr)

    def _at_exit(self) -> None:
        """End here after a failure: a thread that still waits in torch would abort the process
        when the interpreter is taken down."""
        if self.first is None:
            return
        if self._shows_bug:  # behind its traceback
            self._print_reason()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.first.exit_code)


@contextlib.contextmanager
def heeding_signals() -> Iterator[None]:
    """SIGTERM, by which torchrun, mpirun and srun end ranks, unwinds as Ctrl-C does; that in turn
    is heeded even if whoever started the process ignored it, since a failure elsewhere uses it."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated("it was told to end (SIGTERM)")

    handlers = {signal.SIGTERM: terminate, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():  # not after a failure, whose handling goes on
        signal.signal(number, handler)


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident
