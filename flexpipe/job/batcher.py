"""Requests in, steps out: who sits in which place, and what each row computes next.

Requests take places longest first, so a place always has room for whoever takes it next. A step is
formed micro-batch by micro-batch as tokens come back: rows that have one token to go decode it,
the rest of the micro-batch's new tokens is filled with prompts, in chunks where they are long. A
finished row leaves at once and the next request takes its place.

`steps` is called by the dispatcher's thread, `commit` by the host lane.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.plan import Plan
from flexpipe.runtime.stage import SampledToken
from flexpipe.schedule.step import MicroBatch, Row


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A tokenized request."""

    index: int
    tokens: tuple[int, ...]
    max_tokens: int

    @property
    def need(self) -> Need:
        return Need(len(self.tokens), self.max_tokens)


@dataclass(frozen=True, slots=True)
class Finished:
    """What a request came to; `error` says why it has no more tokens."""

    index: int
    tokens: tuple[int, ...]
    reason: str
    error: str | None = None


@dataclass(slots=True)
class _Live:
    """A row between its first chunk and its last token."""

    request: TokenizedRequest
    pending: tuple[int, ...]
    num_context: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return bool(self.generated)


@dataclass(slots=True)
class StepCount:
    """Tokens of one step, and when the last of its micro-batches came back."""

    prompt_tokens: int = 0
    decode_tokens: int = 0
    end_s: float = 0.0


class Batcher:
    """The rows of one job."""

    def __init__(
        self,
        plan: Plan,
        requests: Sequence[TokenizedRequest],
        eos_token_ids: Sequence[int],
        finish: Callable[[Finished], None],
    ) -> None:
        """`finish` is called once per request, as it ends."""
        order = longest_first([request.need for request in requests])
        self._queue = deque(requests[index] for index in order)
        self._eos = frozenset(eos_token_ids)
        self._finish = finish
        self._plan = plan
        self._places: list[list[_Live | None]] = [
            [None] * mb.num_places for mb in plan.micro_batches
        ]
        self._in_flight: dict[int, int] = {}  # micro-batch -> its step
        self._lock = threading.Lock()
        self.counts: list[StepCount] = []

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        """The micro-batches of step `index` as they become known, None once the job is done."""
        with self._lock:
            idle = not self._in_flight and not self._queue
            if idle and not any(row for places in self._places for row in places):
                return None
            self.counts.append(StepCount())
        return self._step(index)

    def _step(self, index: int) -> Iterator[MicroBatch | None]:
        for mb in range(len(self._places)):
            while True:
                with self._lock:
                    waiting = mb in self._in_flight
                    batch = None if waiting else self._form(mb)
                    if batch is not None:
                        self._in_flight[mb] = index
                if not waiting:
                    break
                yield None
            if batch is not None:
                yield batch

    def commit(self, batch: MicroBatch, sampled: Sequence[SampledToken]) -> None:
        """Take a step's tokens: append, stop, free places."""
        finished: list[Finished] = []
        with self._lock:
            count = self.counts[self._in_flight.pop(batch.index)]
            places = self._places[batch.index]
            for row in batch.rows:
                live = places[row.place]
                assert live is not None
                if live.decodes:
                    count.decode_tokens += row.num_new
                else:
                    count.prompt_tokens += row.num_new
                live.num_context += row.num_new
                live.pending = live.pending[row.num_new :]
            for token in sampled:
                end = self._append(places, token)
                if end is not None:
                    finished.append(end)
            count.end_s = time.perf_counter()
        for end in finished:
            self._finish(end)

    def _append(self, places: list[_Live | None], sampled: SampledToken) -> Finished | None:
        live = places[sampled.row.place]
        assert live is not None
        if not sampled.is_finite:
            places[sampled.row.place] = None
            step = len(live.generated) + 1
            error = (
                f"the model's logits for token {step} are not finite; its weights are damaged or "
                "the compute dtype is too narrow (try --dtype float32)"
            )
            return Finished(live.request.index, tuple(live.generated), "error", error)
        live.generated.append(sampled.token)
        if sampled.token in self._eos:
            reason = "stop"
        elif len(live.generated) == live.request.max_tokens:
            reason = "length"
        else:
            live.pending = (sampled.token,)
            return None
        places[sampled.row.place] = None
        return Finished(live.request.index, tuple(live.generated), reason)

    def _form(self, mb: int) -> MicroBatch | None:
        """The rows of a micro-batch's next step; None if it has none."""
        places = self._places[mb]
        for place, live in enumerate(places):
            if live is None and self._queue:
                request = self._queue.popleft()
                places[place] = _Live(request, request.tokens)
        left = self._plan.micro_batches[mb].max_new_tokens
        left -= sum(live is not None and live.decodes for live in places)
        rows = []
        for place, live in enumerate(places):
            if live is None:
                continue
            chunk = live.pending if live.decodes else live.pending[:left]
            if not live.decodes:
                left -= len(chunk)
            if chunk:
                whole = len(chunk) == len(live.pending)
                rows.append(Row(live.request.index, place, live.num_context, chunk, whole))
        return MicroBatch(mb, tuple(rows)) if rows else None
