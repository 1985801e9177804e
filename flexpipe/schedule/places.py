"""Who sits in which place of a block, and what each row computes next: counts, no tokens.

Requests take places in the order of the queue. Blocks in flight take turns, a step each. A step is
formed micro-batch by micro-batch as tokens come back: rows that have one token to go decode it, the
rest of the micro-batch's new tokens is filled with prompts, in chunks where they are long. A row
that leaves makes room for the next in the queue. The job and a prediction of it share this, so that
both see the same steps.

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
import numpy.typing as npt

from flexpipe.plan.plan import Plan
from flexpipe.schedule.step import MicroBatch, Row

T = TypeVar("T")
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


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


class Counts(NamedTuple):
    """The parts of a micro-batch's rows in a step, one array each, by ascending place."""

    place: IntArray
    num_context: IntArray
    num_new: IntArray
    sampled: BoolArray
    decodes: BoolArray

    @property
    def parts(self) -> Iterator[Part]:
        columns = (self.place, self.num_context, self.num_new, self.sampled)
        return map(Part, *(column.tolist() for column in columns))


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
        self._in_flight: dict[int, tuple[int, Counts]] = {}  # micro-batch -> its step

    @property
    def is_tail(self) -> bool:
        """Whether nobody waits for a place any more."""
        return not self._queue

    @property
    def is_busy(self) -> bool:
        """Whether some micro-batch is on its way."""
        return bool(self._in_flight)

    @property
    def is_done(self) -> bool:
        busy = self._in_flight or self._queue
        return not busy and not any(rows.taken.any() for rows in self._rows)

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        """The micro-batches of step `index` as they become known, None once the job is done."""
        with self.lock:
            if self.is_done:
                return None
            self.counts.append(StepCount(is_tail=self.is_tail))
        return self._step(index)

    def computed(self, mb: int, now_s: float) -> None:
        """A micro-batch came back, with `lock` held: its rows have their new tokens behind them."""
        step, parts = self._in_flight.pop(mb)
        count = self.counts[step]
        decoded = int(parts.num_new[parts.decodes].sum())
        count.decode_tokens += decoded
        count.prompt_tokens += int(parts.num_new.sum()) - decoded
        count.rows += len(parts.place)
        count.end_s = now_s
        self.advance(mb, parts)

    def advance(self, mb: int, parts: Counts) -> None:
        """The rows of a micro-batch have the tokens of `parts` behind them."""
        rows = self._rows[mb]
        rows.num_context[parts.place] += parts.num_new
        rows.num_pending[parts.place] -= parts.num_new

    def go_on(self, mb: int, place: int | IntArray) -> None:
        """A row, or some, got their next token, with `lock` held."""
        rows = self._rows[mb]
        rows.decodes[place], rows.num_pending[place] = True, 1

    def leave(self, mb: int, place: int | IntArray) -> None:
        """A row has ended, or some have, with `lock` held."""
        self._rows[mb].taken[place] = False

    def form(self, mb: int) -> Counts | None:
        """What the rows of a micro-batch compute next; None if it has none."""
        rows = self._rows[mb]
        if self._queue:
            self._seat(mb, rows)
        num_new = np.where(rows.taken, rows.num_pending, 0)
        decoding = rows.taken & rows.decodes
        left = self._plan.micro_batches[mb].max_new_tokens - int(np.count_nonzero(decoding))
        for prompt in np.flatnonzero(rows.taken & ~rows.decodes):
            num_new[prompt] = min(num_new[prompt], left)
            left -= int(num_new[prompt])
        place = np.flatnonzero(num_new)
        new = num_new[place]
        whole = new == rows.num_pending[place]
        made = Counts(place, rows.num_context[place], new, whole, decoding[place])
        return made if len(place) else None

    def batch(self, mb: int, parts: Counts) -> MicroBatch:
        """The same as rows of a step."""
        return MicroBatch(mb, tuple(self._make_row(mb, part) for part in parts.parts))

    def _step(self, index: int) -> Iterator[MicroBatch | None]:
        blocks = self._plan.blocks
        for mb in blocks[index % len(blocks)]:
            while True:
                with self.lock:
                    waiting = mb in self._in_flight
                    parts = None if waiting else self.form(mb)
                    if parts is not None:
                        self._in_flight[mb] = index, parts
                        batch = self.batch(mb, parts)
                if not waiting:
                    break
                yield None
            if parts is not None:
                yield batch

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
