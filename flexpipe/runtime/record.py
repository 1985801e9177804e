"""What the lanes did and when, from clocks.

Sums per kind of op are always kept, and what each step computed; single ops only while tracing, or
while a benchmark asks. Times are seconds since the run's start.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from flexpipe.schedule.op import LANE_OF, Kind, Lane, Op


@dataclass(frozen=True, slots=True)
class Span:
    """One op on its lane."""

    op: Op
    start_s: float
    end_s: float


class Recorder:
    """Collects the times of all ops; every lane reports here."""

    def __init__(self, *, keep_spans: bool) -> None:
        self.spans: list[Span] = []
        self._keep = keep_spans
        self._lock = threading.Lock()
        self._num_ops: dict[Kind, int] = defaultdict(int)
        self._busy_s: dict[Kind, float] = defaultdict(float)
        self._step_s: dict[int, float] = defaultdict(float)
        self._first_s, self._last_s = inf, 0.0

    def add(self, op: Op, start_s: float, end_s: float) -> None:
        with self._lock:
            self._num_ops[op.kind] += 1
            self._busy_s[op.kind] += end_s - start_s
            self._first_s = min(self._first_s, start_s)
            self._last_s = max(self._last_s, end_s)
            if op.lane == Lane.COMPUTE:
                self._step_s[op.step] += end_s - start_s
            if self._keep:
                self.spans.append(Span(op, start_s, end_s))

    @property
    def num_ops(self) -> Mapping[Kind, int]:
        return self._num_ops

    @property
    def busy_s(self) -> Mapping[Kind, float]:
        return self._busy_s

    @property
    def window_s(self) -> tuple[float, float]:
        """When the first op began and the last one ended."""
        return min(self._first_s, self._last_s), self._last_s

    @property
    def step_s(self) -> Sequence[float]:
        """Seconds that each step computed, in the order of steps."""
        return [self._step_s[step] for step in sorted(self._step_s)]

    def lane_busy_s(self, lane: Lane) -> float:
        return sum(busy for kind, busy in self._busy_s.items() if LANE_OF[kind] == lane)

    def lane_ops(self, lane: Lane) -> int:
        return sum(count for kind, count in self._num_ops.items() if LANE_OF[kind] == lane)
