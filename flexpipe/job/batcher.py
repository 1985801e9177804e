"""Requests in, steps out: the tokens of the rows that `Places` seats, and when each answer ends.

Requests take places longest first, so a place always has room for whoever takes it next. Only rows
in places hold tokens; a request that waits is an `Entry` of a few numbers.

`steps` is called by the dispatcher's thread, `commit` by the host lane.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from flexpipe.job.params import SamplingParams
from flexpipe.job.result import FinishReason
from flexpipe.model.draw import Draw, uniform
from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.plan import Plan
from flexpipe.runtime.stage import SampledToken
from flexpipe.schedule.places import Part, Places, StepCount
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
    since_s: float

    def draw(self) -> Draw | None:
        """How its next token is drawn: by (seed, request id, position) and nothing else."""
        params = self.request.params
        if params.is_greedy:
            return None
        number = uniform(params.seed, self.request.entry.id, len(self.generated))
        return Draw(params.temperature, params.top_k, params.top_p, number)


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
        self._admit = admit
        self._finish = finish
        self._on_tokens = on_tokens
        self._live: dict[tuple[int, int], _Live] = {}
        self._places = Places(plan, (entries[i] for i in order), self._seat, self._make_row)
        self.repeated_tokens = 0  # of earlier runs, prefilled again
        self._num_left = 0
        self._stayed_s = 0.0

    @property
    def latency_s(self) -> float:
        """Mean seconds from the step that took a request to its last token."""
        return self._stayed_s / self._num_left if self._num_left else 0.0

    @property
    def counts(self) -> Sequence[StepCount]:
        return self._places.counts

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        """The micro-batches of step `index` as they become known, None once the job is done."""
        return self._places.steps(index)

    def commit(self, batch: MicroBatch, sampled: Sequence[SampledToken]) -> None:
        """Take a step's tokens: append, stop, free places."""
        finished: list[Finished] = []
        went_on: list[tuple[Entry, int]] = []
        with self._places.lock:
            for row in batch.rows:
                live = self._live[batch.index, row.place]
                live.pending = live.pending[row.num_new :]
            self._places.computed(batch.index, time.perf_counter())
            for token in sampled:
                where = batch.index, token.row.place
                entry = self._live[where].request.entry
                end = self._append(where, token)
                if end is not None:
                    finished.append(end)
                else:
                    went_on.append((entry, token.token))
        for end in finished:
            self._finish(end)
        self._on_tokens(went_on)

    def _append(self, where: tuple[int, int], sampled: SampledToken) -> Finished | None:
        live = self._live[where]
        if not sampled.is_finite:
            step = len(live.generated) + 1
            error = (
                f"the model's logits for token {step} are not finite; its weights are damaged or "
                "the compute dtype is too narrow (try --dtype float32)"
            )
            return self._leave(where, "error", error)
        live.generated.append(sampled.token)
        reason = self._stops(live, sampled.token)
        if reason is not None:
            return self._leave(where, reason)
        live.pending = (sampled.token,)
        self._places.go_on(*where)
        return None

    def _leave(
        self, where: tuple[int, int], reason: FinishReason, error: str | None = None
    ) -> Finished:
        live = self._live.pop(where)
        self._places.leave(*where)
        self._num_left += 1
        self._stayed_s += time.perf_counter() - live.since_s
        return Finished(live.request, tuple(live.generated), reason, error)

    def _stops(self, live: _Live, token: int) -> FinishReason | None:
        """Why the answer ends with `token`; None if it goes on."""
        request = live.request
        if token in request.eos_token_ids:
            return "stop"
        if request.stop is not None and request.stop.push(token):
            return "stop"
        return "length" if len(live.generated) == request.params.max_tokens else None

    def _seat(self, mb: int, place: int, entry: Entry) -> int:
        request = self._admit(entry)
        pending = request.tokens + request.generated
        self.repeated_tokens += len(request.generated)
        now_s = time.perf_counter()
        self._live[mb, place] = _Live(request, pending, list(request.generated), now_s)
        return len(pending)

    def _make_row(self, mb: int, part: Part) -> Row:
        live = self._live[mb, part.place]
        draw = live.draw() if part.sampled else None
        tokens = live.pending[: part.num_new]
        line = live.request.entry.index
        return Row(line, part.place, part.num_context, tokens, part.sampled, draw)
