"""`flexpipe plan`: the plan that a search finds, why it is that one, and what would change it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flexpipe.beside import Beside
from flexpipe.errors import PlanError
from flexpipe.job.found import because, bottleneck_line, opening, prediction_dict, prediction_line
from flexpipe.job.outlook import Outlook
from flexpipe.job.shared import predict_shared, shared_dict, shared_line, shared_table
from flexpipe.job.table import plain_table
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy_file import MadeFor, render_policy
from flexpipe.plan.spelling import as_options, difference
from flexpipe.plan.tier import Tier
from flexpipe.policy.predict import Prediction, predict
from flexpipe.policy.search import Found, Limits, Scored, disk_writes, search
from flexpipe.units import format_bytes, format_count, format_seconds

_NUM_SHOWN = 5
_WORTH_TELLING = 1.005  # a gain below is no gain


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What a search came to. `prediction` is of `found.best`, thorough; it took `search_s`.
    `shared` is what several such machines would come to, by their number."""

    model: str
    device: str
    date: str
    profile: str
    num_requests: int
    found: Found
    plan: Plan
    prediction: Prediction
    search_s: float
    shared: Mapping[int, Prediction | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; seconds and bytes."""
        made = self.prediction
        return {
            "model": self.model,
            "device": self.device,
            "hardware": self.profile,
            "compute_dtype": self.plan.compute_dtype,
            "num_requests": self.num_requests,
            "policy": self.plan.policy.to_dict(),
            "prediction": {
                **prediction_dict(made),
                "disk_bytes_per_1000_tokens": disk_writes(made),
            },
            "tiers": {tier.value: self._tier(tier) for tier in self._tiers},
            "others": [_as_dict(one) for one in self.found.others[:_NUM_SHOWN]],
            "naive": {
                name: None if one is None else _as_dict(one)
                for name, one in self.found.naive.items()
            },
            "refused": [{**_as_dict(one), "reason": reason} for one, reason in self.found.refused],
            "gain_of": dict(self.found.wishes),
            "gain_of_compression": dict(self.found.lossy),
            "stages": shared_dict({1: made, **self.shared}),
            "least_stages": 1,  # where one machine does not hold it there is no proposal
            "num_choices": self.found.num_choices,
            "search_s": self.search_s,
        }

    def policy_file(self) -> str:
        """The policy, complete, with what it was made for."""
        where = f"machine: {self.profile}"
        lines = opening(self.model, where, self.date, self.num_requests, self.prediction)
        return render_policy(self.plan.policy, MadeFor.of(self.model, self.plan.config), lines)

    def render(self) -> str:
        """For people, the plan first; every figure is predicted."""
        made = self.prediction
        parts = [
            f"{self.model} on {self.device} in {self.plan.compute_dtype}: {self.num_requests} "
            f"requests, {made.prompt_tokens} prompt tokens, {made.generated_tokens} to generate",
            as_options(self.plan.policy.to_dict()),
            plain_table(
                ("tier", "weights", "KV cache", "hidden", "buffers", "free", "budget"),
                [self._tier_row(tier) for tier in self._tiers],
            ),
            prediction_line(
                made, f"; {format_bytes(disk_writes(made))} written to disk per 1,000 tokens"
            ),
            bottleneck_line(made),
            *self._comparisons(),
            shared_table({1: made, **self.shared}) if self.shared else "",
            f"{self.found.num_choices} choices estimated, {self._num_played} played, in "
            f"{self.search_s:.1f} s",
        ]
        return "\n\n".join(part for part in parts if part)

    @property
    def _num_played(self) -> int:
        return 1 + len(self.found.others) + len(self.found.refused)

    def _comparisons(self) -> list[str]:
        found = self.found
        others = [("next best", one) for one in found.others[:_NUM_SHOWN]]
        naive = [(name, one) for name, one in found.naive.items() if one is not None]
        rows = [self._row(name, one) for name, one in (*others, *naive)]
        rows += [(name, "does not fit", "", "") for name, one in found.naive.items() if one is None]
        wishes = [
            (what, f"{gain - 1:+.1%}")
            for what, gain in found.wishes.items()
            if gain > _WORTH_TELLING
        ]
        lossy = [(what, f"{gain - 1:+.1%}") for what, gain in found.lossy.items()]
        return [
            plain_table(("instead", "tokens/s", "because", "what differs"), rows),
            plain_table(("with", "tokens/s would be"), wishes)
            or "neither 1 GiB more of a tier nor a link twice as fast would help",
            plain_table(("lossy, so only with --compression", "estimated"), lossy),
        ]

    @property
    def _tiers(self) -> list[Tier]:
        return [tier for tier in Tier if self.plan.tier_bytes(tier)]

    def _tier(self, tier: Tier) -> dict[str, int]:
        """Bytes by what they hold; buffers are all that is neither at home nor free."""
        plan = self.plan
        held = dict.fromkeys(("weights", "KV cache", "hidden"), 0)
        for pool in plan.pools:
            if pool.tier == tier and pool.name in held:
                held[pool.name] += pool.num_bytes
        total, budget = plan.tier_bytes(tier), plan.budgets.of(tier)
        return {
            **held,
            "buffers": total - sum(held.values()),
            "free": budget - total,
            "budget": budget,
        }

    def _row(self, name: str, one: Scored) -> tuple[str, str, str, str]:
        made, policy = one.prediction, one.plan.policy
        differs = difference(policy.to_dict(), self.plan.policy.to_dict()) or "nothing"
        return name, format_count(made.generated_tokens_per_s), because(made), differs

    def _tier_row(self, tier: Tier) -> tuple[str, ...]:
        return tier.value, *(format_bytes(size) for size in self._tier(tier).values())


def _as_dict(one: Scored) -> dict[str, Any]:
    made = one.prediction
    return {
        "policy": one.plan.policy.to_dict(),
        "run_s": made.run_s,
        "generated_tokens_per_s": made.generated_tokens_per_s,
        "latency_s": made.latency_s,
        "bottleneck": made.bottleneck,
        "bound_s": made.bound_s,
    }


def propose(outlook: Outlook, given: Mapping[str, Any], limits: Limits, date: str) -> Proposal:
    """Search for a plan; a PlanError where none fits, or none that fits keeps the limits."""
    began = time.perf_counter()
    machine, planner = outlook.machine, outlook.planner()
    with Beside(partial(predict_shared, outlook, given, limits, least=1)) as beside:
        found = search(given, planner, outlook.needs, machine, limits, explain=True)
        if found.best is None:
            if found.refused:
                raise PlanError(_too_strict(found.refused))
            _refuse(outlook, given, limits)
        assert found.best is not None
        shared = beside.result()
    took_s = time.perf_counter() - began
    plan = found.best.plan
    return Proposal(
        model=outlook.shape.name,
        device=outlook.device,
        date=date,
        profile=machine.profile.title,
        num_requests=len(outlook.needs),
        found=found,
        plan=plan,
        prediction=predict(plan, outlook.needs, machine.profile, machine.emulation),
        search_s=took_s,
        shared=shared,
    )


def _refuse(outlook: Outlook, given: Mapping[str, Any], limits: Limits) -> None:
    """Tell what is missing, and what several such machines would come to."""
    try:
        outlook.choose(given)
    except PlanError as error:
        shared = predict_shared(outlook, given, limits, outlook.least_stages([given]))
        raise PlanError(" ".join(filter(None, (str(error), shared_line(shared))))) from None


def _too_strict(refused: Sequence[tuple[Scored, str]]) -> str:
    """The limits no plan keeps, and the plans that come nearest."""
    quick = min(refused, key=lambda one: one[0].prediction.latency_s)[0].prediction
    sparing = min(refused, key=lambda one: disk_writes(one[0].prediction))[0].prediction
    return (
        f"no plan that fits keeps the limits (of the fastest, {refused[0][1]}). The shortest "
        f"latency found is {format_seconds(quick.latency_s)}, the fewest bytes written to disk "
        f"{format_bytes(disk_writes(sparing))} per 1,000 tokens; raise --max-latency or "
        "--max-disk-writes, or give more memory"
    )
