"""Slots of the pools, handed out in turn, and who holds which."""

from __future__ import annotations

from dataclasses import dataclass

from flexpipe.plan.pools import (
    NUM_ATTENTION_SLOTS,
    NUM_EMBED_SLOTS,
    NUM_HIDDEN_SLOTS,
    NUM_KV_SLOTS,
    NUM_PARTIAL_SLOTS,
    NUM_STAGES,
)
from flexpipe.schedule.op import Pool

_NUM_SLOTS = {
    Pool.KV_SLOT: NUM_KV_SLOTS,
    Pool.HIDDEN_SLOT: NUM_HIDDEN_SLOTS,
    Pool.EMBED_SLOT: NUM_EMBED_SLOTS,
    Pool.ATTENTION_SLOT: NUM_ATTENTION_SLOTS,
    Pool.PARTIAL_SLOT: NUM_PARTIAL_SLOTS,
}


@dataclass(slots=True)
class Ring:
    """Slots of one pool, handed out in turn."""

    num_slots: int
    next_slot: int = 0

    def take(self) -> int:
        slot = self.next_slot
        self.next_slot = (slot + 1) % self.num_slots
        return slot


class Slots:
    """The rings of all pools but the weights', and what was taken last for whom."""

    def __init__(self) -> None:
        self._rings = {pool: Ring(_NUM_SLOTS.get(pool, NUM_STAGES)) for pool in Pool}
        self._in_use: dict[tuple[Pool, int, int], int] = {}

    def take(self, pool: Pool, layer: int = 0, mb: int = 0) -> int:
        """The pool's next slot, remembered for the ops of (layer, micro-batch) that use it."""
        slot = self._in_use[pool, layer, mb] = self._rings[pool].take()
        return slot

    def held(self, pool: Pool, layer: int = 0, mb: int = 0) -> int:
        """The slot last taken for (layer, micro-batch)."""
        return self._in_use[pool, layer, mb]
