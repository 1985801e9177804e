"""What a run may use of each tier when the user says nothing: what is free, less a margin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from flexpipe.plan.hardware import free_disk, free_memory, rss_bytes
from flexpipe.plan.tier import Tier
from flexpipe.runtime.device import Device
from flexpipe.units import GIB, MIB


@dataclass(frozen=True, slots=True)
class Sharers:
    """Ranks of a job that share this process's host, and its device; itself included."""

    on_host: int = 1
    on_device: int = 1


ALONE = Sharers()


def usable_memory(device: Device, offload: Path, sharers: Sharers = ALONE) -> dict[Tier, int]:
    """Bytes per tier, what this process has already taken included; an emulated accelerator's
    memory is part of the host's. Of what is free each of the sharers has its part."""
    host = free_memory() // sharers.on_host + rss_bytes()
    usable = {Tier.CPU: host - host // 50 - 64 * MIB}
    if device.has_streams:
        free = torch.accelerator.get_memory_info(device.torch_device)[0] // sharers.on_device
        usable[Tier.GPU] = free - free // 20 - 256 * MIB
    usable[Tier.DISK] = max(0, free_disk(offload) - GIB) // sharers.on_host
    return usable
