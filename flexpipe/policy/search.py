"""Finds the plan: every discrete choice estimated, the best replayed in the simulator.

For each block shape and each choice of where hidden rests, where decoding rows attend and what
resident weights are held in, a linear programme gives the shares and an optimistic time
(`flexpipe.policy.shares`). In that order the choices become plans of whole tensors that fit, and
the simulator plays them, until no estimate left can beat the best time found. The naive plans (all
resident, all streamed, all on the CPU) are always played too, so the answer is never worse.

What is not enumerated: strategies other than `event`, since they only add edges, and the compute
dtype, which changes tokens: the caller decides it before, so that a resumed job gets the same.
Compression loses precision and is tried only where it is allowed; otherwise the answer says what
it would gain. A knob that is given stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf
from typing import Any

from flexpipe.errors import PolicyError
from flexpipe.plan.block import Need
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.rule import choose_plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.choices import TRAVELS, Choice, Choices
from flexpipe.policy.predict import QUICK, Prediction, predict
from flexpipe.policy.shares import (
    KINDS,
    Machine,
    MakePlan,
    SharesProgramme,
    all_on,
    home_bytes,
    realize,
    tidy,
)
from flexpipe.units import GIB

OTHER_TOKENS = (128, 512, 8192)  # tried for the best choices only
MOST_REPLAYS = 6
MOST_REFUSED = 20  # plans that break a limit
MOST_REFINED = 2
MOST_VARIED = 2
OPTIMISM = 1.05  # an estimate may be this much too high and yet belong to the best plan
_FILL_STEPS = 5
_ALIKE = 0.98  # times closer than this are the same
_COMPRESSIONS = ("none", "8", "4")

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a plan must keep beside the budgets: mean seconds of a request in flight, bytes written
    to disk per 1,000 generated tokens; and whether it may compress."""

    max_latency_s: float | None = None
    max_disk_writes: float | None = None
    compression: bool = False

    def refusal(self, prediction: Prediction) -> str | None:
        """Why the prediction is no good; None if it is."""
        if self.max_latency_s is not None and prediction.latency_s > self.max_latency_s:
            return f"a request would take {prediction.latency_s:.3g} s"
        if self.max_disk_writes is not None and disk_writes(prediction) > self.max_disk_writes:
            return f"it would write {disk_writes(prediction):.3g} bytes per 1,000 tokens"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A plan that fits and what it is predicted to take."""

    plan: Plan
    prediction: Prediction
    what: str = ""

    @property
    def run_s(self) -> float:
        return self.prediction.run_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The best plan, others that were played, best first, and what else was learnt.

    `naive` maps a naive plan's name to what it came to, None where it does not fit. `refused` are
    plans that fit but break a limit. `wishes` are throughputs relative to the best plan's, with
    more of something; `lossy` the same with compression, where it was not allowed.
    """

    best: Scored | None
    others: Sequence[Scored]
    naive: Mapping[str, Scored | None]
    refused: Sequence[tuple[Scored, str]]
    num_choices: int
    wishes: Mapping[str, float] = field(default_factory=dict)
    lossy: Mapping[str, float] = field(default_factory=dict)


def search(
    given: Mapping[str, Any],
    planner: Planner,
    needs: Sequence[Need],
    machine: Machine,
    limits: Limits | None = None,
    *,
    explain: bool = False,
) -> Found:
    """The fastest plan that keeps `given` and `limits`; `explain` also finds wishes and gains."""
    return _Search(given, planner, needs, machine, limits or Limits()).run(explain)


def best_plan(
    given: Mapping[str, Any],
    planner: Planner,
    needs: Sequence[Need],
    device_tier: Tier,
    machine: Machine | None,
) -> Plan:
    """The plan that a job takes: the search's. On a machine whose rates are not known, or too few
    of them, or where nothing fits, the rule's, whose shortfalls then say what is missing."""
    plan = choose_plan(given, planner, device_tier, len(needs))
    if machine is None or plan.shortfalls():
        return plan
    try:
        best = search(given, planner, needs, machine).best
    except PolicyError as error:
        log.info("no search for a policy: %s", error)
        return plan
    return plan if best is None else best.plan


def disk_writes(prediction: Prediction) -> float:
    """Bytes per 1,000 generated tokens."""
    written = prediction.link_bytes.get("disk_write", 0)
    return 1000 * written / max(1, prediction.generated_tokens)


class _Search:
    def __init__(
        self,
        given: Mapping[str, Any],
        planner: Planner,
        needs: Sequence[Need],
        machine: Machine,
        limits: Limits,
    ) -> None:
        self._given = given
        self._planner = planner
        self._needs = needs
        self._machine = machine
        self._limits = limits
        self._choices = Choices(
            given,
            planner,
            needs,
            machine,
            max_latency_s=limits.max_latency_s,
            max_disk_writes=limits.max_disk_writes,
        )
        self._scored: dict[Policy, Scored | None] = {}
        self._refused: list[tuple[Scored, str]] = []
        self._estimate_s: float | None = None  # of the best plan's choice

    def run(self, explain: bool) -> Found:
        choices = self._choices
        self._replay(choices.estimated(choices.knobs()))
        if choices.is_given or not self._kept():
            self._by_rule()
        naive = {} if choices.is_given else self._naive()
        if not choices.is_given:
            self._refine()
        best = self._best()
        if best is not None and not choices.is_given:
            best = self._filled(best)
        others = sorted(
            (one for one in self._scored.values() if one is not None and one is not best),
            key=lambda one: one.run_s,
        )
        found = Found(
            best=best,
            others=others,
            naive=naive,
            refused=self._refused,
            num_choices=choices.num_choices,
        )
        if best is None or not explain:
            return found
        return replace(found, wishes=self._wishes(best), lossy=self._lossy(best))

    # plans and their predictions

    def _replay(self, choices: Sequence[Choice]) -> None:
        """Play the first few choices, while an estimate can win."""
        num_played, most_refused = 0, len(self._refused) + MOST_REFUSED
        for choice in choices:
            fastest = min((scored.run_s for scored in self._kept()), default=inf)
            if num_played == MOST_REPLAYS or len(self._refused) == most_refused:
                break
            if choice.solution.seconds <= OPTIMISM * fastest:
                num_played += self._play(choice) is not None

    def _kept(self) -> list[Scored]:
        """What was played and breaks no limit."""
        return [scored for scored in self._scored.values() if scored is not None]

    def _best(self) -> Scored | None:
        """The fastest; of those about as fast the one that moves least, since no prediction is so
        exact, and a link that has nothing to do cannot disappoint."""
        kept = self._kept()
        fastest = min((scored.run_s for scored in kept), default=inf)
        alike = (scored for scored in kept if _ALIKE * scored.run_s <= fastest)
        return min(alike, key=self._moved_s, default=None)

    def _play(self, choice: Choice) -> Scored | None:
        tiers = self._machine.tiers
        plan = realize(self._planner, choice.knobs, choice.solution, tiers)
        return None if plan is None else self._score(self._plain(plan))

    def _plain(self, plan: Plan) -> Plan:
        """The plan without attention on the CPU where no row would attend there."""
        idle = plan.policy.cpu_attention and not plan.attends_on_cpu
        if not idle or "cpu_attention" in self._given:
            return plan
        return self._planner(replace(plan.policy, cpu_attention=False))

    def _score(self, plan: Plan, what: str = "") -> Scored | None:
        """What a plan comes to; None if it breaks a limit."""
        if plan.policy not in self._scored:
            prediction = predict(
                plan,
                self._needs,
                self._machine.profile,
                self._machine.emulation,
                effort=QUICK,
            )
            scored = Scored(plan=plan, prediction=prediction, what=what)
            refusal = self._limits.refusal(prediction)
            if refusal is not None:
                self._refused.append((scored, refusal))
            self._scored[plan.policy] = None if refusal else scored
        return self._scored[plan.policy]

    def _moved_s(self, scored: Scored) -> float:
        """Seconds that links are busy, and a little of the time itself."""
        busy = scored.prediction.link_busy_s
        return sum(busy.values()) + 0.1 * scored.run_s

    def _by_rule(self) -> None:
        """Play the plan that needs no profile; where everything is given, the plan itself."""
        rows = len(self._needs)
        try:
            plan = choose_plan(self._given, self._planner, self._device, rows)
        except PolicyError:
            return
        if not plan.shortfalls():
            self._score(plan)

    def _naive(self) -> dict[str, Scored | None]:
        """Plans that people try first, each with its best block."""
        device, *slower = self._machine.tiers
        asked: dict[str, dict[str, Any]] = {
            "all resident": {"weights": device, "kv_cache": device, "hidden": device}
        }
        for tier in slower:
            where = "host memory" if tier == Tier.CPU else "disk"
            streamed = {"weights": tier, "kv_cache": device, "hidden": device}
            asked[f"all weights streamed from {where}"] = streamed
        if Tier.CPU in slower:
            on_cpu = {"weights": Tier.CPU, "kv_cache": Tier.CPU, "hidden": Tier.CPU}
            asked["all but the weights' products on the CPU"] = {**on_cpu, "cpu_attention": True}
        return {name: self._naive_plan(homes) for name, homes in asked.items()}

    def _naive_plan(self, homes: Mapping[str, Any]) -> Scored | None:
        asked = {
            name: all_on(value) if isinstance(value, Tier) else value
            for name, value in homes.items()
        }
        if any(name in self._given and self._given[name] != asked[name] for name in asked):
            return None
        fixed = {"weights": asked["weights"], "kv_cache": asked["kv_cache"]}
        others = {"cpu_attention": False, **{k: v for k, v in asked.items() if k not in fixed}}
        choices = [
            choice
            for knobs in self._choices.knobs()
            if all(knobs[name] == value for name, value in others.items())
            for choice in self._choices.solved({**knobs, **fixed}, fixed)
        ]
        for choice in sorted(choices, key=self._choices.promise)[:MOST_REFUSED]:
            scored = self._play(choice)
            if scored is not None:
                return scored
        return None

    # improvements of the best

    def _refine(self) -> None:
        """Vary what was held fixed while choices were compared: chunks and halves of layers, which
        may make room for a larger block; then what an estimate does not see, such as prefetch."""
        for _ in range(MOST_REFINED):
            before = self._best()
            if before is None:
                return
            self._replay(self._choices.estimated(self._near(before.plan.policy)))
            for scored in self._fastest(MOST_VARIED):
                knobs = _without_shares(scored.plan.policy)
                for change in self._changes(scored.plan.policy):
                    self._replay(self._choices.estimated([{**knobs, **change}])[:1])
            if self._best() is before:
                return

    def _fastest(self, count: int) -> list[Scored]:
        return sorted(self._kept(), key=lambda scored: scored.run_s)[:count]

    def _near(self, policy: Policy) -> Iterator[dict[str, Any]]:
        """Blocks as large or up to four times as large, in other chunks, of whole or halved
        layers; but for the policy's own."""
        size, count = policy.micro_batch_size, policy.num_micro_batches
        free: dict[str, Sequence[Any]] = {
            "micro_batch_size": sorted({size, size * 3 // 2, size * 2}),
            "num_micro_batches": (count, 2 * count),
            "max_batch_tokens": (policy.max_batch_tokens, *OTHER_TOKENS),
            "separate_layers": (False, True) if self._streams(policy) else (False,),
        }
        names = [name for name in free if name not in self._given]
        knobs = _without_shares(policy)
        seen = {self._block(knobs)}
        for values in product(*(free[name] for name in names)):
            near = {**knobs, **dict(zip(names, values, strict=True))}
            if "max_batch_tokens" in names:
                near["max_batch_tokens"] = max(near["max_batch_tokens"], near["micro_batch_size"])
            block = self._block(near)
            if block not in seen and near["micro_batch_size"] <= near["max_batch_tokens"]:
                seen.add(block)
                yield near

    def _block(self, knobs: Mapping[str, Any]) -> tuple[object, ...]:
        """What a block comes to: rows and tokens that nobody asks for make no difference."""
        rows, longest = len(self._needs), max(need.prompt for need in self._needs)
        size = min(knobs["micro_batch_size"], rows)
        count = min(knobs["num_micro_batches"], -(-rows // size))
        tokens = min(knobs["max_batch_tokens"], size * longest)
        return size, count, tokens, knobs["separate_layers"]

    def _streams(self, policy: Policy) -> bool:
        return policy.weights != all_on(self._device)

    def _changes(self, policy: Policy) -> Iterator[dict[str, Any]]:
        given = self._given
        if "prefetch_depth" not in given and self._streams(policy):
            yield {"prefetch_depth": policy.prefetch_depth + 1}
        for tokens in () if "max_batch_tokens" in given else OTHER_TOKENS:
            change = {"max_batch_tokens": max(tokens, policy.micro_batch_size)}
            knobs = _without_shares(policy)
            if self._block({**knobs, **change}) != self._block(knobs):
                yield change
        if "separate_layers" not in given and self._streams(policy):
            yield {"separate_layers": not policy.separate_layers}
        if self._limits.compression:
            for weights, cache in product(_COMPRESSIONS, _COMPRESSIONS):
                asked = {
                    "compress_weight": weights,
                    "compress_vocabulary": weights,
                    "compress_cache": cache,
                }
                if not asked.keys() & given.keys():
                    yield asked

    @property
    def _device(self) -> Tier:
        return self._machine.device_tier

    def _filled(self, best: Scored) -> Scored:
        """More weights on the fastest tier, as long as they fit and nothing gets slower."""
        tiers = self._machine.tiers
        if len(tiers) == 1 or "weights" in self._given:
            return best
        for source in reversed(tiers[1:]):
            for _ in range(_FILL_STEPS):
                fuller = self._with_more(best.plan, source)
                scored = None if fuller is None else self._score(fuller)
                if scored is None or scored.run_s > best.run_s * (1 + 1e-9):
                    break
                best = scored
        return best

    def _with_more(self, plan: Plan, source: Tier) -> Plan | None:
        """The plan with what is free on the fastest tier given to weights from `source`."""
        weights, device = plan.policy.weights, self._device
        free = plan.budgets.of(device) - plan.tier_bytes(device)
        resident = home_bytes(plan, device)[0]
        whole = resident / weights.of(device) if weights.of(device) else 0.0
        whole = whole or float(sum(plan.placement.achieved_bytes.values()))
        part = min(weights.of(source), free / whole)
        while part > 2e-3:
            values = {tier: weights.of(tier) for tier in Tier}
            values[source] -= part
            values[device] += part
            try:
                fuller = self._planner(replace(plan.policy, weights=tidy(values)))
            except PolicyError:
                return None
            if not fuller.shortfalls():
                return fuller
            part /= 2
        return None

    # what else would help

    def _wishes(self, best: Scored) -> dict[str, float]:
        """Estimated throughput with one more GiB of a tier, or a link twice as fast."""
        wishes: dict[str, float | None] = {}
        for tier in self._machine.tiers:
            if tier != Tier.DISK:
                more = _with_budget(self._planner, tier, GIB)
                wishes[f"1 GiB more {tier.value} memory"] = self._gain(best, more, self._machine)
        profile = self._machine.profile
        for link in profile.links:
            if best.prediction.link_bytes.get(link):
                faster = {**profile.links, link: profile.links[link].scaled(2.0)}
                emulation = self._machine.emulation
                rate = getattr(emulation, f"{link}_bytes_per_s", None)
                if emulation is not None and rate:
                    emulation = replace(emulation, **{f"{link}_bytes_per_s": 2 * rate})
                machine = replace(
                    self._machine, profile=replace(profile, links=faster), emulation=emulation
                )
                wishes[f"{link} twice as fast"] = self._gain(best, self._planner, machine)
        return _known(wishes)

    def _lossy(self, best: Scored) -> dict[str, float]:
        """Estimated throughput with compression, where it is not allowed."""
        policy = best.plan.policy
        if self._limits.compression or policy.weight_codec or policy.cache_codec:
            return {}
        gains: dict[str, float | None] = {}
        for bits in ("8", "4"):
            weights = {"compress_weight": bits, "compress_vocabulary": bits}
            cache = {"compress_cache": bits}
            for what, change in (
                ("weights", weights),
                ("KV cache", cache),
                ("weights and KV cache", {**weights, **cache}),
            ):
                gains[f"{bits}-bit {what}"] = self._gain(best, self._planner, self._machine, change)
        return _known(gains)

    def _gain(
        self,
        best: Scored,
        make: MakePlan,
        machine: Machine,
        change: Mapping[str, Any] | None = None,
    ) -> float | None:
        """Estimated throughput over the estimate of the best plan's own choice; None where that
        block would not fit, or the machine's rates are not known."""
        knobs = _without_shares(best.plan.policy)
        if self._estimate_s is None:
            self._estimate_s = self._quickest(self._planner, self._machine, knobs)
        after = self._quickest(make, machine, {**knobs, **(change or {})})
        return self._estimate_s / after if self._estimate_s and after else None

    def _quickest(self, make: MakePlan, machine: Machine, knobs: Mapping[str, Any]) -> float | None:
        programme = SharesProgramme(make, machine, self._choices.demand, knobs)
        seconds = []
        for travels in TRAVELS:
            try:
                solution = programme.solve(self._choices.fixed, travels=travels)
            except PolicyError:
                continue
            if solution is not None:
                seconds.append(solution.seconds)
        return min(seconds, default=None)


def _without_shares(policy: Policy) -> dict[str, Any]:
    names = Policy.__dataclass_fields__
    return {name: getattr(policy, name) for name in names if name not in KINDS}


def _known(gains: Mapping[str, float | None]) -> dict[str, float]:
    return {what: gain for what, gain in gains.items() if gain is not None}


def _with_budget(make: MakePlan, tier: Tier, more: int) -> MakePlan:
    def made(policy: Policy) -> Plan:
        plan = make(policy)
        budgets = {one.value: plan.budgets.of(one) for one in Tier}
        budgets[tier.value] += more
        return replace(plan, budgets=Budgets(**budgets, overhead=plan.budgets.overhead))

    return made
