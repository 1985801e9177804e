"""Group-wise compression: how a row of numbers lies in memory as 4-bit or 8-bit codes.

Numbers next to one another form groups of `group_size`, the last one shorter where it does not
divide. A group keeps its smallest number and the step between codes, both float16, and a number x
becomes the code round((x - smallest) / step) (FlexGen, arXiv 2303.06865, section 4.2). A row holds
the codes of all its groups, then step and smallest of each. With 4 bits a byte holds the codes of
two numbers half a group apart, so that a vector of bytes gives two vectors of neighbours.

This module knows bytes only; `flexpipe.kernels.codec` does the arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from flexpipe.errors import PolicyError

__all__ = ["FORMAT_VERSION", "Codec", "Segment"]

FORMAT_VERSION = 1
PARAM_BYTES = 2
_SMALLEST_GROUP, _LARGEST_GROUP = 32, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Neighbours whose codes lie in neighbouring bytes, at the same bits."""

    start: int
    stop: int
    byte: int  # of the first, in the row
    shift: int
    group: int


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Bits per number and numbers per group."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise PolicyError(f"compression has 4 or 8 bits, got {self.bits}")
        size = self.group_size
        if not _SMALLEST_GROUP <= size <= _LARGEST_GROUP or size % 2:
            raise PolicyError(
                f"compress_group (--compress-group) is an even number from {_SMALLEST_GROUP} to "
                f"{_LARGEST_GROUP}, got {size}"
            )

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"

    def num_groups(self, size: int) -> int:
        """Of a row of `size` numbers."""
        return -(-size // self.group_size)

    def code_bytes(self, size: int) -> int:
        """A row's codes, made even so that step and smallest are aligned."""
        total = size if self.bits == 8 else -(-size // 2)  # whole groups are even
        return total + total % PARAM_BYTES

    def row_bytes(self, size: int) -> int:
        return self.code_bytes(size) + 2 * PARAM_BYTES * self.num_groups(size)

    def segments(self, size: int) -> tuple[Segment, ...]:
        """Of a row of `size` numbers, in order."""
        return _segments(self, size)


@functools.cache
def _segments(codec: Codec, size: int) -> tuple[Segment, ...]:
    return tuple(_each_segment(codec, size))


def _each_segment(codec: Codec, size: int) -> Iterator[Segment]:
    byte = 0
    for group, start in enumerate(range(0, size, codec.group_size)):
        stop = min(start + codec.group_size, size)
        middle = stop if codec.bits == 8 else start + -(-(stop - start) // 2)
        yield Segment(start=start, stop=middle, byte=byte, shift=0, group=group)
        if middle < stop:
            yield Segment(start=middle, stop=stop, byte=byte, shift=4, group=group)
        byte += middle - start
