"""Does a model fit a machine, and where: bytes against budgets, without knowing any rate.

The answer tries homes from the fastest on, each with the largest block that fits, and says how many
pipeline stages it would take to hold everything beside the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexpipe.errors import PolicyError
from flexpipe.model.config import ModelConfig
from flexpipe.plan.plan import Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Shares
from flexpipe.plan.rule import choose_plan
from flexpipe.plan.tier import Tier

MakePlanner = Callable[[ModelConfig], Planner]


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


def find_fit(
    given: Mapping[str, Any],
    make_planner: MakePlanner,
    config: ModelConfig,
    device_tier: Tier,
    num_rows: int,
) -> Fit:
    """How a model fits; `make_planner` plans for a model with other layers than `config`'s."""
    tiers = tuple(Tier)[tuple(Tier).index(device_tier) :]
    ways = {_way(tiers[: count + 1]): tiers[: count + 1] for count in range(len(tiers))}
    plans, stages = {}, {}
    for way, allowed in ways.items():
        planner = make_planner(config)
        plans[way] = _plan(given, planner, allowed, num_rows)
        stages[way] = _least_stages(given, make_planner, config, allowed, num_rows)
    return Fit(plans=plans, stages=stages)


def _way(tiers: Sequence[Tier]) -> str:
    return "on " + " and ".join(tier.value for tier in tiers)


def _plan(
    given: Mapping[str, Any], planner: Planner, allowed: Sequence[Tier], num_rows: int
) -> Plan | None:
    """A plan that fits and rests nothing on a tier that is not allowed."""
    asked = dict(given)
    if len(allowed) == 1:
        only = Shares(**{allowed[0].value: 1.0})
        for kind in ("weights", "kv_cache", "hidden"):
            asked.setdefault(kind, only)
    try:
        plan = choose_plan(asked, planner, allowed[0], num_rows)
    except PolicyError:
        return None
    used = {
        tier
        for kind in ("weights", "kv_cache", "hidden")
        for tier in getattr(plan.policy, kind).tiers
    }
    return None if plan.shortfalls() or not used <= set(allowed) else plan


def _least_stages(
    given: Mapping[str, Any],
    make_planner: MakePlanner,
    config: ModelConfig,
    allowed: Sequence[Tier],
    num_rows: int,
) -> int | None:
    """Every stage is taken to hold the embedding and the head, of which it needs one at most."""
    low, high = 1, config.num_layers

    def fits(stages: int) -> bool:
        layers = -(-config.num_layers // stages)
        part = replace(config, num_layers=layers, windows=config.windows[:layers])
        return _plan(given, make_planner(part), allowed, num_rows) is not None

    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
