"""Rates of pieces of work, measured one by one.

What is to be measured is data: a `Task` says what it does how much of, and turns of it are
timed, on an accelerator many at a time, since those return before they are done. A window's rate is
the mean of its turns, a task's the harmonic mean of some rounds, which lie seconds apart: that is
what a machine keeps up, since jobs run for long and meet its slow moments too, and not what it does
at its best.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

_BATCH_S = {"cpu": 50e-6}  # below, reading the clock would show
_DEVICE_BATCH_S = 2e-3  # likewise waiting for an accelerator

Key = tuple[str | float, ...]
Rated = Mapping[Key, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Work whose rate is wanted: `work(turn)` does `amount` of it.

    `turn` counts up, for tasks that must not find in the caches what their last turn left there.
    `before` runs in front of every turn and is not timed: small work takes up to twice as long
    behind something else as behind itself. `key` is where the rate belongs in a profile: a field,
    what of it, then its sizes.
    """

    key: Key
    amount: float
    work: Callable[[int], object]
    before: Callable[[int], object] | None = None


TaskSource = Callable[[], Iterator[Task]]


class Stopwatch:
    """Times tasks on a device, each for a window."""

    def __init__(self, device: torch.device, window_s: float) -> None:
        self._device = device
        self._window_s = window_s
        self._batch_s = _BATCH_S.get(device.type, _DEVICE_BATCH_S)

    def rate(self, task: Task) -> float:
        """Amount per second; the first turn, which may compile something, does not count."""
        self._seconds(task, 0, 1)
        first = self._seconds(task, 1, 1)
        turn, batch = 2, 1 if task.before else max(1, round(self._batch_s / first))
        seconds = [] if batch > 1 else [first]
        end = time.perf_counter() + self._window_s - sum(seconds)
        while not seconds or time.perf_counter() < end:
            seconds.append(self._seconds(task, turn, batch) / batch)
            turn += batch
        return task.amount / statistics.fmean(seconds)

    def _seconds(self, task: Task, turn: int, count: int) -> float:
        if task.before is not None:
            task.before(turn)
        start = time.perf_counter()
        for index in range(turn, turn + count):
            task.work(index)
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter() - start


def rate_all(sources: Sequence[TaskSource], watch: Stopwatch, rounds: int) -> Rated:
    """The rate of every task over all its rounds; what a source holds is freed before the next
    one's turn."""
    found: dict[Key, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for source in sources:
            for task in source():
                found[task.key].append(watch.rate(task))
    return {key: statistics.harmonic_mean(rates) for key, rates in found.items()}
