"""What ranks tell each other through the store: who is there, figures, when all are ready.

The store is torch.distributed's TCPStore, served by whoever started the ranks, or by rank 0. Keys
lie under the attempt's number, so that a gang that is started again finds nothing of the former
one. Every wait ends when the stop flag is set. A client of the store does one thing at a time: each
thread that may wait in it opens its own.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from flexpipe.errors import RunError
from flexpipe.memory.disk import StopFlag, Stopped
from flexpipe.runtime.ranks import Ranks

SLICE = timedelta(milliseconds=500)  # how long a wait goes without a look at the stop flag
_NEVER = timedelta(days=3650)
_TRY_AGAIN_S = 0.1


class StoreLost(RunError):
    """The store does not answer: its process ended or the network is gone."""


class Deadline:
    """A stop flag that sets itself after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - time.monotonic())

    def is_set(self) -> bool:
        return not self.left_s


def serve(port: int, *, attempt: int = 0, listener: int | None = None) -> Store:
    """The store itself, alive as long as what is returned; `listener` is a socket at that port."""
    store = TCPStore(
        "0.0.0.0",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_NEVER,
        master_listen_fd=_listen(port) if listener is None else listener,
    )
    return _of_attempt(store, attempt)


def _listen(port: int) -> int:
    """A socket for IPv4 alone. On one for both the store would see clients under addresses whose
    names it looks up in vain, and all others wait while the name server does not answer."""
    try:
        return socket.create_server(("", port)).detach()
    except OSError as error:
        raise RunError(
            f"cannot listen on port {port} ({error.strerror}). Name a free one in the variable "
            "MASTER_PORT, for all ranks."
        ) from error


def connect(ranks: Ranks, deadline: Deadline) -> Store:
    """A new client of the store."""
    _wait_for_port(ranks, deadline)
    try:
        store = TCPStore(
            ranks.address, ranks.port, is_master=False, wait_for_workers=False, timeout=_NEVER
        )
    except RuntimeError as error:
        raise StoreLost(_lost(ranks)) from error
    return _of_attempt(store, ranks.attempt)


def _of_attempt(store: Store, attempt: int) -> Store:
    return PrefixStore(f"flexpipe/{attempt}", store)


def _wait_for_port(ranks: Ranks, deadline: Deadline) -> None:
    """Come back once the store listens; torch's own attempts would fill stderr with traces."""
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection((ranks.address, ranks.port), timeout=1.0).close()
            return
        if deadline.is_set():
            raise RunError(
                f"rank {ranks.rank} found no store at {ranks.address}:{ranks.port}: rank 0 was not "
                "started, or is not reached there. Start all ranks within --join-timeout, and name "
                "rank 0's host in MASTER_ADDR."
            )
        time.sleep(_TRY_AGAIN_S)


def _lost(ranks: Ranks) -> str:
    serving = "whoever started the ranks" if ranks.store_is_served else "rank 0"
    return f"the store at {ranks.address}:{ranks.port} is gone: {serving} ended"


class Board:
    """Values that every rank puts up and all read; one thread at a time."""

    def __init__(self, ranks: Ranks, store: Store, stop: StopFlag) -> None:
        self.ranks = ranks
        self._store = store
        self._stop = stop

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Put up this rank's value and wait for all of them, by rank; values are JSON."""
        self.put(f"{name}/{self.ranks.rank}", value)
        return [self.get(f"{name}/{rank}") for rank in range(self.ranks.size)]

    def gather(self, name: str, value: Any) -> list[Any]:
        """Put up this rank's value; rank 0 waits for all of them, by rank, the others get none."""
        self.put(f"{name}/{self.ranks.rank}", value)
        ranks = range(self.ranks.size) if self.ranks.rank == 0 else ()
        return [self.get(f"{name}/{rank}") for rank in ranks]

    def share(self, name: str, value: Any = None) -> Any:
        """What rank 0 gives here, to all."""
        if self.ranks.rank == 0:
            self.put(name, value)
        return self.get(name)

    def meet(self, name: str) -> None:
        """Come back when every rank has come here."""
        self.exchange(name, True)

    def put(self, key: str, value: Any) -> None:
        with self._answering():
            self._store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """The value under `key`, waiting until it is there."""
        self._wait(key, self._stop)
        with self._answering():
            return json.loads(self._store.get(key))

    def missing(self, name: str, deadline: Deadline) -> Sequence[int]:
        """The ranks that have put up nothing under `name` in time."""
        missing = []
        for rank in range(self.ranks.size):
            try:
                self._wait(f"{name}/{rank}", deadline)
            except Stopped:
                if not self._has(f"{name}/{rank}"):
                    missing.append(rank)
        return missing

    def _has(self, key: str) -> bool:
        with self._answering():
            return bool(self._store.check([key]))

    def _wait(self, key: str, stop: StopFlag) -> None:
        with self._answering():
            while not wait_for(self._store, key, SLICE):
                if stop.is_set() or self._stop.is_set():
                    raise Stopped("the run ended while ranks waited for each other")

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Stopped:
            raise
        except RuntimeError as error:
            raise StoreLost(_lost(self.ranks)) from error


def wait_for(store: Store, key: str, limit: timedelta) -> bool:
    """Whether `key` was there in time; whoever sets it wakes this at once."""
    try:
        store.wait([key], limit)
    except DistStoreError:  # that the store is gone is another error
        return False
    return True
