"""The best shares of weights and KV cache for one block shape, as a linear programme.

Variables are the shares on each tier and the seconds of each kind of step. A step takes at least as
long as every lane and link has work, which is linear in the shares; what rests on a tier must fit
its budget, which is linear too once it is decided whether weights, and KV cache, travel at all:
slots and staging buffers are then fixed. FlexGen (arXiv 2303.06865, section 4.3) does the same with
one kind of step; solved by HiGHS through SciPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog

from flexpipe.errors import PolicyError
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.estimate import Demand, Phase, Work, phases_of, work_of
from flexpipe.policy.profile import Profile

_PREFER = 1e-6  # of the time: between shares that cost the same, the fastest tiers are filled

MakePlan = Callable[[Policy], Plan]
Bytes = Mapping[Tier, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where the plan would run: a profile, what an emulated accelerator makes of it, its tiers."""

    profile: Profile
    device_tier: Tier
    emulation: Emulation | None = None

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """From the one beside the device on."""
        return tuple(Tier)[tuple(Tier).index(self.device_tier) :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Shares, and the seconds of all steps with perfect overlap."""

    weights: Shares
    kv_cache: Shares
    seconds: float


@dataclass(frozen=True, slots=True)
class _Pure:
    """A plan whose tensors of a kind rest on one tier each."""

    plan: Plan
    works: tuple[Work, ...]


class SharesProgramme:
    """The programme of one choice of everything but the shares.

    `knobs` is a policy without shares of weights and KV cache but for those that are `fixed`.
    """

    def __init__(
        self,
        make: MakePlan,
        machine: Machine,
        demand: Demand,
        knobs: Mapping[str, Any],
        fixed: Mapping[str, Shares],
    ) -> None:
        self._make = make
        self._machine = machine
        self._demand = demand
        self._knobs = knobs
        self._fixed = fixed
        self._pures: dict[tuple[Tier, Tier], _Pure] = {}
        self._phases: tuple[Phase, ...] = ()

    def solve(self, *, weights_travel: bool, kv_travels: bool) -> Solution | None:
        """The best shares; None where nothing fits."""
        machine, tiers = self._machine, self._machine.tiers
        kinds = (weights_travel, kv_travels)
        if any(travels and len(tiers) == 1 for travels in kinds):
            return None
        budgets = self._fixed_bytes(*kinds)
        num = len(tiers)
        device = machine.device_tier
        works = [self._pure(tier, device).works for tier in tiers]
        kv_works = [self._pure(device, tier).works for tier in tiers]
        base = self._pure(device, device).works
        rows, limits = self._memory_rows(budgets)
        for index in range(len(self._phases)):
            names = sorted({name for one in (*works, *kv_works) for name in one[index].seconds})
            for name in names:
                zero = base[index].seconds.get(name, 0.0)
                row = np.zeros(2 * num + len(self._phases))
                row[:num] = [one[index].seconds.get(name, 0.0) - zero for one in works]
                row[num : 2 * num] = [one[index].seconds.get(name, 0.0) - zero for one in kv_works]
                row[2 * num + index] = -1.0
                rows.append(row)
                limits.append(-zero)
        return self._solved(rows, limits, kinds)

    def _solved(
        self, rows: Sequence[Any], limits: Sequence[float], travels: tuple[bool, bool]
    ) -> Solution | None:
        num, count = len(self._machine.tiers), len(self._phases)
        slow = np.linspace(0.0, _PREFER, num)
        goal = np.concatenate([slow, slow, [phase.num_steps for phase in self._phases]])
        equal = np.zeros((2, 2 * num + count))
        equal[0, :num] = equal[1, num : 2 * num] = 1.0
        bounds = [*self._bounds("weights", travels[0]), *self._bounds("kv_cache", travels[1])]
        bounds += [(0.0, None)] * count
        found = linprog(
            goal,
            A_ub=np.array(rows),
            b_ub=np.array(limits),
            A_eq=equal,
            b_eq=np.ones(2),
            bounds=bounds,
            method="highs",
        )
        if not found.success:
            return None
        values = found.x
        seconds = sum(
            phase.num_steps * seconds
            for phase, seconds in zip(self._phases, values[2 * num :], strict=True)
        )
        return Solution(
            weights=self._shares(values[:num]),
            kv_cache=self._shares(values[num : 2 * num]),
            seconds=float(seconds),
        )

    def _bounds(self, kind: str, travels: bool) -> list[tuple[float, float | None]]:
        tiers = self._machine.tiers
        if kind in self._fixed:
            return [(self._fixed[kind].of(tier),) * 2 for tier in tiers]
        if not travels:
            return [(float(index == 0),) * 2 for index in range(len(tiers))]
        return [(0.0, 1.0)] * len(tiers)

    def _shares(self, values: Sequence[float]) -> Shares:
        clean = [min(1.0, max(0.0, round(float(value), 6))) for value in values]
        clean[-1] = max(0.0, 1.0 - sum(clean[:-1])) if len(clean) > 1 else 1.0
        names = [tier.value for tier in self._machine.tiers]
        return Shares(**dict(zip(names, clean, strict=True)))

    def _memory_rows(self, left: Bytes) -> tuple[list[Any], list[float]]:
        """What rests on each tier, and what is left for it there."""
        tiers, device = self._machine.tiers, self._machine.device_tier
        num, scale = len(tiers), 2.0**30
        rows, limits = [], []
        for tier in tiers:
            row = np.zeros(2 * num + len(self._phases))
            row[:num] = [home_bytes(self._pure(one, device).plan, tier)[0] / scale for one in tiers]
            row[num : 2 * num] = [
                home_bytes(self._pure(device, one).plan, tier)[1] / scale for one in tiers
            ]
            rows.append(row)
            limits.append(left[tier] / scale)
        return rows, limits

    def _fixed_bytes(self, weights_travel: bool, kv_travels: bool) -> dict[Tier, float]:
        """Budgets less pools, slots and staging that do not depend on the shares."""
        tiers = self._machine.tiers
        plan = self._pure(tiers[-1 * weights_travel], tiers[-1 * kv_travels]).plan
        left = {}
        for tier in tiers:
            fixed = plan.tier_bytes(tier) - sum(home_bytes(plan, tier))
            left[tier] = plan.budgets.of(tier) - fixed
        return left

    def _pure(self, weights: Tier, kv_cache: Tier) -> _Pure:
        key = weights, kv_cache
        pure = self._pures.get(key)
        if pure is None:
            policy = Policy(
                **{**self._knobs, "weights": all_on(weights), "kv_cache": all_on(kv_cache)}
            )
            plan = self._make(policy)
            costs = CostModel(plan, self._machine.profile, self._machine.emulation)
            self._phases = self._phases or phases_of(plan, self._demand)
            works = tuple(work_of(costs, phase, self._demand) for phase in self._phases)
            pure = self._pures[key] = _Pure(plan, works)
        return pure


def home_bytes(plan: Plan, tier: Tier) -> tuple[float, float]:
    """Bytes of weights, and of KV cache, that rest on a tier."""
    weights = kv_cache = 0.0
    for pool in plan.pools:
        if pool.tier == tier:
            weights += pool.num_bytes if pool.name == "weights" else 0
            kv_cache += pool.num_bytes if pool.name == "KV cache" else 0
    return weights, kv_cache


def all_on(tier: Tier) -> Shares:
    return Shares(**{tier.value: 1.0})


def realize(
    make: MakePlan, knobs: Mapping[str, Any], solution: Solution, tiers: Sequence[Tier]
) -> Plan | None:
    """A plan of whole tensors and rows near the solution that fits, its fastest tier filled."""
    weights, kv_cache = solution.weights, solution.kv_cache
    plan: Plan | None = None
    for _ in range(8):
        plan = _make_near(make, knobs, weights, kv_cache)
        if plan is None:
            return None
        missing = plan.shortfalls()
        if not missing:
            return plan
        tier = next(iter(missing))
        weights, kv_cache = _moved_down(plan, tier, missing[tier], tiers)
    return None


def _make_near(
    make: MakePlan, knobs: Mapping[str, Any], weights: Shares, kv_cache: Shares
) -> Plan | None:
    """The plan for these shares, or for those left when the smallest ones get no whole item."""
    for _ in range(4):
        try:
            return make(Policy(**{**knobs, "weights": weights, "kv_cache": kv_cache}))
        except PolicyError:
            if len(weights.tiers) > 1:
                weights = _without_smallest(weights)
            elif len(kv_cache.tiers) > 1:
                kv_cache = _without_smallest(kv_cache)
            else:
                return None
    return None


def _without_smallest(shares: Shares) -> Shares:
    smallest = min(shares.tiers, key=shares.of)
    kept = {tier: shares.of(tier) for tier in shares.tiers if tier != smallest}
    slowest = list(kept)[-1]
    kept[slowest] += shares.of(smallest)
    return Shares(**{tier.value: min(1.0, share) for tier, share in kept.items()})


def _moved_down(
    plan: Plan, tier: Tier, num_bytes: float, tiers: Sequence[Tier]
) -> tuple[Shares, Shares]:
    """Shares with so many bytes less on a tier, weights first, and as many more on the next."""
    weights, kv_cache = plan.policy.weights, plan.policy.kv_cache
    held, cached = home_bytes(plan, tier)
    after = tuple(tiers)[tuple(tiers).index(tier) + 1 :]
    if not after:
        return weights, kv_cache
    if held and weights.of(tier):
        part = min(weights.of(tier), weights.of(tier) * (num_bytes * 1.02 + 2**20) / held)
        return _shifted(weights, tier, after[0], part), kv_cache
    if cached and kv_cache.of(tier):
        part = min(kv_cache.of(tier), kv_cache.of(tier) * (num_bytes * 1.02 + 2**20) / cached)
        return weights, _shifted(kv_cache, tier, after[0], part)
    return weights, kv_cache


def _shifted(shares: Shares, source: Tier, target: Tier, part: float) -> Shares:
    values = {tier.value: shares.of(tier) for tier in Tier}
    values[source.value] = max(0.0, values[source.value] - part)
    values[target.value] = min(1.0, values[target.value] + part)
    return Shares(**values)
