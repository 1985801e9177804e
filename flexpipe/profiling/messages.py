"""What a message between two ranks of this host takes: Gloo, as stages on CPUs use it.

Both ends are in this process, connected through the loopback as two processes would be. Between
hosts the network decides, which a hardware file has to tell.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flexpipe.profiling.effort import KIB, Effort
from flexpipe.profiling.stopwatch import Task

_LEAST_BYTES = 4 * KIB  # hidden of one small row
_MOST_BYTES = 16 * 1024 * KIB
_CONNECT_LIMIT = timedelta(seconds=60)


def message_tasks(effort: Effort) -> Generator[Task, None, None]:
    """One message after the other, by size."""
    first, second = _connected()
    sizes = [size for size in effort.copies if size <= _MOST_BYTES]
    for num_bytes in (_LEAST_BYTES, *sizes):
        sent = torch.ones(num_bytes, dtype=torch.uint8)
        received = torch.empty_like(sent)

        def hand_over(turn: int, sent: Any = sent, received: Any = received) -> None:
            arrival = second.recv([received], 0, 0)
            first.send([sent], 1, 0).wait()
            arrival.wait()

        yield Task(key=("links", "comm", num_bytes), amount=num_bytes, work=hand_over)


def _connected() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The two ends of a ring of two."""
    store = dist.HashStore()

    def join(rank: int) -> Any:
        return dist.ProcessGroupGloo(dist.PrefixStore("messages", store), rank, 2, _CONNECT_LIMIT)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(join, range(2))
    return first, second
