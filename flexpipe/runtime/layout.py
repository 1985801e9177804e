"""The rows of a step's micro-batch in the order they lie here, and the tensors that follow from it.

A schedule tells rows by their places; where their KV cache rests decides which lie beside each
other. Whichever op needs a micro-batch's layout first makes it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from flexpipe.memory.kv_cache import KvCache, RowRun, Where
from flexpipe.memory.tier import torch_dtype
from flexpipe.model.batch import Batch, RopeTable, RowSpan
from flexpipe.plan.plan import Plan
from flexpipe.runtime.device import Device
from flexpipe.schedule.op import Op
from flexpipe.schedule.step import MicroBatch, Row


@dataclass(slots=True)
class Layout:
    """A micro-batch of one step as compute sees it; the batch itself is made by its first
    COMPUTE."""

    source: MicroBatch
    runs: tuple[RowRun, ...]
    ids_T: Tensor  # of rows of the embedding here
    absent_T: Tensor | None  # tokens whose row another shard has
    sampled: tuple[Row, ...]
    batch: Batch | None = None
    cpu_batch: Batch | None = None  # of the rows that attend on the CPU
    tokens: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> list[Row]:
        return [row for run in self.runs for row in run.rows]

    @property
    def cpu_runs(self) -> tuple[RowRun, ...]:
        """They are the last ones."""
        return tuple(run for run in self.runs if run.where == Where.CPU)

    @property
    def device_runs(self) -> tuple[RowRun, ...]:
        """The runs before those of the CPU."""
        return self.runs[: len(self.runs) - len(self.cpu_runs)]

    @property
    def num_cpu_rows(self) -> int:
        """Rows that attend on the CPU; each has one new token, behind all others."""
        return sum(len(run.rows) for run in self.cpu_runs)

    def ascending(self) -> Tensor | None:
        """Where the tokens of rows by ascending place lie here, [T]; None where they lie so."""
        rows = self.rows
        if all(one.place < other.place for one, other in pairwise(rows)):
            return None
        ends = accumulate(row.num_new for row in rows)
        spans = {
            row.place: range(end - row.num_new, end) for row, end in zip(rows, ends, strict=True)
        }
        ascending = chain.from_iterable(spans[place] for place in sorted(spans))
        return torch.tensor(list(ascending), dtype=torch.int64)


def rows_of(op: Op) -> MicroBatch:
    """The micro-batch of an op that is about one."""
    assert op.batch is not None
    return op.batch


class Layouts:
    """The layout of each micro-batch in its present step."""

    def __init__(self, plan: Plan, device: Device, kv_cache: KvCache) -> None:
        self._plan = plan
        self._device = device
        self._kv_cache = kv_cache
        self._dtype = torch_dtype(plan.compute_dtype)
        rope, head_dim = plan.config.rope, plan.config.head_dim
        self._rope = RopeTable.build(rope, head_dim, device.torch_device) if rope else None
        self._known: dict[int, Layout] = {}
        self._lock = threading.Lock()

    def of(self, source: MicroBatch) -> Layout:
        with self._lock:
            layout = self._known.get(source.index)
            if layout is None or layout.source is not source:
                layout = self._known[source.index] = self._make(source)
            return layout

    def batch(self, layout: Layout) -> Batch:
        """What its COMPUTEs share on the device."""
        if layout.batch is None:
            layout.batch = Batch.build(
                self._plan.config,
                _spans(layout.runs),
                self._rope,
                self._device.upload,
                self._dtype,
                kv_codec=self._plan.policy.cache_codec,
                num_elsewhere=len(layout.cpu_runs),
            )
        return layout.batch

    def cpu_batch(self, layout: Layout) -> Batch:
        """What attention on the CPU shares over the layers."""
        if layout.cpu_batch is None:
            layout.cpu_batch = Batch.build(
                self._plan.config,
                _spans(layout.cpu_runs),
                None,
                lambda index: index,
                self._dtype,
                kv_codec=self._plan.policy.cache_codec,
            )
        return layout.cpu_batch

    def _make(self, source: MicroBatch) -> Layout:
        runs = self._kv_cache.runs(source)
        rows = [row for run in runs for row in run.rows]
        ids = list(chain.from_iterable(row.tokens for row in rows)) if self._plan.embeds else []
        sampled = tuple(row for row in rows if row.sampled)
        ids_T, absent_T = torch.tensor(ids, dtype=torch.int64), None
        if self._plan.config.is_split:
            here = self._plan.config.vocab_rows
            ids_T -= here.start
            absent_T = (ids_T < 0) | (ids_T >= len(here))
            ids_T.masked_fill_(absent_T, 0)
        return Layout(source, runs, ids_T, absent_T, sampled)


def _spans(runs: Sequence[RowRun]) -> list[list[RowSpan]]:
    return [
        [RowSpan(row.num_context, row.num_new, row.sampled) for row in run.rows] for run in runs
    ]
