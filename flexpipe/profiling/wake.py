"""How long a lane that computes takes to wake: the longer nothing came to it, the longer.

Its thread sleeps at once, its team of intra-op threads after a while, and one of these that is
woken may have to wait for the core of the one that woke it. The hop between two lanes at work
(`flexpipe.profiling.overhead`) is not counted again.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

IDLE_S = (1e-3, 4e-3, 16e-3, 40e-3)
_AWAKE_S = 20e-6  # between two turns of a lane that is never idle
_SIZE, _ROWS = 256, 64


def wake_times(turns: int, num_threads: int) -> dict[float, float]:
    """Seconds that a small product takes longer, from when it is asked for, by the seconds in which
    its thread was asked for nothing."""
    weight, x = torch.ones(_SIZE, _SIZE), torch.ones(_ROWS, _SIZE)
    made = torch.empty(_ROWS, _SIZE)

    def set_up() -> None:
        torch.get_num_threads()  # lets torch set up this thread before it is overruled
        torch.set_num_threads(num_threads)

    def multiply() -> float:
        torch.mm(x, weight, out=made)
        return time.perf_counter()

    def took(idle_s: float) -> float:
        """The mean of most: a few are held up by something else."""
        seconds = []
        for _ in range(turns):
            time.sleep(idle_s)
            start = time.perf_counter()
            seconds.append(lane.submit(multiply).result() - start)
        return statistics.fmean(sorted(seconds)[: -(-turns * 9 // 10)])

    with ThreadPoolExecutor(1, "flexpipe-measure", initializer=set_up) as lane:
        lane.submit(multiply).result()
        awake_s = took(_AWAKE_S)
        return {idle_s: max(0.0, took(idle_s) - awake_s) for idle_s in IDLE_S}
