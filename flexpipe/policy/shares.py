"""The best shares of weights and KV cache for one block shape, as a linear programme.

Variables are the shares on each tier and the seconds of each kind of step. A step takes at least as
long as every lane and link has work, which is linear in the shares; what rests on a tier must fit
its budget, which is linear too once it is decided whether weights, and KV cache, travel at all:
slots and staging buffers are then fixed. FlexGen (arXiv 2303.06865, section 4.3) does the same with
one kind of step; solved by HiGHS through SciPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from flexpipe.errors import PolicyError
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.estimate import Demand, Phase, Work, phases_of, work_of
from flexpipe.policy.profile import Profile

KINDS = ("weights", "kv_cache")
HOMES = ("weights", "KV cache")  # their pools
_PREFER = 1e-6  # of the time: between shares that cost the same, the fastest tiers are filled
_ATTEMPTS = 12  # to make a plan of whole tensors fit
_SCALE = 2.0**30  # bytes are told to the solver in GiB

MakePlan = Callable[[Policy], Plan]
Bytes = Mapping[Tier, float]
FloatArray: TypeAlias = NDArray[np.float64]
# whether any weights, and any KV cache, may rest away from the device
Travels: TypeAlias = tuple[bool, bool]


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
    """Shares, and with perfect overlap the seconds of all steps, and of a request in flight."""

    weights: Shares
    kv_cache: Shares
    seconds: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class _Share:
    """A variable: how much of one kind rests on a tier, what bounds it, and a plan with all of it
    there and the other kind beside the device."""

    kind: str
    tier: Tier
    low: float
    high: float
    plan: Plan

    def num_bytes(self, tier: Tier) -> float:
        """What all of it takes on `tier`."""
        return home_bytes(self.plan, tier)[KINDS.index(self.kind)]


class SharesProgramme:
    """The programme of one choice of everything but the shares of weights and KV cache."""

    def __init__(
        self,
        make: MakePlan,
        machine: Machine,
        demand: Demand,
        knobs: Mapping[str, Any],
        most_written: float = inf,
    ) -> None:
        """`most_written` bytes may go to disk in all."""
        self._make = make
        self._machine = machine
        self._demand = demand
        self._knobs = {name: value for name, value in knobs.items() if name not in KINDS}
        self._most_written = most_written
        self._plans: dict[tuple[Tier, Tier], Plan] = {}
        self._works: dict[int, tuple[Work, ...]] = {}  # by the plan's identity

    def solve(self, fixed: Mapping[str, Shares], *, travels: Travels) -> Solution | None:
        """The best shares with what is `fixed` as it is; None where nothing fits.

        `travels` says of weights, and of KV cache, whether any may rest away from the device.
        """
        if any(travels) and len(self._machine.tiers) == 1:
            return None
        shares = [
            share
            for kind, moves in zip(KINDS, travels, strict=True)
            for share in self._variables(kind, fixed.get(kind), moves)
        ]
        room = self._room(shares)
        if not _may_fit(shares, room):
            return None
        if all(share.low == share.high for share in shares):
            values = np.array([share.low for share in shares])
            fits = _fits(shares, values, room) and self._written(shares) @ values <= self._writable
            return self._solution(shares, values) if fits else None
        return self._solved(shares, room)

    def _variables(self, kind: str, fixed: Shares | None, moves: bool) -> Iterator[_Share]:
        device, *slower = self._machine.tiers
        if fixed is None:
            fixed = None if moves else all_on(device)
        for tier in (device, *slower):
            low, high = (0.0, 1.0) if fixed is None else (fixed.of(tier),) * 2
            if high:
                where = (tier, device) if kind == "weights" else (device, tier)
                yield _Share(kind, tier, low, high, self._plan(*where))

    def _room(self, shares: Sequence[_Share]) -> dict[Tier, float]:
        """Budgets less pools that do not depend on the shares (slots, staging, workspace), each as
        large as any of these homes makes it: slots are largest where all comes from far away."""
        slowest = {share.kind: share.tier for share in shares}
        plans = [self._plan(**{**slowest, share.kind: share.tier}) for share in shares]
        return {
            tier: plans[0].budgets.of(tier) - _largest_fixed(plans, tier)
            for tier in self._machine.tiers
        }

    @property
    def _writable(self) -> float:
        """Bytes, counted from a plan that rests beside the device."""
        return self._most_written - self._written_by(self._base)

    def _written(self, shares: Sequence[_Share]) -> FloatArray:
        """Bytes to disk that each share adds."""
        base = self._written_by(self._base)
        return np.array([self._written_by(share.plan) - base for share in shares])

    def _written_by(self, plan: Plan) -> float:
        pairs = zip(self._phases, self._works_of(plan), strict=True)
        return sum(phase.num_steps * work.num_bytes.get("disk_write", 0.0) for phase, work in pairs)

    def _solved(self, shares: Sequence[_Share], room: Bytes) -> Solution | None:
        num, count = len(shares), len(self._phases)
        held = np.array([[share.num_bytes(tier) for share in shares] for tier in room])
        rows = [np.hstack([held / _SCALE, np.zeros((len(room), count))])]
        limits = [np.array(list(room.values())) / _SCALE]
        if self._most_written < inf:
            rows.append(np.hstack([self._written(shares) / _SCALE, np.zeros(count)])[None])
            limits.append(np.array([self._writable / _SCALE]))
        for index in range(count):
            slopes, least = self._work(shares, index)
            took = np.zeros((len(least), count))
            took[:, index] = -1.0
            rows.append(np.hstack([slopes, took]))
            limits.append(-least)
        slower = np.linspace(0.0, _PREFER, len(Tier))
        equal = np.zeros((2, num + count))
        for at, share in enumerate(shares):
            equal[KINDS.index(share.kind), at] = 1.0
        found = linprog(
            [
                *(slower[list(Tier).index(share.tier)] for share in shares),
                *(phase.num_steps for phase in self._phases),
            ],
            A_ub=np.vstack(rows),
            b_ub=np.concatenate(limits),
            A_eq=equal,
            b_eq=np.ones(2),
            bounds=[*((share.low, share.high) for share in shares), *[(0.0, None)] * count],
            method="highs",
        )
        return self._solution(shares, found.x[:num]) if found.success else None

    def _solution(self, shares: Sequence[_Share], values: FloatArray) -> Solution:
        works = [self._work(shares, index) for index in range(len(self._phases))]
        step_s = [float((slopes @ values + least).max()) for slopes, least in works]
        all_s = [phase.num_steps * s for phase, s in zip(self._phases, step_s, strict=True)]
        kinds = {
            kind: tidy({s.tier: v for s, v in zip(shares, values, strict=True) if s.kind == kind})
            for kind in KINDS
        }
        latency_s = all_s[0] + (self._demand.output - 1) * step_s[-1]
        return Solution(**kinds, seconds=sum(all_s), latency_s=latency_s)

    def _work(self, shares: Sequence[_Share], index: int) -> tuple[FloatArray, FloatArray]:
        """Of one kind of step, per lane and link: seconds that each share adds, and those with all
        at home beside the device."""
        base = self._works_of(self._base)[index].seconds
        seconds = [self._works_of(share.plan)[index].seconds for share in shares]
        names = sorted(base.keys() | {name for one in seconds for name in one})
        least = np.array([base.get(name, 0.0) for name in names])
        whole = np.array([[one.get(name, 0.0) for one in seconds] for name in names])
        return whole - least[:, None], least

    def _works_of(self, plan: Plan) -> tuple[Work, ...]:
        """Of each kind of step, under one of the plans made here."""
        works = self._works.get(id(plan))
        if works is None:
            costs = CostModel(plan, self._machine.profile, self._machine.emulation)
            works = tuple(work_of(costs, phase, self._demand) for phase in self._phases)
            self._works[id(plan)] = works
        return works

    @cached_property
    def _phases(self) -> tuple[Phase, ...]:
        return phases_of(self._base, self._demand)

    @property
    def _base(self) -> Plan:
        """All at home beside the device."""
        device = self._machine.device_tier
        return self._plan(device, device)

    def _plan(self, weights: Tier, kv_cache: Tier) -> Plan:
        key = weights, kv_cache
        if key not in self._plans:
            shares = {"weights": all_on(weights), "kv_cache": all_on(kv_cache)}
            self._plans[key] = self._make(Policy(**{**self._knobs, **shares}))
        return self._plans[key]


def _largest_fixed(plans: Sequence[Plan], tier: Tier) -> int:
    """What a tier holds beside homes of weights and KV cache, every pool at its largest."""
    pools: dict[str, int] = {}
    others = 0
    for plan in plans:
        here = [pool for pool in plan.pools if pool.tier == tier]
        others = max(others, plan.tier_bytes(tier) - sum(pool.num_bytes for pool in here))
        for pool in here:
            if pool.name not in HOMES:
                pools[pool.name] = max(pools.get(pool.name, 0), pool.num_bytes)
    return others + sum(pools.values())


def _may_fit(shares: Sequence[_Share], room: Bytes) -> bool:
    """Whether all tiers together could hold what rests anywhere, which is quickly told."""
    least = sum(
        min(sum(s.num_bytes(tier) for tier in room) for s in shares if s.kind == kind)
        for kind in KINDS
    )
    return min(room.values()) >= 0 and least <= sum(room.values())


def _fits(shares: Sequence[_Share], values: FloatArray, room: Bytes) -> bool:
    return all(
        sum(share.num_bytes(tier) * value for share, value in zip(shares, values, strict=True))
        <= left
        for tier, left in room.items()
    )


def tidy(values: Mapping[Tier, float]) -> Shares:
    """Shares in millionths, as a file shows them; what they lack to 1 is the slowest tier's."""
    clean = {tier: round(float(min(1.0, max(0.0, values.get(tier, 0.0)))), 6) for tier in Tier}
    last = [tier for tier in Tier if clean[tier]][-1]
    clean[last] = round(clean[last] + 1.0 - sum(clean.values()), 6)
    return Shares(**{tier.value: share for tier, share in clean.items()})


def home_bytes(plan: Plan, tier: Tier) -> tuple[float, float]:
    """Bytes of weights, and of KV cache, that rest on a tier."""
    weights, kv_cache = (
        sum(pool.num_bytes for pool in plan.pools if pool.tier == tier and pool.name == home)
        for home in HOMES
    )
    return weights, kv_cache


def all_on(tier: Tier) -> Shares:
    return Shares(**{tier.value: 1.0})


def realize(
    make: MakePlan, knobs: Mapping[str, Any], solution: Solution, tiers: Sequence[Tier]
) -> Plan | None:
    """A plan of whole tensors and rows near the solution that fits, its fastest tier filled."""
    weights, kv_cache = solution.weights, solution.kv_cache
    plan: Plan | None = None
    for _ in range(_ATTEMPTS):
        plan = _make_near(make, knobs, weights, kv_cache)
        if plan is None:
            return None
        if not plan.shortfalls():
            return plan
        weights, kv_cache = _smaller(plan, tiers)
    return None


def _smaller(plan: Plan, tiers: Sequence[Tier]) -> tuple[Shares, Shares]:
    """Shares that take less of a tier that is short; where nothing can leave it, on fewer tiers,
    since layers that come from two places need larger slots."""
    weights, kv_cache = plan.policy.weights, plan.policy.kv_cache
    for tier, num_bytes in plan.shortfalls().items():
        moved = _moved_down(plan, tier, num_bytes, tiers)
        if moved != (weights, kv_cache):
            return moved
    if len(weights.tiers) > 1:
        return _without_smallest(weights), kv_cache
    return weights, _without_smallest(kv_cache) if len(kv_cache.tiers) > 1 else kv_cache


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
    return tidy(kept)


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
    values = {tier: shares.of(tier) for tier in Tier}
    values[source] -= part
    values[target] += part
    return tidy(values)
