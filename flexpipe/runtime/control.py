"""The control channel: rank 0 forms the steps, the others follow.

A `Publisher` stands between the job's steps and rank 0's schedule and tells every other rank of
each micro-batch as it passes, so always ahead of its data: which rows sit where, how many tokens
are behind them and to compute, how the next one is drawn. From the steps alone a rank derives its
ops and the sizes of its messages. Tokens' ids go only to ranks that embed. Each rank has a queue in
the store; what was read is gone from there.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple
from typing import Any

from torch.distributed import DistStoreError, Store

from flexpipe.closing import Closing
from flexpipe.memory.disk import Stopped
from flexpipe.model.draw import Draw
from flexpipe.runtime.board import SLICE
from flexpipe.schedule.build import MicroBatches, Steps
from flexpipe.schedule.step import MicroBatch, Row

_END_OF_STEP = b"step"
_END_OF_JOB = b"job"


class Publisher:
    """Rank 0's end: tells the followers what passes through."""

    def __init__(
        self, store: Store, followers: Collection[int], embedding: Collection[int] = ()
    ) -> None:
        """`followers` are ranks; those of them that are `embedding` get tokens' ids."""
        self._store = store
        self._followers = followers
        self._embedding = frozenset(embedding)

    def wrap(self, steps: Steps) -> Steps:
        """The same steps, told before they are handed on."""

        def told(index: int) -> Iterator[MicroBatch | None] | None:
            batches = steps(index)
            if batches is None:
                self._tell(_END_OF_JOB)
                return None
            return self._step(batches)

        return told

    def _step(self, batches: MicroBatches) -> Iterator[MicroBatch | None]:
        for batch in batches:
            if batch is not None:
                self._tell_batch(batch)
            yield batch
        self._tell(_END_OF_STEP)

    def _tell_batch(self, batch: MicroBatch) -> None:
        counts = encode(batch)
        self._tell(counts, self._embedding)
        if self._embedding:
            with_ids = encode(batch, with_ids=True)
            for rank in self._embedding:
                self._store.queue_push(queue(rank), with_ids)

    def _tell(self, message: bytes, except_for: Collection[int] = ()) -> None:
        for rank in self._followers:
            if rank not in except_for:
                self._store.queue_push(queue(rank), message)


class Follower(Closing):
    """Another rank's end: the same steps, as they are told.

    A thread reads ahead and calls `wake`, so that whoever was told None knows to ask again.
    """

    def __init__(self, store: Store, rank: int, wake: Callable[[], None] = lambda: None) -> None:
        """Nobody else may use `store`."""
        self._store = store
        self._queue = queue(rank)
        self.wake = wake
        self._messages: deque[bytes] = deque()
        self._is_over = False
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="flexpipe-follow", daemon=True)
        self._store.set_timeout(SLICE)
        self._thread.start()

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        """The micro-batches of step `index`, with None for one that was not told yet.

        None once the job is known to be done; its last step may have no micro-batches.
        """
        return None if self._is_over else self._step()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _step(self) -> Iterator[MicroBatch | None]:
        while True:
            message = self._next()
            if message is None:
                yield None
            elif message == _END_OF_STEP:
                return
            elif message == _END_OF_JOB:
                self._is_over = True
                return
            else:
                yield decode(message)

    def _next(self) -> bytes | None:
        if self._messages:
            return self._messages.popleft()
        if self._failure is not None:
            raise Stopped("rank 0 tells no more steps") from self._failure
        return None

    def _read(self) -> None:
        message = b""
        try:
            while message != _END_OF_JOB and not self._closed.is_set():
                try:
                    message = self._store.queue_pop(self._queue)
                except DistStoreError:  # nothing yet
                    continue
                self._messages.append(message)
                self.wake()
        except RuntimeError as error:
            self._failure = error
            self.wake()


def queue(rank: int) -> str:
    """The key of a rank's messages."""
    return f"steps/{rank}"


def encode(batch: MicroBatch, *, with_ids: bool = False) -> bytes:
    """A micro-batch as a message; without ids, tokens are only counted."""
    return json.dumps([batch.index, [_row(row, with_ids) for row in batch.rows]]).encode()


def decode(message: bytes) -> MicroBatch:
    """The micro-batch; tokens that were only counted are a range of that length."""
    index, rows = json.loads(message)
    return MicroBatch(index, tuple(map(_as_row, rows)))


def _row(row: Row, with_ids: bool) -> Sequence[Any]:
    tokens = [int(token) for token in row.tokens] if with_ids else row.num_new
    draw = None if row.draw is None else astuple(row.draw)
    return row.request, row.place, row.num_context, tokens, row.sampled, draw


def _as_row(fields: Sequence[Any]) -> Row:
    request, place, num_context, tokens, sampled, draw = fields
    return Row(
        request=request,
        place=place,
        num_context=num_context,
        tokens=range(tokens) if isinstance(tokens, int) else tokens,
        sampled=sampled,
        draw=None if draw is None else Draw(*draw),
    )
