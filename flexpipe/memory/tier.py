"""Taking the bytes of a tier: once, at start, resident from then on.

Host memory is page-aligned (direct I/O reads into it), touched when it is taken, and page-locked
where an accelerator is to copy from it asynchronously. Whatever cannot be locked still works, with
synchronous copies; the loss is told once.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexpipe.errors import PlanError
from flexpipe.memory.disk import aligned_buffer
from flexpipe.plan.tier import Tier
from flexpipe.units import format_bytes

_MADV_POPULATE_WRITE = 23  # Linux 5.14; touches pages without a fault for each
_CUDA_HOST_REGISTER_PORTABLE = 1
POISON = 0x3C  # what tests fill a slot with: every byte of it, a finite number in any dtype

_POPULATING, _PART_BYTES = 4, 16 << 20  # threads that touch pages, the least that one is given
_HUGE = 2 << 20
_AT_ONCE = 128 << 10  # bytes that are copied before any lane misses the interpreter

log = logging.getLogger("flexpipe")


class Piece(NamedTuple):
    """Bytes to copy: where they go in one slab, where they are in the other, how many."""

    target: int
    source: int
    num_bytes: int


class TierMemory:
    """The memories of one run: the host's and the compute device's.

    `device` is the torch device that computes; where it is the CPU (also when an accelerator is
    emulated) every slab lies in host memory.
    """

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        self.device = device
        self._pin = pin and device.type == "cuda"
        if device.type != "cpu":
            _reset_peak(device)
        self._registered: list[Tensor] = []
        self._taken_on_device = 0
        self.pinned_bytes = 0
        self.unpinned_bytes = 0

    def take_on_device(self, num_bytes: int, what: str) -> Tensor:
        """Zeroed bytes beside the compute device, [num_bytes] uint8."""
        self._taken_on_device += num_bytes
        if self.device.type == "cpu":
            return populated(num_bytes, what)
        try:
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:  # torch's out-of-memory errors derive from it
            raise PlanError(
                f"{self.device} refused {format_bytes(num_bytes)} for {what}: {error}. Lower "
                "--gpu-mem, or end other programs that use the device."
            ) from error

    def count_on_device(self, num_bytes: int) -> None:
        """Bytes of a pool that a library takes itself, beside the compute device."""
        self._taken_on_device += num_bytes

    def take_on_host(self, num_bytes: int, what: str) -> Tensor:
        """Zeroed host bytes, page-locked if the run asks for it and the system allows it."""
        slab = populated(num_bytes, what)
        if self._pin and num_bytes:
            self._lock(slab, what)
        return slab

    def peak_device_bytes(self) -> int:
        """The most bytes the device's memory held; an emulated one holds its pools."""
        if self.device.type == "cpu":
            return self._taken_on_device
        return int(torch.accelerator.max_memory_reserved(self.device))

    def emulated_bytes(self, device_tier: Tier) -> int:
        """Bytes of host memory that play an accelerator's."""
        emulated = device_tier == Tier.GPU and self.device.type == "cpu"
        return self._taken_on_device if emulated else 0

    def close(self) -> None:
        """Unlock what was locked; the bytes go back with their last tensor."""
        while self._registered:
            slab = self._registered.pop()
            _cudart().cudaHostUnregister(slab.data_ptr())

    def _lock(self, slab: Tensor, what: str) -> None:
        """Exactly the slab's bytes: torch's own pinned allocator rounds up to powers of two.

        How much the system lets us lock is found out slab by slab; a refusal does not end it, for a
        smaller slab may still go.
        """
        size = slab.numel()
        code = _cudart().cudaHostRegister(slab.data_ptr(), size, _CUDA_HOST_REGISTER_PORTABLE)
        if int(code) == 0:
            self._registered.append(slab)
            self.pinned_bytes += size
            return
        _forget_error(self.device)
        if not self.unpinned_bytes:
            log.warning(
                "%s of host memory for %s could not be page-locked after %s; copies from there are "
                "synchronous (raise `ulimit -l`, or lower the cpu shares)",
                format_bytes(size),
                what,
                format_bytes(self.pinned_bytes),
            )
        self.unpinned_bytes += size


def _reset_peak(device: torch.device) -> None:
    torch.empty(0, device=device)  # sets the allocator up; some versions of torch ask for that
    torch.accelerator.reset_peak_memory_stats(device)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error(device: torch.device) -> None:
    """Let a kernel of no consequence report the refusal, or the next one would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def populated(num_bytes: int, what: str) -> Tensor:
    """Host memory whose pages are all there, uint8; `what` is for the message of a PlanError."""
    try:
        buffer = aligned_buffer(num_bytes)
    except (MemoryError, OSError) as error:
        raise PlanError(
            f"the system refused {format_bytes(num_bytes)} of memory for {what}: {error}. Lower "
            "--cpu-mem, or end other programs."
        ) from error
    slab = torch.from_numpy(buffer)
    _populate(slab)
    return slab[:num_bytes]


def _populate(slab: Tensor) -> None:
    """Make the pages resident now, so that no page fault and no surprise is left for later.

    Several threads at once: zeroing is one thread's 10 GB/s at best, and a virtual machine's host
    may give pages at 0.3 GB/s to each that asks.
    """
    step = max(_PART_BYTES, -(-slab.numel() // _POPULATING // _HUGE) * _HUGE)
    parts = [slab[first : first + step] for first in range(0, max(1, slab.numel()), step)]
    if len(parts) == 1:
        _populate_part(slab)
        return
    together = threading.Barrier(len(parts))  # a thread cannot be made while another one populates
    with ThreadPoolExecutor(len(parts), "flexpipe-populate", together.wait) as threads:
        list(threads.map(_populate_part, parts))


def _populate_part(part: Tensor) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    start = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(AttributeError):
        if libc.madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(part.numel()), _MADV_POPULATE_WRITE
        ):
            part.zero_()


def copy_pieces(target: Tensor, source: Tensor, pieces: Iterable[Piece]) -> None:
    """Copy pieces of one slab of host memory to another, both uint8; none may overlap.

    Small ones go one after the other with the interpreter's lock held: a lane that gave it away for
    each would wait for it longer than the copy takes, and all other lanes with it.
    """
    to, come_from = target.data_ptr(), source.data_ptr()
    for piece in pieces:
        if piece.num_bytes <= _AT_ONCE:
            _memmove(to + piece.target, come_from + piece.source, piece.num_bytes)
        else:
            there = target[piece.target : piece.target + piece.num_bytes]
            there.copy_(source[piece.source : piece.source + piece.num_bytes])


_memmove = ctypes.PyDLL(None).memmove  # of those that hold the lock
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = ctypes.c_void_p


def typed(slab: Tensor, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """A tensor in a slab's bytes, from byte `offset` on."""
    count = 1
    for size in shape:
        count *= size
    return slab[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


def spoil(*places: tuple[Sequence[Tensor], int | None]) -> None:
    """Fill the slab named by each index with finite rubbish; None names none."""
    for slabs, index in places:
        if index is not None:
            slabs[index].fill_(POISON)


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
