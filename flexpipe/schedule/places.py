"""Who sits in which place of a block, and what each row computes next: counts, no tokens.

Requests take places in the order of the queue. A step is formed micro-batch by micro-batch as
tokens come back: rows that have one token to go decode it, the rest of the micro-batch's new tokens
is filled with prompts, in chunks where they are long. A row that leaves makes room for the next in
the queue. The job and a prediction of it share this, so that both see the same steps.

`steps` may be called by another thread than the rest; whoever changes rows holds `lock`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from flexpipe.plan.plan import Plan
from flexpipe.schedule.step import MicroBatch, Row

T = TypeVar("T")


class Part(NamedTuple):
    """A row's part in a step: the tokens behind it, those to compute now, and whether the last of
    them asks for the next token."""

    place: int
    num_context: int
    num_new: int
    sampled: bool


@dataclass(slots=True)
class StepCount:
    """Tokens and rows of one step, and when the last of its micro-batches came back."""

    prompt_tokens: int = 0
    decode_tokens: int = 0
    rows: int = 0
    is_tail: bool = False  # nobody waited for a place any more
    end_s: float = 0.0


class Tail(NamedTuple):
    """The end of a run, when nobody waited for a place any more."""

    seconds: float = 0.0
    num_steps: int = 0
    bound_s: float = 0.0


class Phases(NamedTuple):
    """Seconds of steps that prefill, of steps that only decode, and the latters' tokens."""

    prefill_s: float
    decode_s: float
    decoded: int


class _Rows:
    """The places of one micro-batch; an array each for what is known of their rows."""

    def __init__(self, num_places: int) -> None:
        self.taken = np.zeros(num_places, bool)
        self.decodes = np.zeros(num_places, bool)
        self.num_context = np.zeros(num_places, np.int64)
        self.num_pending = np.zeros(num_places, np.int64)


class Places(Generic[T]):
    """The rows of one job. `admit` seats a request at (micro-batch, place) and tells the tokens it
    has to compute, `make_row` turns a part of a step into a row."""

    def __init__(
        self,
        plan: Plan,
        queue: Iterable[T],
        admit: Callable[[int, int, T], int],
        make_row: Callable[[int, Part], Row],
    ) -> None:
        self.lock = threading.Lock()
        self.counts: list[StepCount] = []
        self._plan = plan
        self._queue = deque(queue)
        self._admit = admit
        self._make_row = make_row
        self._rows = [_Rows(mb.num_places) for mb in plan.micro_batches]
        self._in_flight: dict[int, int] = {}  # micro-batch -> its step

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        """The micro-batches of step `index` as they become known, None once the job is done."""
        with self.lock:
            idle = not self._in_flight and not self._queue
            if idle and not any(rows.taken.any() for rows in self._rows):
                return None
            self.counts.append(StepCount(is_tail=not self._queue))
        return self._step(index)

    def computed(self, batch: MicroBatch, now_s: float) -> None:
        """A micro-batch came back, with `lock` held: its rows have their new tokens behind them."""
        count, rows = self.counts[self._in_flight.pop(batch.index)], self._rows[batch.index]
        place = np.fromiter((row.place for row in batch.rows), np.int64, len(batch.rows))
        num_new = np.fromiter((row.num_new for row in batch.rows), np.int64, len(batch.rows))
        decoded = int(num_new[rows.decodes[place]].sum())
        count.decode_tokens += decoded
        count.prompt_tokens += int(num_new.sum()) - decoded
        rows.num_context[place] += num_new
        rows.num_pending[place] -= num_new
        count.rows += len(batch.rows)
        count.end_s = now_s

    def go_on(self, mb: int, place: int) -> None:
        """A row got its next token, with `lock` held."""
        rows = self._rows[mb]
        rows.decodes[place], rows.num_pending[place] = True, 1

    def leave(self, mb: int, place: int) -> None:
        """A row has ended, with `lock` held."""
        self._rows[mb].taken[place] = False

    def _step(self, index: int) -> Iterator[MicroBatch | None]:
        for mb in range(len(self._rows)):
            while True:
                with self.lock:
                    waiting = mb in self._in_flight
                    batch = None if waiting else self._form(mb)
                    if batch is not None:
                        self._in_flight[mb] = index
                if not waiting:
                    break
                yield None
            if batch is not None:
                yield batch

    def _form(self, mb: int) -> MicroBatch | None:
        """The rows of a micro-batch's next step; None if it has none."""
        rows = self._rows[mb]
        if self._queue:
            self._seat(mb, rows)
        num_new = np.where(rows.taken, rows.num_pending, 0)
        prompts = np.flatnonzero(rows.taken & ~rows.decodes)
        left = self._plan.micro_batches[mb].max_new_tokens
        left -= int(np.count_nonzero(rows.taken & rows.decodes))
        for place in prompts:
            num_new[place] = min(num_new[place], left)
            left -= int(num_new[place])
        at_work = np.flatnonzero(num_new)
        whole = num_new == rows.num_pending
        parts = map(
            Part,
            at_work.tolist(),
            rows.num_context[at_work].tolist(),
            num_new[at_work].tolist(),
            whole[at_work].tolist(),
        )
        made = tuple(self._make_row(mb, part) for part in parts)
        return MicroBatch(mb, made) if made else None

    def _seat(self, mb: int, rows: _Rows) -> None:
        for place in np.flatnonzero(~rows.taken).tolist():
            if not self._queue:
                return
            rows.num_pending[place] = self._admit(mb, place, self._queue.popleft())
            rows.num_context[place] = 0
            rows.taken[place], rows.decodes[place] = True, False


def phases(counts: Sequence[StepCount], began_s: float) -> Phases:
    """How long a job's steps took, by what they did."""
    prefill_s = decode_s = 0.0
    decoded, last = 0, began_s
    for count in counts:
        if not count.prompt_tokens and not count.decode_tokens:
            continue
        seconds, last = count.end_s - last, count.end_s
        if count.prompt_tokens:
            prefill_s += seconds
        else:
            decode_s += seconds
            decoded += count.decode_tokens
    return Phases(prefill_s, decode_s, decoded)


def tail(counts: Sequence[StepCount]) -> Tail:
    """The drain, whose rows nobody replaces: from the last step that somebody waited through."""
    steps = [count for count in counts if count.end_s]
    steady = [index for index, count in enumerate(steps) if not count.is_tail]
    if not steady or steady[-1] + 1 == len(steps):
        return Tail()
    ends = [count.end_s for count in steps[steady[-1] :]]
    took = [end - start for start, end in pairwise(ends)]
    return Tail(sum(took), len(took), min(took) * len(took))
