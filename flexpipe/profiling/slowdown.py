"""How much longer one activity takes while another runs beside it.

Each activity is a loop in a thread of its own, which keeps its team of intra-op threads, as lanes
do. Its pace alone and its pace beside another are taken in turns, so that a change of the machine's
own pace hits both.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from flexpipe.closing import Closing
from flexpipe.profiling.stopwatch import Task

PAIRS = (
    ("compute", "disk_read"),
    ("compute", "disk_write"),
    ("compute", "copy"),
    ("compute", "attend"),
    ("compute_few", "disk_read"),
    ("compute_few", "disk_write"),
    ("compute_few", "copy"),
    ("compute_few", "attend"),
    ("attend", "disk_read"),
    ("attend", "copy"),
    ("disk_read", "disk_write"),
    ("disk_read", "copy"),
)


class _Runner(Closing):
    """One activity's thread."""

    def __init__(self, task: Task, num_threads: int) -> None:
        self._task = task
        self._num_threads = num_threads
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, "flexpipe-measure", initializer=self._set_up)
        self._thread.submit(self._do).result()

    def run(self, window_s: float, together: threading.Barrier) -> Future[float]:
        return self._thread.submit(self._pace, window_s, together)

    def close(self) -> None:
        self._thread.shutdown()

    def _set_up(self) -> None:
        torch.get_num_threads()  # lets torch set up this thread before it is overruled
        torch.set_num_threads(self._num_threads)

    def _pace(self, window_s: float, together: threading.Barrier) -> float:
        """Amount per second."""
        together.wait()
        start, count = time.perf_counter(), 0
        while (now := time.perf_counter()) < start + window_s:
            self._do()
            count += 1
        return self._task.amount * count / (now - start)

    def _do(self) -> None:
        with torch.inference_mode():
            self._task.work(self._turn)
        self._turn += 1


def slowdowns(
    tasks: Mapping[str, Task],
    *,
    num_threads: int,
    windows: int,
    window_s: float,
    pairs: Sequence[tuple[str, str]] = PAIRS,
) -> dict[tuple[str, str], float]:
    """Factors from 1 for both ways of each pair whose tasks are given.

    Tasks that compute or attend take `num_threads` intra-op threads, others one.
    """
    several = dict.fromkeys(("compute", "compute_few", "attend"), num_threads)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    runners = {name: _Runner(task, several.get(name, 1)) for name, task in tasks.items()}
    try:
        for _ in range(windows):
            alone = {name: _together([runner], window_s)[0] for name, runner in runners.items()}
            for one, other in pairs:
                if one in runners and other in runners:
                    paces = _together([runners[one], runners[other]], window_s)
                    found[one, other].append(alone[one] / paces[0])
                    found[other, one].append(alone[other] / paces[1])
    finally:
        for runner in runners.values():
            runner.close()
    return {pair: max(1.0, statistics.median(factors)) for pair, factors in found.items()}


def _together(runners: Sequence[_Runner], window_s: float) -> list[float]:
    barrier = threading.Barrier(len(runners))
    futures = [runner.run(window_s, barrier) for runner in runners]
    return [future.result() for future in futures]
