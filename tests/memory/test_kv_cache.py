"""The KV cache gives back what rows appended, wherever their homes are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexpipe.memory.disk import DiskFile
from flexpipe.memory.kv_cache import KvCache, Where
from flexpipe.memory.tier import TierMemory, copy_pieces
from flexpipe.plan.block import KV_PAGE, Need
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Shares
from flexpipe.plan.pools import NUM_KV_SLOTS, NUM_STAGES
from flexpipe.plan.tier import Tier
from flexpipe.schedule.step import MicroBatch, Row
from tests.schedule.plans import tiny_config, tiny_plan

TOKENS_PER_PAGE = KV_PAGE // 512  # the tiny model's token takes 512 bytes in a layer
Contents = dict[tuple[int, int, int], Tensor]  # (layer, micro-batch, place) -> [tokens, 2, K, D]


def cache_plan(
    tier: Tier, kv_cache: Shares, *, rows: int = 4, tokens: int = 140, compress: str = "none"
) -> Plan:
    return tiny_plan(
        tier=tier,
        config=tiny_config(num_hidden_layers=2),
        needs=[Need(tokens - 4, 4)] * (2 * rows),
        kv_cache=kv_cache,
        micro_batch_size=rows,
        num_micro_batches=2,
        compress_cache=compress,
    )


@contextmanager
def opened(plan: Plan, path: Path) -> Iterator[KvCache]:
    memory = TierMemory(torch.device("cpu"), pin=False)
    on_disk = sum(
        pool.num_bytes for pool in plan.pools if (pool.name, pool.tier) == ("KV cache", Tier.DISK)
    )
    path.unlink(missing_ok=True)
    with DiskFile(path, "rw") as file:
        file.reserve(max(on_disk, 4096))
        yield KvCache(plan, memory, file)


class Driver:
    """Does to a cache what a schedule's ops do, one layer of one micro-batch after the other."""

    def __init__(self, plan: Plan, cache: KvCache) -> None:
        self.plan, self.cache = plan, cache
        self.contents: Contents = {}
        self._turn = 0
        self._random = torch.Generator().manual_seed(0)

    def step(self, batch: MicroBatch) -> None:
        for layer in range(self.plan.config.num_layers):
            self._turn += 1
            self._layer(batch, layer, self._turn % NUM_KV_SLOTS, self._turn % NUM_STAGES)

    def _layer(self, batch: MicroBatch, layer: int, slot: int, stage: int) -> None:
        plan, cache = self.plan, self.cache
        homes = plan.micro_batches[batch.index].kv_homes
        tiers = {homes[row.place] for row in batch.rows}
        on_way = stage if plan.streams_to_device and Tier.DISK in tiers else None
        in_slot = None if plan.streams_to_device else slot
        if tiers - {plan.device_tier}:
            cache.poison(slot=slot, read_stage=on_way, write_stage=on_way)
        if Tier.DISK in tiers:
            cache.read(batch, layer, slot=in_slot, stage=on_way)
        if plan.streams_to_device and tiers - {Tier.GPU}:
            cache.load(batch, layer, slot=slot, stage=on_way, copy=copy_pieces)
        self._compute(batch, layer, slot)
        if plan.streams_to_device and tiers - {Tier.GPU}:
            cache.store(batch, layer, slot=slot, stage=on_way, copy=copy_pieces)
            cache.poison(slot=slot)
        if Tier.DISK in tiers:
            cache.write(batch, layer, slot=in_slot, stage=on_way)

    def _compute(self, batch: MicroBatch, layer: int, slot: int) -> None:
        """Check what rows have behind them, then append to it."""
        runs = self.cache.runs(batch)
        assert sorted(row.place for run in runs for row in run.rows) == [
            row.place for row in batch.rows
        ]
        for run, kv_RL2KD in zip(runs, self.cache.views(runs, batch, layer, slot), strict=True):
            for row, kv_L2KD in zip(run.rows, kv_RL2KD, strict=True):
                self._append(layer, batch.index, row, kv_L2KD)

    def _append(self, layer: int, mb: int, row: Row, kv_L2KD: Tensor) -> None:
        key = (layer, mb, row.place)
        behind = self.contents.get(key, kv_L2KD[:0].clone())[: row.num_context]
        assert torch.equal(kv_L2KD[: row.num_context], behind)
        new = self._numbers((row.num_new, *kv_L2KD.shape[1:]), kv_L2KD.dtype)
        kv_L2KD[row.num_context : row.num_context + row.num_new] = new
        self.contents[key] = torch.cat([behind, new])

    def _numbers(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(256, shape, dtype=dtype, generator=self._random)
        return torch.randn(shape, generator=self._random)


SHARES = {
    Tier.GPU: [
        Shares(gpu=1.0),
        Shares(cpu=1.0),
        Shares(disk=1.0),
        Shares(gpu=0.25, cpu=0.25, disk=0.5),
        Shares(cpu=0.5, disk=0.5),
        Shares(gpu=0.5, disk=0.5),
    ],
    Tier.CPU: [Shares(cpu=1.0), Shares(disk=1.0), Shares(cpu=0.5, disk=0.5)],
}
CASES = [(tier, shares) for tier, several in SHARES.items() for shares in several]
# around pages and whole ones
NEW = st.sampled_from([1, 1, 2, TOKENS_PER_PAGE - 1, TOKENS_PER_PAGE, TOKENS_PER_PAGE + 1, 50])


@st.composite
def appends(draw: st.DrawFn, plan: Plan, num_new: st.SearchStrategy[int] = NEW) -> list[MicroBatch]:
    """Steps in which some rows append some tokens, and some begin anew."""
    lengths: dict[tuple[int, int], int] = {}
    made = []
    for number in range(draw(st.integers(1, 8))):
        mb = draw(st.integers(0, 1))
        rows = []
        for place in sorted(draw(st.sets(st.integers(0, 3), min_size=1))):
            length = lengths.get((mb, place), 0)
            if draw(st.integers(0, 9)) == 0:
                length = 0
            new = min(draw(num_new), plan.micro_batches[mb].region_tokens - length)
            if new:
                lengths[mb, place] = length + new
                rows.append(Row(number, place, length, (3,) * new, True))
        if rows:
            made.append(MicroBatch(mb, tuple(rows)))
    return made


@pytest.mark.parametrize(("tier", "shares"), CASES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_finds_what_it_appended_in_every_later_step(tmp_path, tier, shares, data):
    plan = cache_plan(tier, shares)
    with opened(plan, tmp_path / "kv.bin") as cache:
        driver = Driver(plan, cache)
        for batch in data.draw(appends(plan)):
            driver.step(batch)


# 4 KV heads of 16 numbers: 8 rows of 16 codes, a step and a smallest are 160 bytes a token
@pytest.mark.parametrize(("tier", "shares"), CASES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokens_that_no_page_is_a_multiple_of_are_found_again(tmp_path, tier, shares, data):
    """A compressed token's bytes may lie on both sides of a page's end."""
    plan = cache_plan(tier, shares, tokens=330, compress="8")
    assert plan.token_bytes == 160 and KV_PAGE % 160
    with opened(plan, tmp_path / "kv.bin") as cache:
        driver = Driver(plan, cache)
        for batch in data.draw(appends(plan, st.sampled_from([1, 1, 2, 102, 103, 150]))):
            driver.step(batch)


@pytest.mark.parametrize(("bits", "token_bytes"), [("4", 96), ("8", 160)])
def test_a_compressed_cache_takes_and_moves_the_bytes_of_its_form(tmp_path, bits, token_bytes):
    plan = cache_plan(Tier.GPU, Shares(gpu=0.25, cpu=0.25, disk=0.5), tokens=400, compress=bits)
    homes = {pool.tier: pool.num_bytes for pool in plan.pools if pool.name == "KV cache"}
    region = 400 * token_bytes
    pages = -(-region // KV_PAGE) * KV_PAGE
    assert homes == {Tier.GPU: 4 * region, Tier.CPU: 4 * region, Tier.DISK: 8 * pages}
    with opened(plan, tmp_path / "kv.bin") as cache:
        Driver(plan, cache).step(whole(0, 0, 350))
        batch, full = whole(0, 350, 3), 350 * token_bytes // KV_PAGE * KV_PAGE
        assert 2 * full <= cache.read(batch, 0, slot=None, stage=0) <= full + pages
        moved = {"slot": 0, "stage": 0, "copy": copy_pieces}
        assert cache.load(batch, 0, **moved) == 3 * 350 * token_bytes
        assert cache.store(batch, 0, **moved) == 3 * 3 * token_bytes


def whole(index: int, context: int, new: int, *, rows: int = 4) -> MicroBatch:
    return MicroBatch(
        index, tuple(Row(place, place, context, (3,) * new, True) for place in range(rows))
    )


def test_only_whole_pages_are_written_and_read(tmp_path):
    plan = cache_plan(Tier.GPU, Shares(disk=1.0))
    with opened(plan, tmp_path / "kv.bin") as cache:
        driver = Driver(plan, cache)
        driver.step(whole(0, 0, TOKENS_PER_PAGE - 1))
        batch = whole(0, TOKENS_PER_PAGE - 1, 2)
        assert cache.read(batch, 0, slot=None, stage=0) == 0  # all of it waits in memory
        assert cache.load(batch, 0, slot=0, stage=0, copy=copy_pieces) == 4 * 31 * 512
        cache.store(batch, 0, slot=0, stage=0, copy=copy_pieces)
        assert cache.write(batch, 0, slot=None, stage=0) == 4 * KV_PAGE
        assert cache.read(whole(0, TOKENS_PER_PAGE + 1, 1), 0, slot=None, stage=0) >= 4 * KV_PAGE


def test_only_new_tokens_travel_home():
    plan = cache_plan(Tier.GPU, Shares(cpu=1.0))
    memory = TierMemory(torch.device("cpu"), pin=False)
    cache = KvCache(plan, memory, None)
    batch = whole(0, 100, 1)
    assert cache.load(batch, 1, slot=0, stage=None, copy=copy_pieces) == 4 * 100 * 512
    assert cache.store(batch, 1, slot=0, stage=None, copy=copy_pieces) == 4 * 512


def test_rows_beside_the_device_are_used_in_place_and_the_others_in_the_slot():
    plan = cache_plan(Tier.GPU, Shares(gpu=0.5, cpu=0.5))
    cache = KvCache(plan, TierMemory(torch.device("cpu"), pin=False), None)
    homes = plan.micro_batches[0].kv_homes
    runs = cache.runs(whole(0, 5, 1))
    for run in runs:
        for row in run.rows:
            assert (run.where == Where.SLOT) is (homes[row.place] != Tier.GPU)
    assert [run.where for run in runs] == [Where.DEVICE, Where.SLOT]
    assert all(len(run.rows) == 2 for run in runs)


def test_neighbouring_rows_are_one_run_and_a_gap_makes_two():
    plan = cache_plan(Tier.CPU, Shares(cpu=1.0))
    cache = KvCache(plan, TierMemory(torch.device("cpu"), pin=False), None)
    rows = whole(0, 5, 1).rows
    assert [len(run.rows) for run in cache.runs(MicroBatch(0, rows))] == [4]
    apart = MicroBatch(0, (rows[0], rows[2], rows[3]))
    assert [(run.first, len(run.rows)) for run in cache.runs(apart)] == [(0, 1), (2, 2)]


@pytest.mark.parametrize("shares", [Shares(gpu=1.0), Shares(cpu=1.0)])
def test_swapping_two_rows_exchanges_their_contents_in_every_layer(tmp_path, shares):
    plan = cache_plan(Tier.GPU, shares)
    with opened(plan, tmp_path / "kv.bin") as cache:
        driver = Driver(plan, cache)
        driver.step(whole(0, 0, 7))
        cache.swap_rows(0, 1, 3)
        for layer in range(2):
            one, other = (layer, 0, 1), (layer, 0, 3)
            contents = driver.contents
            contents[one], contents[other] = contents[other], contents[one]
        driver.step(whole(0, 7, 1))


def test_the_pools_taken_are_those_that_were_planned():
    for tier, shares in CASES:
        plan = cache_plan(tier, shares)
        memory = TierMemory(torch.device("cpu"), pin=False)
        taken: list[int] = []
        take_on_host = memory.take_on_host

        def counted(
            num_bytes: int, what: str, taken: list[int] = taken, take: object = take_on_host
        ) -> Tensor:
            taken.append(num_bytes)
            return take(num_bytes, what)  # type: ignore[operator]

        memory.take_on_host = counted  # type: ignore[method-assign]
        KvCache(plan, memory, None)
        pools = [pool for pool in plan.pools if pool.name.startswith("KV")]
        device = sum(pool.num_bytes for pool in pools if pool.tier == tier)
        host = sum(pool.num_bytes for pool in pools if pool.tier == Tier.CPU != tier)
        assert memory.peak_device_bytes() == device
        assert sum(taken) == host
