"""Does a model fit a machine, and where: bytes against budgets, without knowing any rate.

The answer tries homes from the fastest on, each with the largest block that fits, and says how many
pipeline stages it would take to hold everything beside the devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.room import least_stages, plan_on
from flexpipe.policy.site import Model, Site


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The plan of each way to place a model, None where it does not fit; and the smallest number of
    pipeline stages, on as many such machines, with which it fits in that way."""

    plans: Mapping[str, Plan | None]
    stages: Mapping[str, int | None]

    @property
    def best(self) -> Plan | None:
        """Of the first way that fits."""
        return next((plan for plan in self.plans.values() if plan is not None), None)


def find_fit(model: Model, site: Site) -> Fit:
    """How a model fits such machines."""
    whole = Pipeline.whole(model.num_layers)
    planner, num_rows = model.make_planner(whole, 0, site.budgets), len(model.needs)
    tiers = tuple(Tier)[tuple(Tier).index(site.device_tier) :]
    plans, stages = dict[str, Plan | None](), dict[str, int | None]()
    for count in range(len(tiers)):
        allowed = tiers[: count + 1]
        way = "on " + " and ".join(tier.value for tier in allowed)
        plans[way] = plan_on(allowed, site.given, planner, num_rows)
        stages[way] = least_stages(model, site, allowed) if plans[way] is None else 1
    return Fit(plans=plans, stages=stages)
