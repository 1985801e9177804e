"""What of a micro-batch costs anything: rows sorted by where they attend, and what moves for them.

Tokens: T new ones of a micro-batch. Attended: keys that new tokens see, summed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from flexpipe.model.cost import num_attended
from flexpipe.plan.block import KV_PAGE, MicroBatchPlan, page_extents
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.schedule.step import MicroBatch, Row


@dataclass(frozen=True, slots=True)
class Attention:
    """Rows that attend together: their number, new tokens each, and the keys those see in all."""

    rows: int
    num_new: int
    attended: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a micro-batch costs anything.

    Attention of rows here and on the CPU is by window, then by new tokens. Moves are tokens: those
    behind rows whose KV cache must be loaded or read, and the new ones that go home; `extents` are
    the pieces that reads and writes come in.
    """

    num_new: int
    num_rows: int
    num_sampled: int
    num_on_cpu: int
    here: Mapping[int | None, tuple[Attention, ...]]
    on_cpu: Mapping[int | None, tuple[Attention, ...]]
    load_tokens: int
    load_rows: int
    store_tokens: int
    store_rows: int
    read_bytes: int
    read_extents: int
    write_bytes: int
    write_extents: int
    disk_rows: int  # whose new tokens go to disk, or wait for their page to fill
    num_groups: int = 1  # of rows beside each other that attend here in one call


def shape_of(
    batch: MicroBatch, plan: Plan, windows: tuple[int | None, ...], *, averaged: bool
) -> Shape:
    """Sort a micro-batch's rows by what they cost."""
    mb = plan.micro_batches[batch.index]
    here: list[Row] = []
    on_cpu: list[Row] = []
    moving: list[Row] = []
    disk: list[Row] = []
    for row in batch.rows:
        home = mb.kv_homes[row.place]
        away = plan.row_attends_on_cpu(batch.index, row.place, row.num_new)
        (on_cpu if away else here).append(row)
        if home != plan.device_tier and not away:
            moving.append(row)
        if home == Tier.DISK:
            disk.append(row)
    read, write = _reads(disk, plan, mb), (_mean_writes if averaged else _writes)(disk, plan)
    loaded = [row for row in moving if row.num_context]
    return Shape(
        num_new=batch.num_new,
        num_rows=len(batch.rows),
        num_sampled=batch.num_sampled,
        num_on_cpu=len(on_cpu),
        here={window: _attention(here, window) for window in windows},
        on_cpu={window: _attention(on_cpu, window) for window in windows},
        load_tokens=sum(row.num_context for row in loaded),
        load_rows=len(loaded),
        store_tokens=sum(row.num_new for row in moving),
        store_rows=len(moving),
        read_bytes=read[0],
        read_extents=read[1],
        write_bytes=write[0],
        write_extents=write[1],
        disk_rows=len(disk),
        num_groups=_num_groups(here, plan, mb),
    )


def _num_groups(rows: list[Row], plan: Plan, mb: MicroBatchPlan) -> int:
    """Calls that these rows attend in: neighbours at home, or in a slot, that do the same.

    An empty place between rows that do the same parts them too, but that call is not counted: with
    it a job with refill, whose tail is full of empty places, was told to decode a quarter too long.
    """
    at_home = [row for row in rows if mb.kv_homes[row.place] == plan.device_tier]
    in_slot = [row for row in rows if mb.kv_homes[row.place] != plan.device_tier]
    return sum(1 for some in (at_home, in_slot) for _ in groupby(map(_doing, some)))


def _doing(row: Row) -> tuple[int, int] | None:
    """Rows that decode attend together whatever is behind them, others only if equal."""
    return None if row.num_new == 1 else (row.num_context, row.num_new)


def _attention(rows: list[Row], window: int | None) -> tuple[Attention, ...]:
    """Decoding rows are one call; others by their new tokens."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        into = sums[row.num_new]
        into[0] += 1
        into[1] += num_attended(row.num_context, row.num_new, window)
    return tuple(Attention(count, new, attended) for new, (count, attended) in sums.items())


def _reads(rows: list[Row], plan: Plan, mb: MicroBatchPlan) -> tuple[int, int]:
    """Bytes and pieces of whole pages behind rows whose KV cache is on disk."""
    ranks = {place: rank for rank, place in enumerate(mb.places(Tier.DISK))} if rows else {}
    sizes = [row.num_context * plan.token_bytes // KV_PAGE * KV_PAGE for row in rows]
    extents = page_extents([ranks[row.place] for row in rows], sizes, plan.slot_region_bytes(mb))
    read = [num_bytes for _, num_bytes in extents]
    return sum(read), len(read)


def _writes(rows: list[Row], plan: Plan) -> tuple[int, int]:
    """Bytes and pieces of the pages that new tokens fill."""
    total = pieces = 0
    for row in rows:
        begin = row.num_context * plan.token_bytes // KV_PAGE
        end = (row.num_context + row.num_new) * plan.token_bytes // KV_PAGE
        total += (end - begin) * KV_PAGE
        pieces += end > begin
    return total, pieces


def _mean_writes(rows: list[Row], plan: Plan) -> tuple[int, int]:
    """The same where rows that decode are at any place of a page."""
    decoding = [row for row in rows if row.num_new == 1]
    total, pieces = _writes([row for row in rows if row.num_new > 1], plan)
    share = min(1.0, plan.token_bytes / KV_PAGE)
    return total + len(decoding) * plan.token_bytes, pieces + round(len(decoding) * share)
