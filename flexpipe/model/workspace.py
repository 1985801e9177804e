"""Where the segments' large temporaries live: one buffer, handed out in order, never grown.

The buffer is planned (`flexpipe.model.cost.workspace_bytes`) and taken once. Nothing is freed one
by one: a caller notes a mark and releases everything taken since. A tensor is only good until its
mark is released, and the bytes come back uninitialized.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexpipe.model.cost import ALIGNMENT

_MAX_VIEWS = 512  # remembered tensors; a step's shapes recur in every layer


class Workspace:
    """A bump allocator over a byte tensor on the compute device."""

    def __init__(self, buffer: Tensor) -> None:
        assert buffer.dtype == torch.uint8 and buffer.dim() == 1
        skew = -buffer.data_ptr() % ALIGNMENT
        self._buffer = buffer[skew:] if skew else buffer
        self._size = self._buffer.numel()
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}
        self._constants: dict[float, Tensor] = {}
        self._used = 0
        self.peak_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor, good until the mark before it is released."""
        key = (self._used, shape, dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        start, self._used = self._used, self._used + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if self._used > self.peak_bytes:
            assert start + num_bytes <= self._size, (
                f"workspace of {self._size} bytes cannot hold {shape} {dtype} at {start}"
            )
            self.peak_bytes = self._used
        view = self._views.get(key)
        if view is None:
            view = self._buffer[start : start + num_bytes].view(dtype).view(shape)
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = view
        return view

    def mark(self) -> int:
        return self._used

    def release(self, mark: int) -> None:
        """Everything taken since `mark` may be overwritten from now on."""
        self._used = mark

    def reset(self) -> None:
        self._used = 0

    def constant(self, value: float) -> Tensor:
        """A float32 scalar on the workspace's device, made once."""
        if value not in self._constants:
            self._constants[value] = torch.tensor(value, device=self._buffer.device)
        return self._constants[value]
