"""What the ranks of a job tell each other: before anything is loaded, and when all is done.

Every rank says what it may spend and what its machine can do. Rank 0, which alone reads the input,
plans for all and gives orders; from these each rank makes its own plan, the one rank 0 made for it.
At the end rank 0 is told what each was like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from flexpipe.job.batcher import Entry
from flexpipe.job.prepare import Model, budgets
from flexpipe.job.report import StageUse
from flexpipe.job.spec import JobSpec
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Budgets, Plan, check_fits
from flexpipe.plan.policy import Policy, knob
from flexpipe.plan.tier import Tier
from flexpipe.policy.pipeline import Site, best_pipeline
from flexpipe.policy.pipeline import Model as Shared
from flexpipe.policy.profile import Profile, parse_profile, render_profile
from flexpipe.policy.shares import Machine
from flexpipe.runtime.gang import Gang


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What rank 0 has decided: the cuts, each stage's policy, what requests need, the dtype."""

    pipeline: Pipeline
    policies: Sequence[Policy]
    needs: Sequence[Need]
    compute_dtype: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "pipeline": asdict(self.pipeline),
            "policies": [policy.to_dict() for policy in self.policies],
            "needs": [[need.prompt, need.output] for need in self.needs],
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Orders:
        pipeline = values["pipeline"]
        return cls(
            pipeline=Pipeline(**{**pipeline, "layers": tuple(pipeline["layers"])}),
            policies=[_policy(policy) for policy in values["policies"]],
            needs=[Need(*need) for need in values["needs"]],
            compute_dtype=values["compute_dtype"],
        )


def _policy(values: Mapping[str, Any]) -> Policy:
    return Policy(**{name: knob(name, value) for name, value in values.items()})


class Crew:
    """The ranks of a job, seen from one of them."""

    def __init__(
        self, gang: Gang, model: Model, budgets: Budgets, given: Sequence[Mapping[str, Any]]
    ) -> None:
        """Say what this rank brings, and hear what the others do; `given` are each stage's knobs."""
        self.gang = gang
        brought = gang.board.exchange("site", _brought(model, budgets))
        first = range(0, gang.ranks.size, gang.ranks.num_shards)
        self.sites = [
            _site(brought[rank : rank + gang.ranks.num_shards], given[stage])
            for stage, rank in enumerate(first)
        ]

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which reads, plans and writes."""
        return self.gang.ranks.rank == 0

    def give(self, orders: Orders | None) -> None:
        """Rank 0's decision; None where there is nothing to do."""
        self.gang.board.share("orders", None if orders is None else orders.to_dict())

    def take(self) -> Orders | None:
        """What rank 0 decided."""
        values = self.gang.board.share("orders")
        return None if values is None else Orders.of(values)

    def gather(self, figures: StageUse) -> list[StageUse]:
        """Every rank's figures, once all are done; bubbles are those of the job's window."""
        told = [StageUse.of(one) for one in self.gang.board.exchange("figures", asdict(figures))]
        first_s = min(use.window_s[0] for use in told)
        last_s = max(use.window_s[1] for use in told)
        return [use.within(last_s - first_s) for use in told]


def _brought(model: Model, budgets: Budgets) -> dict[str, Any]:
    profile = model.profile
    return {
        "budgets": asdict(budgets),
        "device_tier": model.device.tier.value,
        "profile": None if profile is None else render_profile(profile),
    }


def _site(brought: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> Site:
    """A stage's: of its shards, the least any of them may spend; they compute alike."""
    spent = [one["budgets"] for one in brought]
    least = {name: min(one[name] for one in spent) for name in ("gpu", "cpu", "disk")}
    first = brought[0]
    tier, profile = Tier(first["device_tier"]), first["profile"]
    machine = None
    if profile is not None:
        read = parse_profile(yaml.safe_load(profile))
        machine = Machine(profile=read, device_tier=tier, emulation=None)
    overhead = max(one["overhead"] for one in spent)
    return Site(
        budgets=Budgets(**least, overhead=overhead),
        device_tier=tier,
        machine=machine,
        given=given,
    )
