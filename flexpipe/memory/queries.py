"""Queries, keys and values between the segments of a layer whose attention is parted.

A micro-batch's lie in an attention slot beside the device; those of the rows that attend on the CPU
lie behind them once more, in one piece, which travels to a host stage and comes back as outputs.

Shapes: T new tokens, R rows that attend on the CPU (one new token each), N query heads, K KV heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flexpipe.memory.tier import POISON, TierMemory, torch_dtype, typed
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier

Copy = Callable[[Tensor, Tensor], None]


class QueryStore:
    """Attention slots and host stages; none where no row attends on the CPU."""

    def __init__(self, plan: Plan, memory: TierMemory) -> None:
        self._plan = plan
        self._dtype = torch_dtype(plan.compute_dtype)
        pools = {(pool.name, pool.tier): pool for pool in plan.pools}
        slots = pools.get(("attention slots", plan.device_tier))
        stages = pools.get(("query staging", Tier.CPU))
        self._slots = [
            memory.take_on_device(slots.slot_bytes, slots.name)
            for _ in range(slots.num_slots if slots else 0)
            if slots
        ]
        self._stages = [
            memory.take_on_host(stages.slot_bytes, stages.name)
            for _ in range(stages.num_slots if stages else 0)
            if stages
        ]

    def view(self, slot: int, num_tokens: int) -> Tensor:
        """All of a micro-batch, [T, N + 2 K, D]."""
        config = self._plan.config
        heads = config.num_heads + 2 * config.num_kv_heads
        return typed(self._slots[slot], self._dtype, (num_tokens, heads, config.head_dim))

    def leaving(self, slot: int, num_tokens: int, rows: int) -> tuple[Tensor, Tensor]:
        """Queries [R, N, D], then keys and values [R, 2, K, D], of rows that attend elsewhere."""
        return self._parted(self._leaving(slot, num_tokens, rows), rows)

    def staged(self, stage: int, rows: int) -> tuple[Tensor, Tensor]:
        """The same on a stage."""
        return self._parted(self._staged(stage, rows), rows)

    def move_queries(self, slot: int, stage: int, num_tokens: int, rows: int, copy: Copy) -> int:
        """MOVE_QUERY: from a slot to a stage. Bytes moved."""
        source = self._leaving(slot, num_tokens, rows)
        copy(self._staged(stage, rows), source)
        return source.nbytes

    def move_outputs(self, slot: int, stage: int, num_tokens: int, rows: int, copy: Copy) -> int:
        """MOVE_OUTPUT: outputs, which took the queries' place, back to the slot. Bytes moved."""
        source, _ = self.staged(stage, rows)
        target, _ = self.leaving(slot, num_tokens, rows)
        copy(target, source)
        return source.nbytes

    def poison(self, *, slot: int | None = None, stage: int | None = None) -> None:
        """Overwrite a slot or a stage with rubbish."""
        for slabs, index in ((self._slots, slot), (self._stages, stage)):
            if index is not None:
                slabs[index].fill_(POISON)

    def poison_all(self) -> None:
        for slab in (*self._slots, *self._stages):
            slab.fill_(POISON)

    def _leaving(self, slot: int, num_tokens: int, rows: int) -> Tensor:
        start, num_bytes = (count * self._plan.query_bytes for count in (num_tokens, rows))
        return self._slots[slot][start : start + num_bytes]

    def _staged(self, stage: int, rows: int) -> Tensor:
        return self._stages[stage][: rows * self._plan.query_bytes]

    def _parted(self, slab: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        config = self._plan.config
        q_shape = (rows, config.num_heads, config.head_dim)
        kv_shape = (rows, 2, config.num_kv_heads, config.head_dim)
        q_bytes = rows * config.num_heads * config.head_dim * self._dtype.itemsize
        return typed(slab, self._dtype, q_shape), typed(slab, self._dtype, kv_shape, q_bytes)
