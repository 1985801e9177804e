"""Requests in, steps out: who sits in which place, and what each row computes next.

Requests take places longest first, so a place always has room for whoever takes it next. A step is
formed micro-batch by micro-batch as tokens come back: rows that have one token to go decode it,
the rest of the micro-batch's new tokens is filled with prompts, in chunks where they are long. A
finished row leaves at once and the next request takes its place.

Only rows in places hold tokens; a request that waits is an `Entry` of a few numbers.

`steps` is called by the dispatcher's thread, `commit` by the host lane.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from flexpipe.job.params import SamplingParams
from flexpipe.job.result import FinishReason
from flexpipe.model.draw import Draw, uniform
from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.plan import Plan
from flexpipe.runtime.stage import SampledToken
from flexpipe.schedule.step import MicroBatch, Row


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that waits for a place: its line, where that starts, and the tokens it needs."""

    index: int
    id: str | int
    offset: int
    num_prompt: int
    num_output: int

    @property
    def need(self) -> Need:
        return Need(self.num_prompt, self.num_output)


class StopCheck(Protocol):
    """Watches one answer's text."""

    def push(self, token: int) -> bool:
        """Whether the answer ends with `token`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A request that takes a place: everything its row needs.

    `generated` are tokens of an earlier run of the job; they are prefilled with the prompt.
    """

    entry: Entry
    tokens: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    stop: StopCheck | None = None
    generated: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """What a request came to; `error` says why it has no more tokens."""

    request: Admitted
    tokens: tuple[int, ...]
    reason: FinishReason
    error: str | None = None


@dataclass(slots=True)
class _Live:
    """A row between its first chunk and its last token."""

    request: Admitted
    pending: tuple[int, ...]
    generated: list[int]
    num_context: int = 0
    decodes: bool = False

    def draw(self) -> Draw | None:
        """How its next token is drawn: by (seed, request id, position) and nothing else."""
        params = self.request.params
        if params.is_greedy:
            return None
        number = uniform(params.seed, self.request.entry.id, len(self.generated))
        return Draw(params.temperature, params.top_k, params.top_p, number)


@dataclass(slots=True)
class StepCount:
    """Tokens and rows of one step, and when the last of its micro-batches came back."""

    prompt_tokens: int = 0
    decode_tokens: int = 0
    rows: int = 0
    is_tail: bool = False  # nobody waited for a place any more
    end_s: float = 0.0


class Batcher:
    """The rows of one job."""

    def __init__(
        self,
        plan: Plan,
        entries: Sequence[Entry],
        admit: Callable[[Entry], Admitted],
        finish: Callable[[Finished], None],
        on_tokens: Callable[[Sequence[tuple[Entry, int]]], None] = lambda tokens: None,
    ) -> None:
        """`admit` gives a waiting request its tokens, `finish` is called once per request as it
        ends, `on_tokens` once per step of a micro-batch with the new tokens of rows that go on."""
        order = longest_first([entry.need for entry in entries])
        self._queue = deque(entries[index] for index in order)
        self._admit = admit
        self._finish = finish
        self._on_tokens = on_tokens
        self._plan = plan
        self._places: list[list[_Live | None]] = [
            [None] * mb.num_places for mb in plan.micro_batches
        ]
        self._in_flight: dict[int, int] = {}  # micro-batch -> its step
        self._lock = threading.Lock()
        self.counts: list[StepCount] = []
        self.repeated_tokens = 0  # of earlier runs, prefilled again

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        """The micro-batches of step `index` as they become known, None once the job is done."""
        with self._lock:
            idle = not self._in_flight and not self._queue
            if idle and not any(row for places in self._places for row in places):
                return None
            self.counts.append(StepCount(is_tail=not self._queue))
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
        went_on: list[tuple[Entry, int]] = []
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
                else:
                    went_on.append((self._entry_at(batch.index, token), token.token))
            count.rows += len(batch.rows)
            count.end_s = time.perf_counter()
        for end in finished:
            self._finish(end)
        self._on_tokens(went_on)

    def _entry_at(self, mb: int, sampled: SampledToken) -> Entry:
        live = self._places[mb][sampled.row.place]
        assert live is not None
        return live.request.entry

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
            return Finished(live.request, tuple(live.generated), "error", error)
        live.generated.append(sampled.token)
        live.decodes = True
        reason = self._stops(live, sampled.token)
        if reason is None:
            live.pending = (sampled.token,)
            return None
        places[sampled.row.place] = None
        return Finished(live.request, tuple(live.generated), reason)

    def _stops(self, live: _Live, token: int) -> FinishReason | None:
        """Why the answer ends with `token`; None if it goes on."""
        request = live.request
        if token in request.eos_token_ids:
            return "stop"
        if request.stop is not None and request.stop.push(token):
            return "stop"
        return "length" if len(live.generated) == request.params.max_tokens else None

    def _form(self, mb: int) -> MicroBatch | None:
        """The rows of a micro-batch's next step; None if it has none."""
        places = self._places[mb]
        for place, live in enumerate(places):
            if live is None and self._queue:
                request = self._admit(self._queue.popleft())
                pending = request.tokens + request.generated
                self.repeated_tokens += len(request.generated)
                places[place] = _Live(request, pending, list(request.generated))
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
                draw = live.draw() if whole else None
                line = live.request.entry.index
                rows.append(Row(line, place, live.num_context, chunk, whole, draw))
        return MicroBatch(mb, tuple(rows)) if rows else None
