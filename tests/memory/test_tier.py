"""Claims about taking a tier's memory: resident at once, page-locked where that is allowed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import PlanError
from flexpipe.memory import tier
from flexpipe.memory.tier import Piece, TierMemory, copy_pieces
from flexpipe.plan.hardware import rss_bytes
from flexpipe.plan.tier import Tier

MIB = 1 << 20
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class FakeRuntime:
    """Stands where CUDA's runtime would; refuses the calls to lock that `refused` names."""

    def __init__(self, *refused: int) -> None:
        self._refused = refused
        self._num_calls = 0
        self.locked: dict[int, int] = {}
        self.forgotten = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self._num_calls += 1
        assert num_bytes > 0 and address not in self.locked
        if self._num_calls in self._refused:
            return OUT_OF_MEMORY
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def forget(self, device: torch.device) -> None:
        self.forgotten += 1


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TierMemory, FakeRuntime]]:
    """`pinning(2, 3)`: a memory that pins, and a runtime that refuses slabs 2 and 3."""

    def make(*refused: int) -> tuple[TierMemory, FakeRuntime]:
        runtime = FakeRuntime(*refused)
        monkeypatch.setattr(tier, "_cudart", lambda: runtime)
        monkeypatch.setattr(tier, "_forget_error", runtime.forget)
        monkeypatch.setattr(tier, "_reset_peak", lambda device: None)
        return TierMemory(torch.device("cuda"), pin=True), runtime

    return make


def test_host_slabs_are_locked_to_the_byte_and_unlocked_at_the_end(pinning: Any) -> None:
    memory, runtime = pinning()
    sizes = [3 * MIB + 512, 1000, 5 * MIB]
    slabs = [memory.take_on_host(size, "weights") for size in sizes]
    assert runtime.locked == {slab.data_ptr(): slab.numel() for slab in slabs}
    assert [slab.numel() for slab in slabs] == sizes
    assert (memory.pinned_bytes, memory.unpinned_bytes) == (sum(sizes), 0)
    memory.close()
    memory.close()  # a second time
    assert runtime.locked == {}


def test_what_cannot_be_locked_is_told_once_and_works_all_the_same(
    pinning: Any, caplog: pytest.LogCaptureFixture
) -> None:
    memory, runtime = pinning(2, 3)
    with caplog.at_level(logging.WARNING, logger="flexpipe"):
        slabs = [memory.take_on_host(size * MIB, f"slab {size}") for size in (1, 2, 3, 4)]
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("2 MiB of host memory for slab 2 could not be page-locked after 1 MiB")
    assert "copies from there are synchronous" in text
    assert (memory.pinned_bytes, memory.unpinned_bytes) == (5 * MIB, 5 * MIB)
    assert runtime.forgotten == 2, "the next kernel would be blamed"
    assert all(int(slab.fill_(7)[-1]) == 7 for slab in slabs)
    memory.close()
    assert runtime.locked == {}


def test_an_empty_slab_is_not_locked(pinning: Any) -> None:
    memory, runtime = pinning()
    assert memory.take_on_host(0, "nothing").numel() == 0
    assert runtime.locked == {}


def test_nothing_is_locked_where_the_policy_or_the_device_does_not_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tier, "_cudart", lambda: pytest.fail("it was asked to"))
    TierMemory(torch.device("cpu"), pin=True).take_on_host(MIB, "weights")
    monkeypatch.setattr(tier, "_reset_peak", lambda device: None)
    TierMemory(torch.device("cuda"), pin=False).take_on_host(MIB, "weights")


def test_memory_is_resident_from_the_start_and_the_bytes_go_back() -> None:
    memory = TierMemory(torch.device("cpu"), pin=True)
    before = rss_bytes()
    slab = memory.take_on_device(64 * MIB + 100, "weights")
    assert abs(rss_bytes() - before - 64 * MIB) < 3 * MIB
    assert slab.numel() == 64 * MIB + 100 and slab.data_ptr() % 4096 == 0
    assert not slab.any()
    assert memory.emulated_bytes(Tier.GPU) == memory.peak_device_bytes() == slab.numel()
    assert memory.emulated_bytes(Tier.CPU) == 0
    del slab
    assert rss_bytes() - before < 3 * MIB


def test_memory_that_the_system_refuses_is_a_plan_error_with_advice() -> None:
    memory = TierMemory(torch.device("cpu"), pin=False)
    with pytest.raises(PlanError, match=r"refused 64 TiB of memory for weights.*Lower --cpu-mem"):
        memory.take_on_host(1 << 46, "weights")


# -- copying and touching -------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 3 * tier._AT_ONCE)), min_size=1, max_size=8
    )
)
def test_pieces_of_any_size_arrive_and_nothing_else_changes(
    drawn: list[tuple[int, int]],
) -> None:
    """Gaps and sizes; in the other slab the pieces lie in reverse."""
    sizes = [size for _, size in drawn]
    source = torch.arange(sum(sizes) + 7, dtype=torch.int64).to(torch.uint8)
    target = torch.full((sum(sizes) + sum(gap for gap, _ in drawn) + 1,), 77, dtype=torch.uint8)
    expected, pieces = target.clone(), []
    at, end = 0, sum(sizes)
    for gap, size in drawn:
        at, end = at + gap, end - size
        pieces.append(Piece(at, end, size))
        expected[at : at + size] = source[end : end + size]
        at += size
    copy_pieces(target, source, pieces)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("num_bytes", [1, 5 * MIB, 17 * MIB, 64 * MIB + 12345])
def test_memory_is_zeroed_and_there_however_it_is_parted(num_bytes: int) -> None:
    before = rss_bytes()
    slab = tier.populated(num_bytes, "a test")
    assert slab.numel() == num_bytes and rss_bytes() - before > num_bytes - 2 * MIB
    assert not slab.any()


def test_where_the_system_cannot_populate_pages_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tier, "_MADV_POPULATE_WRITE", 9999)
    before = rss_bytes()
    slab = tier.populated(40 * MIB, "a test")
    assert rss_bytes() - before > 38 * MIB and not slab.any()
