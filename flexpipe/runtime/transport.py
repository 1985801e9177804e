"""Messages between ranks: hidden and tokens along the ring of stages."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Transport(Protocol):
    """What a stage asks of its neighbours. Every call returns when its buffer may be used again."""

    def send(self, tensor: Tensor) -> None:
        """Hand a contiguous tensor to the next rank of the ring."""

    def receive(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor with what the previous rank sent."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Add up a contiguous tensor over the ranks of this stage, in place; all get the same."""

    def abort(self) -> None:
        """Wake, from another thread, whoever waits here: they raise Stopped, and so does who comes
        later."""
