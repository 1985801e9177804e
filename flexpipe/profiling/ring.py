"""How fast messages pass from rank to rank, measured on the ring they will take.

All ranks send and receive at once, as stages do. It takes a fraction of a second, so it is done for
every job, on the very network it runs on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from flexpipe.policy.curve import Curve
from flexpipe.runtime.transport import Transport
from flexpipe.units import MIB

SIZES = (4096, 65536, MIB, 8 * MIB)  # bytes
_REPEATS = 5  # the first message of a size sets things up and does not count


def message_seconds(transport: Transport, device: torch.device) -> dict[int, float]:
    """Seconds of a message by its bytes, as this rank sees it; all ranks must take part."""
    with ThreadPoolExecutor(1, "flexpipe-ring") as sender:
        return {size: min(_passed(transport, device, size, sender)) for size in SIZES}


def _passed(
    transport: Transport, device: torch.device, size: int, sender: ThreadPoolExecutor
) -> Iterator[float]:
    leaves, comes = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    for repeat in range(_REPEATS):
        start = time.perf_counter()
        sent = sender.submit(transport.send, leaves)
        transport.receive(comes)
        sent.result()
        if repeat:
            yield time.perf_counter() - start


def slowest_link(told: Sequence[Mapping[int, float]]) -> Curve:
    """Bytes per second by size, over the slowest edge of the ring; `told` is what each rank saw."""
    return Curve.of({size: size / max(one[size] for one in told) for size in SIZES})
