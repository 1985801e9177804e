"""The KV cache: it belongs to rows, and a row's home is fixed by its place.

In one layer a row's keys and values are a run of tokens, [tokens, 2, K, D], token-major, so that
what is filled and what is new are one piece each. Rows of a micro-batch with the same home lie side
by side. Rows at home beside the compute device are used in place; the others pass through a slot,
where they lie side by side too: host rows first, then disk rows.

On disk a row is a stream of pages of `KV_PAGE` bytes. Only whole pages are written; the tail that
does not fill one waits in host memory and joins what is read.

A compressed cache is the same with the bytes of each head's compressed numbers for its numbers:
whatever is said in tokens holds, and bytes are those of the compressed form.

Shapes: R rows, L region length, 2 keys then values, K KV heads, X head_dim or compressed bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from flexpipe.memory.disk import DiskFile
from flexpipe.memory.tier import POISON, Piece, TierMemory, copy_pieces, spoil, torch_dtype
from flexpipe.plan.block import KV_PAGE, page_extents
from flexpipe.plan.plan import Plan
from flexpipe.plan.pools import NUM_KV_SLOTS, NUM_STAGES, PoolPlan
from flexpipe.plan.tier import Tier
from flexpipe.schedule.step import MicroBatch, Row

Copy = Callable[[Tensor, Tensor, Sequence[Piece]], None]  # to, from, pieces


class Where(StrEnum):
    """Where attention finds a row's cache."""

    DEVICE = "device"
    SLOT = "slot"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows whose regions lie side by side from `first` on: beside the device, in the slot, or on
    the cpu tier, where they attend."""

    where: Where
    first: int
    rows: tuple[Row, ...]


class KvCache:
    """Homes, slots and staging of all rows' keys and values."""

    def __init__(self, plan: Plan, memory: TierMemory, disk: DiskFile | None) -> None:
        self._plan = plan
        self._disk = disk
        compressed = plan.policy.cache_codec is not None
        self._dtype = torch.uint8 if compressed else torch_dtype(plan.compute_dtype)
        self._token_bytes = plan.token_bytes
        pools = {(pool.name, pool.tier): pool for pool in plan.pools}
        self._homes = {
            tier: _take(memory, plan, pools.get(("KV cache", tier)))
            for tier in (Tier.GPU, Tier.CPU)
        }
        self._tails = _take(memory, plan, pools.get(("KV tail pages", Tier.CPU)))
        self._slots = _take_slots(
            memory, plan, pools.get(("KV slots", plan.device_tier)), NUM_KV_SLOTS
        )
        staging = _take_slots(memory, plan, pools.get(("KV staging", Tier.CPU)), 2 * NUM_STAGES)
        self._read_stages, self._write_stages = staging[:NUM_STAGES], staging[NUM_STAGES:]
        self._bases = {tier: _bases(plan, tier) for tier in Tier}
        self._layer_rank = {layer: rank for rank, layer in enumerate(plan.decoder_layers)}
        self._disk_ranks = _disk_ranks(plan)
        self._slot_rank = [
            {place: rank for rank, place in enumerate(plan.slot_places(mb))}
            for mb in plan.micro_batches
        ]
        self._home_rank = [
            {place: rank for tier in Tier for rank, place in enumerate(mb.places(tier))}
            for mb in plan.micro_batches
        ]
        self._views: dict[tuple[Where, int, int], Tensor] = {}

    def runs(self, batch: MicroBatch) -> tuple[RowRun, ...]:
        """A micro-batch's rows by where attention finds them, those that attend on the CPU last."""
        placed: dict[Where, list[tuple[int, Row]]] = {where: [] for where in Where}
        for row in batch.rows:
            where = self._where(batch.index, row)
            ranks = self._slot_rank if where == Where.SLOT else self._home_rank
            placed[where].append((ranks[batch.index][row.place], row))
        return tuple(run for where in placed for run in _runs(where, placed[where]))

    def views(
        self, runs: Sequence[RowRun], batch: MicroBatch, layer: int, slot: int | None
    ) -> list[Tensor]:
        """One [R, L, 2, K, X] tensor per run, for decoder layer `layer`."""
        made = []
        for run in runs:
            whole = self._region(batch.index, layer, run.where, slot)
            made.append(whole[run.first : run.first + len(run.rows)])
        return made

    def read(self, batch: MicroBatch, layer: int, *, slot: int | None, stage: int | None) -> int:
        """READ_CACHE: what disk rows have behind them, into a slot or a stage. Bytes read."""
        assert self._disk is not None
        target = self._disk_rows(batch.index, slot, self._read_stages, stage)
        rows = [row for row in self._rows_at(batch, Tier.DISK) if row.num_context]
        place, spans = target.numpy(), []
        for first, num_bytes in self._extents(batch, rows):
            start = self._home_rank[batch.index][rows[first].place] * self._stride(batch.index)
            offset = self._file_offset(batch.index, layer, rows[first].place)
            spans.append((offset, num_bytes, place[start : start + num_bytes]))
        self._disk.read_spans(spans)
        self._join_tails(batch.index, layer, rows, target)
        return sum(num_bytes for _, num_bytes, _ in spans)

    def load(
        self, batch: MicroBatch, layer: int, *, slot: int, stage: int | None, copy: Copy
    ) -> int:
        """LOAD_CACHE: what off-device rows have behind them, from host memory into a slot."""
        return self._cross(batch, layer, slot, self._read_stages, stage, copy, into_slot=True)

    def store(
        self, batch: MicroBatch, layer: int, *, slot: int, stage: int | None, copy: Copy
    ) -> int:
        """STORE_CACHE: new tokens from a slot to host memory."""
        return self._cross(batch, layer, slot, self._write_stages, stage, copy, into_slot=False)

    def write(self, batch: MicroBatch, layer: int, *, slot: int | None, stage: int | None) -> int:
        """WRITE_CACHE: pages that new tokens filled go to disk, the tail stays here."""
        assert self._disk is not None and self._tails is not None
        source = self._disk_rows(batch.index, slot, self._write_stages, stage)
        rows = self._rows_at(batch, Tier.DISK)
        if stage is not None:
            self._join_tails(batch.index, layer, rows, source)
        spans, tails = [], []
        for row in rows:
            start = self._home_rank[batch.index][row.place] * self._stride(batch.index)
            begin, end = self._new_bytes(row)
            page, full = begin // KV_PAGE * KV_PAGE, end // KV_PAGE * KV_PAGE
            if full > page:
                offset = self._file_offset(batch.index, layer, row.place) + page
                pages = source[start + page : start + full].numpy()
                spans.append((offset, full - page, pages))
            keep = max(page, full)
            tail = self._tail_offset(batch.index, layer, row.place)
            tails.append(Piece(tail, start + keep, end - keep))
        copy_pieces(self._tails, source, tails)
        self._disk.write_spans(spans)
        return sum(num_bytes for _, num_bytes, _ in spans)

    def poison(
        self,
        *,
        slot: int | None = None,
        read_stage: int | None = None,
        write_stage: int | None = None,
    ) -> None:
        """Overwrite a slot or a stage with finite rubbish."""
        stages = (self._read_stages, read_stage), (self._write_stages, write_stage)
        spoil((self._slots, slot), *stages)

    def poison_all(self) -> None:
        homes = (*self._homes.values(), self._tails)
        for slab in (*homes, *self._slots, *self._read_stages, *self._write_stages):
            if slab is not None:
                slab.fill_(POISON)

    def swap_rows(self, mb: int, one: int, other: int) -> None:
        """Exchange two rows' caches at home: a fault that a parity test must notice."""
        home = self._plan.micro_batches[mb].kv_homes[one]
        assert home == self._plan.micro_batches[mb].kv_homes[other]
        for layer in self._plan.decoder_layers:
            a = self._home_row(mb, layer, home, one)
            b = self._home_row(mb, layer, home, other)
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    def _moving(self, batch: MicroBatch) -> Iterator[tuple[Tier, Row]]:
        mb = self._plan.micro_batches[batch.index]
        for row in batch.rows:
            if row.num_new and self._where(batch.index, row) == Where.SLOT:
                yield mb.kv_homes[row.place], row

    def _where(self, mb: int, row: Row) -> Where:
        if self._plan.micro_batches[mb].kv_homes[row.place] == self._plan.device_tier:
            return Where.DEVICE
        there = self._plan.row_attends_on_cpu(mb, row.place, row.num_new)
        return Where.CPU if there else Where.SLOT

    def _rows_at(self, batch: MicroBatch, tier: Tier) -> list[Row]:
        mb = self._plan.micro_batches[batch.index]
        return [row for row in batch.rows if mb.kv_homes[row.place] == tier and row.num_new]

    def _new_bytes(self, row: Row) -> tuple[int, int]:
        begin = row.num_context * self._token_bytes
        return begin, begin + row.num_new * self._token_bytes

    def _stride(self, mb: int) -> int:
        return self._plan.slot_region_bytes(self._plan.micro_batches[mb])

    def _region(self, mb: int, layer: int, where: Where, slot: int | None) -> Tensor:
        """All of a micro-batch's regions at home in one layer, or in a slot."""
        index = slot if where == Where.SLOT else layer
        assert index is not None
        key = (where, mb, index)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._make_region(*key)
        return view

    def _make_region(self, where: Where, mb: int, layer_or_slot: int) -> Tensor:
        plan, shape = self._plan, self._plan.micro_batches[mb]
        if where == Where.SLOT:
            slab, offset = self._slots[layer_or_slot], 0
            stride, count = self._stride(mb), len(plan.slot_places(shape))
        else:
            tier = plan.device_tier if where == Where.DEVICE else Tier.CPU
            home = self._homes[tier]
            assert home is not None
            slab, offset = home, self._home_offset(mb, layer_or_slot, tier)
            stride, count = shape.region_bytes(tier, self._token_bytes), len(shape.places(tier))
        num_kv, item = plan.config.num_kv_heads, self._dtype.itemsize
        row = (2, num_kv, self._token_bytes // (2 * num_kv * item))
        values = slab[offset : offset + stride * count].view(self._dtype)
        return values.as_strided(
            (count, shape.region_tokens, *row),
            (stride // item, self._token_bytes // item, row[1] * row[2], row[2], 1),
        )

    def _home_offset(self, mb: int, layer: int, tier: Tier) -> int:
        bases = self._bases[tier]
        return self._layer_rank[layer] * bases[-1] + bases[mb]

    def _home_row(self, mb: int, layer: int, tier: Tier, place: int) -> Tensor:
        home = self._homes[tier]
        assert home is not None
        start = self._row_offset(mb, layer, tier, place)
        num_bytes = self._plan.micro_batches[mb].region_bytes(tier, self._token_bytes)
        return home[start : start + num_bytes]

    def _row_offset(self, mb: int, layer: int, tier: Tier, place: int) -> int:
        num_bytes = self._plan.micro_batches[mb].region_bytes(tier, self._token_bytes)
        return self._home_offset(mb, layer, tier) + self._home_rank[mb][place] * num_bytes

    def _cross(
        self,
        batch: MicroBatch,
        layer: int,
        slot: int,
        stages: Sequence[Tensor],
        stage: int | None,
        copy: Copy,
        *,
        into_slot: bool,
    ) -> int:
        """Between a slot and host memory: rows at home there, and disk rows on their stage. What
        rows have behind them goes into the slot, what is new comes out of it. Bytes moved."""
        mb, stride = batch.index, self._stride(batch.index)
        pieces: dict[Tier, list[Piece]] = {Tier.CPU: [], Tier.DISK: []}
        for tier, row in self._moving(batch):
            in_slot = self._slot_rank[mb][row.place] * stride
            if tier == Tier.CPU:
                at_home = self._row_offset(mb, layer, tier, row.place)
            else:
                at_home = self._home_rank[mb][row.place] * stride
            begin, end = (0, self._new_bytes(row)[0]) if into_slot else self._new_bytes(row)
            ends = (in_slot, at_home) if into_slot else (at_home, in_slot)
            if end > begin:
                pieces[tier].append(Piece(ends[0] + begin, ends[1] + begin, end - begin))
        staged = None if stage is None else stages[stage]
        hosts = {Tier.CPU: self._homes[Tier.CPU], Tier.DISK: staged}
        for tier, some in pieces.items():
            if some:
                host, here = hosts[tier], self._slots[slot]
                assert host is not None
                copy(*((here, host) if into_slot else (host, here)), some)
        return sum(piece.num_bytes for some in pieces.values() for piece in some)

    def _disk_rows(
        self, mb: int, slot: int | None, stages: Sequence[Tensor], stage: int | None
    ) -> Tensor:
        """Where the disk rows of a micro-batch lie side by side in memory."""
        if stage is not None:
            return stages[stage]
        assert slot is not None
        shape = self._plan.micro_batches[mb]
        disk_rows = len(shape.places(Tier.DISK))
        others = len(self._plan.slot_places(shape)) - disk_rows
        return self._slots[slot][others * self._stride(mb) :]

    def _file_offset(self, mb: int, layer: int, place: int) -> int:
        region = self._plan.micro_batches[mb].region_bytes(Tier.DISK, self._token_bytes)
        return self._home_offset(mb, layer, Tier.DISK) + self._home_rank[mb][place] * region

    def _extents(self, batch: MicroBatch, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
        """(first row, bytes) of reads that cover every row's whole pages."""
        stride = self._stride(batch.index)
        ranks = [self._home_rank[batch.index][row.place] for row in rows]
        full = [row.num_context * self._token_bytes // KV_PAGE * KV_PAGE for row in rows]
        return page_extents(ranks, full, stride)

    def _tail_offset(self, mb: int, layer: int, place: int) -> int:
        rank = self._layer_rank[layer] * len(self._disk_ranks) + self._disk_ranks[mb, place]
        return rank * KV_PAGE

    def _join_tails(self, mb: int, layer: int, rows: Sequence[Row], target: Tensor) -> None:
        """Put the bytes that wait in host memory behind the whole pages of each row."""
        assert self._tails is not None
        pieces = []
        for row in rows:
            end = row.num_context * self._token_bytes
            page = end // KV_PAGE * KV_PAGE
            start = self._home_rank[mb][row.place] * self._stride(mb)
            pieces.append(Piece(start + page, self._tail_offset(mb, layer, row.place), end - page))
        copy_pieces(target, self._tails, pieces)


def _runs(where: Where, placed: Sequence[tuple[int, Row]]) -> Iterator[RowRun]:
    placed = sorted(placed, key=lambda item: item[0])
    start = 0
    for index in range(1, len(placed) + 1):
        if index == len(placed) or placed[index][0] != placed[index - 1][0] + 1:
            rows = tuple(row for _, row in placed[start:index])
            yield RowRun(where, placed[start][0], rows)
            start = index


def _bases(plan: Plan, tier: Tier) -> list[int]:
    """Offsets of the micro-batches in one layer of a tier's home; the last is the layer's size."""
    bases = [0]
    for mb in plan.micro_batches:
        size = len(mb.places(tier)) * mb.region_bytes(tier, plan.token_bytes)
        bases.append(bases[-1] + size)
    return bases


def _disk_ranks(plan: Plan) -> dict[tuple[int, int], int]:
    places = [(mb.index, place) for mb in plan.micro_batches for place in mb.places(Tier.DISK)]
    return {key: rank for rank, key in enumerate(places)}


def _take(memory: TierMemory, plan: Plan, pool: PoolPlan | None) -> Tensor | None:
    if pool is None:
        return None
    if pool.tier == plan.device_tier:
        return memory.take_on_device(pool.num_bytes, pool.name)
    return memory.take_on_host(pool.num_bytes, pool.name)


def _take_slots(memory: TierMemory, plan: Plan, pool: PoolPlan | None, count: int) -> list[Tensor]:
    if pool is None:
        return []
    assert pool.num_slots == count
    single = PoolPlan(name=pool.name, tier=pool.tier, slot_bytes=pool.slot_bytes)
    slabs = [_take(memory, plan, single) for _ in range(count)]
    return [slab for slab in slabs if slab is not None]
