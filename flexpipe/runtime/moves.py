"""Bytes between tiers: what reads, loads, stores and writes do, each over one link.

Shapes: T new tokens, E embedding width.
"""

from __future__ import annotations

import time

from flexpipe.plan.layer import LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.runtime.device import Device
from flexpipe.runtime.layout import Layouts, rows_of
from flexpipe.runtime.stores import Stores
from flexpipe.schedule.op import Op


class Moves:
    """Reads, loads, stores and writes of a stage."""

    def __init__(self, plan: Plan, device: Device, stores: Stores, layouts: Layouts) -> None:
        self._plan = plan
        self._device = device
        self._stores = stores
        self._buffers = stores.buffers
        self._layouts = layouts

    def read_weight(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._stores.weights.read(
            self._layer(op), slot=op.weight_slot, stage=op.stage_slot
        )
        self._device.disk_read.deliver(num_bytes, start)

    def load_weight(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.weight_slot is not None
        num_bytes = self._stores.weights.load_layer(
            self._layer(op), op.weight_slot, op.stage_slot, self._device.copy
        )
        self._device.h2d.deliver(num_bytes, start)

    def read_embed(self, op: Op) -> None:
        start = time.perf_counter()
        layout, buffers = self._layouts.of(rows_of(op)), self._buffers
        if self._plan.streams_to_device:
            rows_TE = buffers.staged_embed_rows(layout.source.num_new, op.stage_slot)
        else:
            rows_TE = buffers.embed_rows(layout.source.num_new, op.embed_slot)
        num_bytes = self._stores.weights.embedding_rows(layout.ids_T, rows_TE)
        self._device.disk_read.deliver(num_bytes, start)

    def load_embed(self, op: Op) -> None:
        start = time.perf_counter()
        num_tokens, buffers = rows_of(op).num_new, self._buffers
        source = buffers.staged_embed_rows(num_tokens, op.stage_slot)
        self._device.copy(buffers.embed_rows(num_tokens, op.embed_slot), source)
        self._device.h2d.deliver(source.nbytes, start)

    def read_cache(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._stores.kv_cache.read(
            rows_of(op), self._layer(op).decoder, slot=op.kv_slot, stage=op.stage_slot
        )
        self._device.disk_read.deliver(num_bytes, start)

    def load_cache(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.kv_slot is not None
        num_bytes = self._stores.kv_cache.load(
            rows_of(op),
            self._layer(op).decoder,
            slot=op.kv_slot,
            stage=op.stage_slot,
            copy=self._device.copy_pieces,
        )
        self._device.h2d.deliver(num_bytes, start)

    def store_cache(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.kv_slot is not None
        num_bytes = self._stores.kv_cache.store(
            rows_of(op),
            self._layer(op).decoder,
            slot=op.kv_slot,
            stage=op.stage_slot,
            copy=self._device.copy_pieces,
        )
        self._device.d2h.deliver(num_bytes, start)

    def write_cache(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._stores.kv_cache.write(
            rows_of(op), self._layer(op).decoder, slot=op.kv_slot, stage=op.stage_slot
        )
        self._device.disk_write.deliver(num_bytes, start)

    def read_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._stores.hidden.read(rows_of(op), slot=op.hidden_slot, stage=op.stage_slot)
        self._device.disk_read.deliver(num_bytes, start)

    def load_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.hidden_slot is not None
        num_bytes = self._stores.hidden.load(
            rows_of(op), slot=op.hidden_slot, stage=op.stage_slot, copy=self._device.copy
        )
        self._device.h2d.deliver(num_bytes, start)

    def store_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.hidden_slot is not None
        num_bytes = self._stores.hidden.store(
            rows_of(op), slot=op.hidden_slot, stage=op.stage_slot, copy=self._device.copy
        )
        self._device.d2h.deliver(num_bytes, start)

    def write_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._stores.hidden.write(rows_of(op), slot=op.hidden_slot, stage=op.stage_slot)
        self._device.disk_write.deliver(num_bytes, start)

    def move_query(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._stores.queries.move_queries(*self._query_places(op), self._device.copy)
        self._device.d2h.deliver(num_bytes, start)

    def move_output(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._stores.queries.move_outputs(*self._query_places(op), self._device.copy)
        self._device.h2d.deliver(num_bytes, start)

    def _query_places(self, op: Op) -> tuple[int, int, int, int]:
        """Slot and stage, new tokens, rows that attend on the CPU."""
        assert op.attention_slot is not None and op.stage_slot is not None
        num_tokens, num_rows = rows_of(op).num_new, self._layouts.of(rows_of(op)).num_cpu_rows
        return op.attention_slot, op.stage_slot, num_tokens, num_rows

    def fetch_tokens(self, op: Op) -> None:
        layout = self._layouts.of(rows_of(op))
        assert layout.tokens is not None
        count = len(layout.sampled)
        fetched = self._buffers.fetched[layout.source.index]
        for target, source in zip(fetched, layout.tokens, strict=True):
            target[:count].copy_(source, non_blocking=target.is_pinned())
        if self._plan.streams_to_device:
            num_bytes = sum(source.nbytes for source in layout.tokens)
            self._device.d2h.deliver(num_bytes, time.perf_counter())

    def _layer(self, op: Op) -> LayerPlan:
        return self._plan.layers[op.layer]
