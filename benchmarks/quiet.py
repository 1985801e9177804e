"""Measuring where others work too: wait for a quiet moment, and know afterwards whether it was one.

Another process's work slows a measurement by more than the core it takes, where cores share caches,
memory and a power budget. So processor time that this process did not spend is counted beside every
measurement, and those that were disturbed are taken again. Who binds a measurement to some cores
bounds the disturbance to what cores share.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import psutil

QUIET_CORES = 0.15  # that others may keep busy
_WINDOW_S, _PATIENCE_S = 1.0, 20.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Taken(Generic[T]):
    """A measurement, and how many cores others kept busy meanwhile."""

    value: T
    others: float


def quietly(measure: Callable[[], T], *, tries: int = 3, cores: float = QUIET_CORES) -> Taken[T]:
    """The first of some measurements that nobody disturbed; if none, the least disturbed one."""
    taken: list[Taken[T]] = []
    for _ in range(tries):
        _wait_until_quiet(cores)
        taken.append(beside(measure))
        if taken[-1].others <= cores:
            break
        print(f"others kept {taken[-1].others:.2f} cores busy", file=sys.stderr)
    return min(taken, key=lambda one: one.others)


def beside(measure: Callable[[], T]) -> Taken[T]:
    """One measurement, whatever happens beside it."""
    start, before = time.perf_counter(), _others_s()
    value = measure()
    return Taken(value, max(0.0, _others_s() - before) / (time.perf_counter() - start))


def _wait_until_quiet(cores: float) -> None:
    end = time.perf_counter() + _PATIENCE_S
    while time.perf_counter() < end:
        if beside(lambda: time.sleep(_WINDOW_S)).others <= cores:
            return


def _others_s() -> float:
    """Processor time, since the machine started, of all but this process and those it waited for,
    on the cores that this process may use; what a virtual machine's host took from them as well."""
    every, own = psutil.cpu_times(percpu=True), psutil.Process().cpu_times()
    cores = [every[core] for core in os.sched_getaffinity(0)]
    busy = sum(core.user + core.nice + core.system + getattr(core, "steal", 0.0) for core in cores)
    return float(busy - own.user - own.system - own.children_user - own.children_system)
