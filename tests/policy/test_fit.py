"""Whether a model fits, where, and on how many machines, by its bytes alone."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.model.config import ModelConfig
from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import PROCESS_SLACK, Budgets
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier
from flexpipe.policy.fit import Fit, find_fit
from flexpipe.policy.shares import all_on
from flexpipe.policy.site import Model, Site
from flexpipe.units import GIB, MIB
from tests.policy.test_partition import all_cuts
from tests.schedule.plans import ROOMY, stored_tensors, tiny_config

NEEDS = [Need(40, 8)] * 12
CONFIG = tiny_config(num_hidden_layers=12)
WHOLE = Pipeline.whole(CONFIG.num_layers)
WAYS = {
    Tier.CPU: ["on cpu", "on cpu and disk"],
    Tier.GPU: ["on gpu", "on gpu and cpu", "on gpu and cpu and disk"],
}


class Asked:
    """The question for such machines, and plans of a pipeline's stages there."""

    def __init__(
        self,
        budgets: Budgets,
        tier: Tier,
        given: dict[str, Any] | None = None,
        *,
        config: ModelConfig = CONFIG,
    ) -> None:
        self.config, self.tier = config, tier
        self.stored = stored_tensors(config)
        self.model = Model(
            num_layers=config.num_layers, needs=NEEDS, make_planner=self.make_planner
        )
        self.site = Site(budgets=budgets, device_tier=tier, machine=None, given=given or {})

    def make_planner(self, pipeline: Pipeline, rank: int, budgets: Budgets) -> Planner:
        return Planner(
            self.config,
            NEEDS,
            self.stored,
            budgets,
            device_tier=self.tier,
            compute_dtype="float32",
            pipeline=pipeline,
            rank=rank,
        )

    def fit(self) -> Fit:
        return find_fit(self.model, self.site)

    def resides(self, cut: tuple[int, ...], rank: int) -> bool:
        """Whether a rank holds its layers beside the device, with one row for each block."""
        pipeline = Pipeline(layers=cut, num_stages=len(cut), num_blocks=len(cut))
        planner = self.make_planner(pipeline, rank, self.site.budgets)
        return not planner(smallest_on(self.tier)).shortfalls()

    def brute_force(self) -> int | None:
        """The least number of stages of which some cut fits, of all cuts."""
        for num_stages in range(1, self.config.num_layers + 1):
            for cut in all_cuts(self.config.num_layers, num_stages):
                if all(self.resides(cut, rank) for rank in range(num_stages)):
                    return num_stages
        return None


@settings(max_examples=12)
@given(
    tier=st.sampled_from([Tier.GPU, Tier.CPU]),
    vocab_size=st.sampled_from([16, 1500, 4000]),
    is_tied=st.booleans(),
    share=st.floats(0.4, 1.1),
)
def test_no_cut_into_fewer_stages_than_the_least_fits(tier, vocab_size, is_tied, share):
    config = tiny_config(num_hidden_layers=5, vocab_size=vocab_size, tie_word_embeddings=is_tied)
    roomy = Asked(ROOMY, tier, config=config)
    whole = roomy.make_planner(Pipeline.whole(5), 0, ROOMY)(smallest_on(tier))
    fixed = PROCESS_SLACK if tier == Tier.CPU else 0
    some = fixed + int(share * (whole.tier_bytes(tier) - fixed))
    gpu, cpu = (some, ROOM) if tier == Tier.GPU else (0, some)
    asked = Asked(Budgets(gpu=gpu, cpu=cpu, disk=GIB), tier, config=config)
    assert asked.fit().stages[WAYS[tier][0]] == asked.brute_force()


def test_only_the_ends_are_taken_to_hold_embedding_and_head() -> None:
    """No stage of such a model could hold both."""
    config = tiny_config(num_hidden_layers=4, vocab_size=16_000)
    table = max(tensor.num_bytes for tensor in stored_tensors(config).values())
    roomy, halves = Asked(ROOMY, Tier.GPU, config=config), Pipeline(layers=(2, 2), num_stages=2)
    ends = [roomy.make_planner(halves, rank, ROOMY)(smallest_on(Tier.GPU)) for rank in (0, 1)]
    enough = max(plan.tier_bytes(Tier.GPU) for plan in ends) + table // 8
    asked = Asked(Budgets(gpu=enough, cpu=ROOM + GIB, disk=GIB), Tier.GPU, config=config)
    assert enough < 2 * table
    assert asked.fit().stages["on gpu"] == 2


def smallest_on(tier: Tier) -> Policy:
    """One row at a time, all of it on one tier."""
    home = all_on(tier)
    return Policy(
        weights=home, kv_cache=home, hidden=home, micro_batch_size=1, max_batch_tokens=128
    )


def room() -> int:
    """Bytes on the cpu tier that a plan takes there beside weights and KV cache, and then some."""
    plan = Asked(ROOMY, Tier.GPU).make_planner(WHOLE, 0, ROOMY)(Policy(weights=all_on(Tier.GPU)))
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
