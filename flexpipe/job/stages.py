"""The stages of a pipeline that nobody runs: what each holds and does, and how it idles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexpipe.job.table import plain_table
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.predict import Prediction
from flexpipe.units import format_bytes, format_seconds


def stage_table(plans: Sequence[Plan], made: Prediction) -> str:
    """For people; nothing where there is but one stage."""
    if len(plans) == 1:
        return ""
    tiers = [tier for tier in Tier if any(plan.tier_bytes(tier) for plan in plans)]
    head = ("stage", "layers", "busiest", "alone", "bubble", *(tier.value for tier in tiers))
    rows = [
        (
            str(stage.rank),
            _layers(plan),
            stage.bottleneck,
            format_seconds(stage.bound_s),
            f"{stage.bubble:.1%}",
            *(_held(plan, tier) for tier in tiers),
        )
        for plan, stage in zip(plans, made.stages, strict=True)
    ]
    return plain_table(head, rows)


def stage_dicts(plans: Sequence[Plan], made: Prediction) -> list[dict[str, Any]]:
    """Plain values; seconds and bytes."""
    return [
        {
            "stage": stage.rank,
            "layers": [len(chunk) for chunk in plan.pipeline.chunks(plan.rank)],
            "bound_s": stage.bound_s,
            "bottleneck": stage.bottleneck,
            "bubble": stage.bubble,
            "busy_s": dict(stage.busy_s),
            "link_bytes": dict(stage.link_bytes),
            "tier_bytes": dict(stage.tier_bytes),
            "policy": plan.policy.to_dict(),
        }
        for plan, stage in zip(plans, made.stages, strict=True)
    ]


def _layers(plan: Plan) -> str:
    chunks = plan.pipeline.chunks(plan.rank)
    return ", ".join(f"{chunk.start} to {chunk.stop - 1}" for chunk in chunks)


def _held(plan: Plan, tier: Tier) -> str:
    return f"{format_bytes(plan.tier_bytes(tier))} of {format_bytes(plan.budgets.of(tier))}"
