"""Where a streamed layer's bytes lie: packed from host memory, in the file's blocks from disk."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import ModelError
from flexpipe.model.config import TensorSpec
from flexpipe.plan.layout import ALIGN, COALESCE_GAP, PACK_ALIGN, Part, slot_layout
from flexpipe.plan.placement import PlacedTensor
from flexpipe.plan.tier import Tier
from tests.schedule.plans import FakeTensor


def part(rows: int, offset: int, home: Tier, path: str = "a", dtype: str = "float32") -> Part:
    spec = TensorSpec("q_proj", f"{path}:{offset}", (rows, 16))
    stored = FakeTensor(dtype, offset, rows * 64, path)
    return Part(PlacedTensor(spec, home, dtype, stored))


@st.composite
def layers(draw: st.DrawFn) -> list[Part]:
    """Parts one behind the other in their files, with gaps, in any order."""
    ends = {"a": draw(st.integers(0, 3000)) * 4, "b": 0}
    made = []
    for _ in range(draw(st.integers(0, 8))):
        path = draw(st.sampled_from(["a", "a", "b"]))
        ends[path] += 4 * draw(st.sampled_from([0, 0, 3, 1000, 20_000, 100_000]))
        rows = draw(st.integers(1, 2000))
        made.append(part(rows, ends[path], draw(st.sampled_from([Tier.CPU, Tier.DISK])), path))
        ends[path] += rows * 64
    return draw(st.permutations(made))


@given(parts=layers())
def test_a_slot_mirrors_the_file_and_no_two_parts_share_a_byte(parts):
    layout = slot_layout(parts)
    taken = []
    for item, offset in zip(layout.parts, layout.offsets, strict=True):
        taken.append((offset, offset + item.num_bytes))
        if item.tensor.home == Tier.CPU:
            assert offset % PACK_ALIGN == 0
            assert offset + item.num_bytes <= layout.pack_bytes
            continue
        (extent,) = [
            extent
            for extent in layout.extents
            if extent.path == item.tensor.stored.path
            and extent.slot_offset <= offset
            and offset + item.num_bytes <= extent.slot_offset + extent.num_bytes
        ]
        assert offset - extent.slot_offset == item.tensor.stored.offset - extent.file_offset
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert all(end <= layout.num_bytes for _, end in taken)


@given(parts=layers())
def test_reads_are_whole_blocks_end_to_end_and_never_overlap(parts):
    layout = slot_layout(parts)
    place = layout.pack_bytes
    assert place % ALIGN == 0
    for extent in layout.extents:
        assert extent.file_offset % ALIGN == extent.num_bytes % ALIGN == 0
        assert extent.slot_offset == place
        place += extent.num_bytes
    assert place == layout.num_bytes
    for one, other in zip(layout.extents, layout.extents[1:], strict=False):
        if one.path == other.path:
            assert other.file_offset > one.file_offset + one.num_bytes + COALESCE_GAP


def test_neighbours_are_read_as_one():
    parts = [part(100, 4 * 1024, Tier.DISK), part(100, 4 * 1024 + 6400, Tier.DISK)]
    assert len(slot_layout(parts).extents) == 1


def test_what_lies_far_apart_is_read_apart():
    parts = [part(100, 0, Tier.DISK), part(100, 2 * COALESCE_GAP, Tier.DISK)]
    assert len(slot_layout(parts).extents) == 2


def test_a_tensor_off_its_own_alignment_is_refused_with_the_way_out():
    with pytest.raises(ModelError, match=r"starts at byte 6.*save the checkpoint again"):
        slot_layout([part(100, 6, Tier.DISK)])


def test_a_slice_of_the_vocabulary_is_a_part_of_its_own():
    whole = part(100, 0, Tier.DISK)
    head = dataclasses.replace(whole, start=30, stop=50)
    assert head.shape == (20, 16)
    assert head.num_bytes == 20 * 64
    assert head.byte_offset == 30 * 64
    (extent,) = slot_layout([head]).extents
    assert extent.file_offset == 0
    assert extent.num_bytes == ALIGN
