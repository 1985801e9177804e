"""Where layers run: the CPU, an emulated accelerator, or any torch accelerator.

One code path serves all three. What differs is data: the tier beside the device, whether its lanes
are streams, and the links' clocks. The emulated accelerator computes on the CPU; its memory is host
memory under a budget of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexpipe.errors import InputError
from flexpipe.memory.link import Link
from flexpipe.memory.tier import Piece, copy_pieces
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.tier import Tier


@dataclass(slots=True)
class SynchronousCopies:
    """Copies that held up their issuer, because the host's side was not page-locked."""

    num_copies: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        self.num_copies += 1
        self.num_bytes += num_bytes


@dataclass(frozen=True, kw_only=True)
class Device:
    """A compute device with its links; `stop` ends every wait of the run."""

    name: str
    torch_device: torch.device
    tier: Tier
    has_streams: bool
    stop: threading.Event
    h2d: Link
    d2h: Link
    disk_read: Link
    disk_write: Link
    comm: Link
    flops_per_s: float | None = None
    synchronous: SynchronousCopies = field(default_factory=SynchronousCopies)

    @property
    def links(self) -> tuple[Link, ...]:
        return (self.h2d, self.d2h, self.disk_read, self.disk_write, self.comm)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """One hop between host and device; asynchronous where the host side is page-locked.

        A copy from or to pageable memory would be synchronous in any case, only silently so: it is
        made so openly, after what is already queued on the current stream.
        """
        if not self.has_streams:
            target.copy_(source)
            return
        host = source if source.device.type == "cpu" else target
        pinned = host.is_pinned()
        if not pinned:
            self.synchronous.add(source.nbytes)
        target.copy_(source, non_blocking=pinned)

    def copy_pieces(self, target: Tensor, source: Tensor, pieces: Sequence[Piece]) -> None:
        """The same with pieces of two slabs."""
        if not self.has_streams:
            copy_pieces(target, source, pieces)
            return
        for at, start, num_bytes in pieces:
            self.copy(target[at : at + num_bytes], source[start : start + num_bytes])

    def upload(self, index: Tensor) -> Tensor:
        """A small tensor of the host where the device can use it."""
        if not self.has_streams:
            return index
        # torch's caching allocator keeps the pinned copy until the stream has read it
        return index.pin_memory().to(self.torch_device, non_blocking=True)


def open_device(name: str, emulation: Emulation | None) -> Device:
    """The device a user named: auto, cpu, emulated, or a torch accelerator such as cuda:1."""
    stop = threading.Event()
    if name == "auto":
        name = _accelerator() or "cpu"
    if name == "cpu":
        return _on_cpu(name, Tier.CPU, stop, None)
    if name == "emulated":
        return _on_cpu(name, Tier.GPU, stop, emulation)
    return _open_accelerator(name, stop)


def device_of_rank(name: str, local_rank: int) -> str:
    """The device that a rank of this host takes: accelerators in turns, where none is named."""
    kind = (_accelerator() or "cpu") if name == "auto" else name
    if kind in ("cpu", "emulated") or ":" in kind:
        return kind
    return f"{kind}:{local_rank % max(1, torch.accelerator.device_count())}"


def _on_cpu(name: str, tier: Tier, stop: threading.Event, rates: Emulation | None) -> Device:
    return Device(
        name=name,
        torch_device=torch.device("cpu"),
        tier=tier,
        has_streams=False,
        stop=stop,
        h2d=Link("h2d", stop, rates.h2d_bytes_per_s if rates else None),
        d2h=Link("d2h", stop, rates.d2h_bytes_per_s if rates else None),
        disk_read=Link("disk_read", stop, rates.disk_read_bytes_per_s if rates else None),
        disk_write=Link("disk_write", stop, rates.disk_write_bytes_per_s if rates else None),
        comm=Link("comm", stop),
        flops_per_s=rates.flops_per_s if rates else None,
    )


def _accelerator() -> str | None:
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else None


def _open_accelerator(name: str, stop: threading.Event) -> Device:
    found = _accelerator()
    device = torch.device(name)
    if found != device.type:
        here = f"torch finds {found} here" if found else "torch finds no accelerator here"
        raise InputError(
            f"--device {name} is not available: {here}; use --device cpu or --device emulated"
        )
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise InputError(f"--device {name} does not exist; there are {count}, counted from 0")
    torch.accelerator.set_device_index(device.index or 0)
    return Device(
        name=name,
        torch_device=torch.device(device.type, device.index or 0),
        tier=Tier.GPU,
        has_streams=True,
        stop=stop,
        h2d=Link("h2d", stop),
        d2h=Link("d2h", stop),
        disk_read=Link("disk_read", stop),
        disk_write=Link("disk_write", stop),
        comm=Link("comm", stop),
    )
