"""Whether a model fits, where, and on how many machines, by its bytes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.model.config import ModelConfig
from flexpipe.plan.block import Need
from flexpipe.plan.plan import Budgets
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.rule import choose_plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.fit import Fit, find_fit
from flexpipe.policy.shares import all_on
from flexpipe.units import GIB, MIB
from tests.schedule.plans import ROOMY, stored_tensors, tiny_config

NEEDS = [Need(40, 8)] * 12
CONFIG = tiny_config(num_hidden_layers=12)
WAYS = {
    Tier.CPU: ["on cpu", "on cpu and disk"],
    Tier.GPU: ["on gpu", "on gpu and cpu", "on gpu and cpu and disk"],
}


class Asked:
    """The question for one machine, and plans of parts of the model there."""

    def __init__(self, budgets: Budgets, tier: Tier, given: dict[str, Any] | None = None) -> None:
        self.budgets, self.tier, self.given = budgets, tier, given or {}

    def planner(self, config: ModelConfig) -> Planner:
        stored = stored_tensors(CONFIG)
        return Planner(
            config, NEEDS, stored, self.budgets, device_tier=self.tier, compute_dtype="float32"
        )

    def fit(self) -> Fit:
        return find_fit(self.given, self.planner, CONFIG, self.tier, len(NEEDS))

    def resides(self, num_layers: int) -> bool:
        """Whether so many layers fit beside the device, with all their rows' KV cache."""
        part = replace(CONFIG, num_layers=num_layers)
        home = all_on(self.tier)
        asked = {**self.given, "weights": home, "kv_cache": home, "hidden": home}
        plan = choose_plan(asked, self.planner(part), self.tier, len(NEEDS))
        return not plan.shortfalls()


@settings(max_examples=12)
@given(
    tier=st.sampled_from([Tier.GPU, Tier.CPU]),
    gpu=st.integers(100_000, 3 * MIB),
    cpu=st.integers(0, 3 * MIB),
)
def test_the_least_number_of_stages_fits_and_one_less_does_not(tier, gpu, cpu):
    base = 0 if tier == Tier.GPU else ROOM
    asked = Asked(Budgets(gpu=gpu, cpu=ROOM + (base and cpu), disk=GIB), tier)
    way = WAYS[tier][0]
    stages = asked.fit().stages[way]
    if stages is None:
        assert not asked.resides(1)
        return
    assert asked.resides(-(-CONFIG.num_layers // stages))
    if stages > 1:
        assert not asked.resides(-(-CONFIG.num_layers // (stages - 1)))


def room() -> int:
    """Bytes on the cpu tier that a plan takes there beside weights and KV cache, and then some."""
    plan = Asked(ROOMY, Tier.GPU).planner(CONFIG)(Policy(weights=all_on(Tier.GPU)))
    return plan.tier_bytes(Tier.CPU) + MIB


ROOM = room()


def test_ways_are_from_the_fastest_on_and_a_slower_tier_never_makes_a_model_not_fit() -> None:
    for tier, ways in WAYS.items():
        for scale in (0, 1, 4, 16):
            budgets = Budgets(gpu=scale * 256 * 1024, cpu=ROOM + scale * MIB // 4, disk=GIB)
            fit = Asked(budgets, tier).fit()
            assert list(fit.plans) == list(fit.stages) == ways
            fits = [plan is not None for plan in fit.plans.values()]
            assert fits == sorted(fits)
            assert (fit.best is None) == (not any(fits))


def test_a_plan_of_a_way_rests_on_its_tiers_alone() -> None:
    budgets = Budgets(gpu=MIB, cpu=ROOM + GIB, disk=GIB)
    plans = Asked(budgets, Tier.GPU).fit().plans
    assert plans["on gpu"] is None
    for way, plan in plans.items():
        if plan is not None:
            policy = plan.policy
            used = {t for shares in (policy.weights, policy.kv_cache) for t in shares.tiers}
            assert {tier.value for tier in used} <= set(way.split())
            assert not plan.shortfalls()


def test_knobs_that_are_given_are_kept_in_every_way() -> None:
    given = {"micro_batch_size": 3, "kv_cache": all_on(Tier.CPU), "cpu_attention": True}
    fit = Asked(Budgets(gpu=GIB, cpu=GIB, disk=GIB), Tier.GPU, given).fit()
    assert fit.plans["on gpu"] is None  # its KV cache is to be elsewhere
    assert fit.stages["on gpu"] is None
    for plan in list(fit.plans.values())[1:]:
        assert plan is not None
        assert all(getattr(plan.policy, name) == value for name, value in given.items())
