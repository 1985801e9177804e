"""`flexpipe plan --fit-only`: whether a model fits, where, and in how many pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexpipe.job.outlook import Inquiry, Outlook
from flexpipe.job.table import plain_table
from flexpipe.plan.policy_file import MadeFor
from flexpipe.plan.spelling import as_options
from flexpipe.plan.tier import Tier
from flexpipe.policy.fit import Fit, find_fit
from flexpipe.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """A model, the budgets of a machine, and how the one fits the other."""

    model: str
    device: str
    outlook: Outlook
    fit: Fit

    @property
    def fits(self) -> bool:
        return self.fit.best is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        budgets = self.outlook.budgets
        return {
            "model": self.model,
            "device": self.device,
            "fits": self.fits,
            "budgets": {tier.value: budgets.of(tier) for tier in Tier},
            "ways": {
                way: {
                    "fits": plan is not None,
                    "policy": None if plan is None else plan.policy.to_dict(),
                    "bytes": {} if plan is None else {t.value: plan.tier_bytes(t) for t in Tier},
                    "least_stages": self.fit.stages[way],
                }
                for way, plan in self.fit.plans.items()
            },
        }

    def render(self) -> str:
        """The same for people."""
        budgets = self.outlook.budgets
        sizes = ", ".join(
            f"{tier.value} {format_bytes(budgets.of(tier))}" for tier in Tier if budgets.of(tier)
        )
        rows = []
        for way, plan in self.fit.plans.items():
            stages = self.fit.stages[way]
            rows.append(
                (
                    way,
                    "no" if plan is None else "yes",
                    "never" if stages is None else str(stages),
                    "" if plan is None else as_options(plan.policy.to_dict()),
                )
            )
        return "\n\n".join(
            (
                f"{self.model} on {self.device} in {self.outlook.compute_dtype}: budgets {sizes}",
                plain_table(("all of it", "fits", "least pipeline stages", "for example"), rows),
            )
        )


def look(
    inquiry: Inquiry,
    given: Mapping[str, Any],
    made_for: MadeFor | None = None,
    *,
    num_shards: int = 1,
) -> Fitting:
    """Ask about bytes alone."""
    outlook = inquiry.outlook(given, made_for, needs_rates=False, num_shards=num_shards)
    [site] = outlook.sites([given])
    fit = find_fit(outlook.stage_model, site)
    return Fitting(model=outlook.shape.name, device=outlook.device, outlook=outlook, fit=fit)
