"""All that is known before a byte moves: homes, layers, pools, budgets.

A plan that does not fit its budgets is refused before anything is loaded, with the shortfall per
tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flexpipe.errors import PlanError
from flexpipe.model.cost import RESULT_ROWS
from flexpipe.plan.pools import PoolPlan, stage_pools, stage_transient_bytes
from flexpipe.plan.stage import StagePlan
from flexpipe.plan.tier import Tier
from flexpipe.units import MIB, format_bytes

# What the process takes beside the pools; 0 to 75 MiB were seen. While loading: two buffers of 32
# MiB and the bounce ring (16 MiB). Later BLAS's packing buffers and the holes that prompts of many
# lengths leave in the allocator's heaps.
PROCESS_SLACK = 88 * MIB
# What oneDNN keeps of a product for every number of rows it met (0.2 to 0.6 MB were seen), and of
# how many it does.
_KERNEL_BYTES, _MOST_KERNELS = 600_000, 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Bytes each tier may spend in this run; on disk only what the run itself writes.

    `overhead` is what the process held on the cpu tier before the plan was made.
    """

    gpu: int
    cpu: int
    disk: int
    overhead: int = 0

    def of(self, tier: Tier) -> int:
        num_bytes: int = getattr(self, tier.value)
        return num_bytes


@dataclass(frozen=True, kw_only=True)
class Plan(StagePlan):
    """A stage with its pools, beside what the tiers may spend on them."""

    budgets: Budgets

    @cached_property
    def pools(self) -> tuple[PoolPlan, ...]:
        """Every byte the runtime will take, pool by pool."""
        return stage_pools(self)

    @cached_property
    def transient_bytes(self) -> int:
        """What torch takes and frees itself: masks, positions of a step, kernels' temporaries."""
        return stage_transient_bytes(self)

    def tier_bytes(self, tier: Tier) -> int:
        """Planned peak on a tier, the process's own overhead included."""
        total = sum(pool.num_bytes for pool in self.pools if pool.tier == tier)
        if tier == self.device_tier:
            total += self.transient_bytes
        if tier == Tier.CPU:
            total += self._process_bytes
        if tier == Tier.DISK:
            total += self.placement.new_bytes
        return total

    @cached_property
    def _process_bytes(self) -> int:
        """What the process holds beside the pools. An emulated accelerator's kernels are not
        planned, since a real one has none here."""
        kernels = 0
        if self.device_tier == Tier.CPU:
            num_rows = min(RESULT_ROWS, self.num_row_counts)
            kernels = min(_MOST_KERNELS, num_rows * self.num_product_shapes)
        return self.budgets.overhead + PROCESS_SLACK + kernels * _KERNEL_BYTES

    def shortfalls(self) -> dict[Tier, int]:
        """Bytes missing per tier; empty when the plan fits."""
        missing = {tier: self.tier_bytes(tier) - self.budgets.of(tier) for tier in Tier}
        return {tier: num_bytes for tier, num_bytes in missing.items() if num_bytes > 0}

    def describe(self, tier: Tier) -> str:
        """What the tier would hold, largest first, for messages."""
        parts = sorted(
            ((pool.num_bytes, pool.name) for pool in self.pools if pool.tier == tier), reverse=True
        )
        if tier == self.device_tier:
            parts.append((self.transient_bytes, "temporaries"))
        if tier == Tier.CPU:
            parts.append((self._process_bytes, "process"))
        if tier == Tier.DISK and self.placement.new_bytes:
            parts.append((self.placement.new_bytes, "weights to compress or repack"))
        return ", ".join(f"{name} {format_bytes(size)}" for size, name in parts)


def check_fits(plan: Plan, advice: str) -> None:
    """Raise PlanError with the shortfall per tier, and what would fit."""
    missing = plan.shortfalls()
    if not missing:
        return
    lines = [
        f"{tier.value} needs {format_bytes(plan.tier_bytes(tier))}, {format_bytes(num_bytes)} more "
        f"than its budget of {format_bytes(plan.budgets.of(tier))} ({plan.describe(tier)})"
        for tier, num_bytes in missing.items()
    ]
    raise PlanError("the plan does not fit: " + "; ".join(lines) + f". {advice}")
