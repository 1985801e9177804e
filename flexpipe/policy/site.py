"""Who shares a model among ranks: what each may spend and was given, and how it plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Budgets
from flexpipe.plan.planner import Planner
from flexpipe.plan.tier import Tier
from flexpipe.policy.shares import Machine

Knobs = Mapping[str, Any]
# plans of a rank that has these budgets, once the pipeline is known
MakePlanner = Callable[[Pipeline, int, Budgets], Planner]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What one rank may spend, the knobs given for it, and its machine; None where no rate is
    known."""

    budgets: Budgets
    device_tier: Tier
    machine: Machine | None
    given: Knobs


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is to be shared: its decoder layers, and how ranks plan for it."""

    num_layers: int
    needs: Sequence[Need]
    make_planner: MakePlanner


def first_like(sites: Sequence[Site], site: Site) -> int:
    """The index of the first site that is the same."""
    return next(index for index, other in enumerate(sites) if other == site)
