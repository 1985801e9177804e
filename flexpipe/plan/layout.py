"""Where the bytes of a streamed layer lie: in the checkpoint's files and in a slot.

Disk-tier tensors are read in place, so a slot mirrors the file: whole blocks of `ALIGN` bytes,
spans that nearly touch read as one. Tensors that come from host memory travel as one packed piece.
The plan counts exactly these bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpipe.errors import ModelError
from flexpipe.model.config import HELD_BYTES
from flexpipe.plan.placement import PlacedTensor
from flexpipe.plan.tier import Tier

ALIGN = 4096  # unit of direct I/O
PACK_ALIGN = 64  # tensors inside a pack start on a cache line
COALESCE_GAP = 64 * 1024  # reading this much too much costs less than another request


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a layer, or the rows [start, stop) of it where the vocabulary is sliced."""

    tensor: PlacedTensor
    start: int = 0
    stop: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what lies at home, as `PlacedTensor.shape`."""
        full = self.tensor.shape
        return full if self.stop is None else (self.stop - self.start, *full[1:])

    @property
    def num_bytes(self) -> int:
        return self.tensor.row_bytes * self.shape[0]

    @property
    def byte_offset(self) -> int:
        """Offset of the part in the tensor, as it lies at home."""
        return self.tensor.row_bytes * self.start


@dataclass(frozen=True, slots=True)
class Extent:
    """One read: whole blocks of a file into a slot."""

    path: object
    file_offset: int
    num_bytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """How a layer's streamed parts lie in a slot: the packed piece first, then the extents.

    `offsets` gives each part's first byte, in the order of `parts`.
    """

    parts: tuple[Part, ...]
    offsets: tuple[int, ...]
    pack_bytes: int
    extents: tuple[Extent, ...]

    @property
    def read_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)

    def needed_bytes(self, extent: Extent) -> int:
        """Bytes of `extent` up to the end of its last part; the file may end in its last block."""
        ends = (at + part.num_bytes for part, at in zip(self.parts, self.offsets, strict=True))
        last = extent.slot_offset + extent.num_bytes
        return max(end for end in ends if extent.slot_offset < end <= last) - extent.slot_offset

    @property
    def num_bytes(self) -> int:
        return self.pack_bytes + self.read_bytes


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def slot_layout(parts: Sequence[Part]) -> SlotLayout:
    """Lay out the parts that are not at home beside the compute device."""
    offsets: dict[int, int] = {}
    pack_bytes = 0
    for index, part in enumerate(parts):
        if part.tensor.home == Tier.CPU:
            offsets[index] = pack_bytes
            pack_bytes = round_up(pack_bytes + part.num_bytes, PACK_ALIGN)
    pack_bytes = round_up(pack_bytes, ALIGN)
    extents = _extents(parts, pack_bytes, offsets)
    order = tuple(offsets[index] for index in range(len(parts)))
    return SlotLayout(tuple(parts), order, pack_bytes, extents)


def _extents(parts: Sequence[Part], base: int, offsets: dict[int, int]) -> tuple[Extent, ...]:
    """Aligned reads that cover the disk-tier parts; fills in their offsets."""
    on_disk = [(index, part) for index, part in enumerate(parts) if part.tensor.home == Tier.DISK]
    on_disk.sort(key=lambda item: (str(item[1].tensor.stored.path), _file_offset(item[1])))
    extents: list[Extent] = []
    for index, part in on_disk:
        start = _file_offset(part)
        if start % HELD_BYTES[part.tensor.dtype]:
            raise ModelError(
                f"{part.tensor.stored.path}: {part.tensor.spec.name} starts at byte {start}, which "
                f"is not a multiple of its item size; save the checkpoint again with safetensors"
            )
        first, last = start // ALIGN * ALIGN, round_up(start + part.num_bytes, ALIGN)
        path = part.tensor.stored.path
        previous = extents[-1] if extents else None
        if previous and previous.path == path:
            end = previous.file_offset + previous.num_bytes
            if first <= end + COALESCE_GAP:
                grown = max(end, last) - previous.file_offset
                extents[-1] = Extent(path, previous.file_offset, grown, previous.slot_offset)
                offsets[index] = previous.slot_offset + start - previous.file_offset
                continue
        slot_offset = previous.slot_offset + previous.num_bytes if previous else base
        extents.append(Extent(path, first, last - first, slot_offset))
        offsets[index] = slot_offset + start - first
    return tuple(extents)


def _file_offset(part: Part) -> int:
    return part.tensor.stored.offset + part.byte_offset
