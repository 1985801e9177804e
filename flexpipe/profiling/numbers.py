"""Memory that work is measured on: taken as a run takes it, full of numbers like a model's.

Numbers are drawn, for accelerators are faster on zeros, and repeat after a while, for drawing takes
time. What is rotated over is larger than what processors cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexpipe.kernels.codec import compress
from flexpipe.memory.tier import TierMemory, torch_dtype, typed
from flexpipe.model.config import DTYPE_BYTES
from flexpipe.model.workspace import Workspace
from flexpipe.plan.codec import Codec
from flexpipe.units import MIB

ROTATED_BYTES = 96 * MIB
ROOM_BYTES = 64 * MIB  # more than the temporaries of anything measured
CODECS = {str(bits): Codec(bits=bits) for bits in (4, 8)}
_DRAWN = 1 << 16
_STD = 0.1


class Numbers:
    """Takes memory beside a device; it goes back with its last tensor."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = TierMemory(device, pin=False)

    def workspace(self, num_bytes: int = ROOM_BYTES) -> Workspace:
        return Workspace(self._memory.take_on_device(num_bytes, "measuring"))

    def taken(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        kind = torch_dtype(dtype)
        slab = self._memory.take_on_device(math.prod(shape) * kind.itemsize, "measuring")
        return typed(slab, kind, shape)

    def drawn(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return self.drawn_bytes(math.prod(shape) * DTYPE_BYTES[dtype], dtype).view(shape)

    def drawn_bytes(self, num_bytes: int, dtype: str) -> Tensor:
        """Numbers like a model's, the same again and again."""
        numbers = self.taken((num_bytes // DTYPE_BYTES[dtype],), dtype)
        drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))
        drawn = drawn.mul_(_STD).to(numbers)
        whole = numbers.numel() // _DRAWN * _DRAWN
        numbers[:whole].view(-1, _DRAWN).copy_(drawn)
        numbers[whole:] = drawn[: numbers.numel() - whole]
        return numbers

    def compressed_rows(self, num_rows: int, size: int, codec: Codec) -> Tensor:
        """Rows of so many numbers each, the same few again and again."""
        few = _DRAWN // size
        drawn = self.taken((few, codec.row_bytes(size)), "uint8")
        compress(self.drawn((few, size), "float32"), codec, drawn)
        rows = self.taken((num_rows, codec.row_bytes(size)), "uint8")
        whole = num_rows // few * few
        rows[:whole].view(-1, few, rows.shape[1]).copy_(drawn)
        rows[whole:] = drawn[: num_rows - whole]
        return rows
