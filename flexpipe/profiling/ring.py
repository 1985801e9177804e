"""How fast messages pass from rank to rank, measured on the way they will take.

All ranks send and receive at once, as stages do; where there is but one stage, its shards sum. It
takes a fraction of a second, so it is done for every job, on the very network it runs on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from flexpipe.policy.curve import Curve
from flexpipe.runtime.ranks import Ranks
from flexpipe.runtime.transport import Transport
from flexpipe.units import MIB

SIZES = (4096, 65536, MIB, 8 * MIB)  # bytes
_REPEATS = 5  # the first message of a size sets things up and does not count


def message_seconds(transport: Transport, device: torch.device, ranks: Ranks) -> dict[int, float]:
    """Seconds of a message by its bytes, as this rank sees it; all ranks must take part."""
    with ThreadPoolExecutor(1, "flexpipe-ring") as sender:

        def ring(size: int) -> None:
            sent = sender.submit(transport.send, leaves[:size])
            transport.receive(comes[:size])
            sent.result()

        def summed(size: int) -> None:
            # so long that a shard sends `size` bytes
            num_floats = size * ranks.num_shards // (8 * (ranks.num_shards - 1))
            transport.all_reduce(leaves.view(torch.float32)[:num_floats])

        leaves, comes = (torch.zeros(SIZES[-1], dtype=torch.uint8, device=device) for _ in "ab")
        once = ring if ranks.num_stages > 1 else summed
        return {size: _least_s(partial(once, size)) for size in SIZES}


def _least_s(once: Callable[[], None]) -> float:
    took = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        once()
        took.append(time.perf_counter() - start)
    return min(took[1:])


def slowest_link(told: Sequence[Mapping[int, float]]) -> Curve:
    """Bytes per second by size, where they pass slowest; `told` is what each rank saw."""
    return Curve.of({size: size / max(one[size] for one in told) for size in SIZES})
