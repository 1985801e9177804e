"""Without a policy, a simple rule: fill the fastest tier, leave room for a sensible block."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.model.families import read_config
from flexpipe.plan.block import Need
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import RESIDENT_DTYPES, STRATEGIES, Policy, Shares
from flexpipe.plan.rule import choose_plan
from flexpipe.plan.tier import Tier
from flexpipe.units import GIB, MIB
from tests.schedule.plans import NEEDS, stored_tensors, tiny_config

KIB = 1024
TIERS = st.sampled_from([Tier.GPU, Tier.CPU])
LARGE = Budgets(gpu=GIB, cpu=GIB, disk=GIB)


def planner(
    budgets: Budgets,
    tier: Tier,
    needs: tuple[Need, ...] = NEEDS,
    dtype: str = "float32",
    **changes: Any,
) -> Planner:
    config = tiny_config(**changes)
    return Planner(
        config,
        needs,
        stored_tensors(config, dtype),
        budgets,
        device_tier=tier,
        compute_dtype="float32",
    )


@pytest.mark.parametrize("tier", [Tier.GPU, Tier.CPU])
def test_the_rule_gives_up_no_digit_by_itself(tier):
    """Not even where nothing else would fit."""
    for budgets in (LARGE, Budgets(gpu=10**5, cpu=10**5, disk=10**5)):
        policy = choose_plan({}, planner(budgets, tier), tier, len(NEEDS)).policy
        assert policy.weight_codec is policy.vocabulary_codec is policy.cache_codec is None


def most_modest(tier: Tier) -> Policy:
    """One row at a time, everything that may on the slowest tier."""
    return Policy(
        weights=Shares(disk=1.0),
        kv_cache=Shares(disk=1.0),
        hidden=Shares(**{tier.value: 1.0}),
        micro_batch_size=1,
        num_micro_batches=1,
        max_batch_tokens=128,
    )


@st.composite
def budgets(draw: st.DrawFn) -> Budgets:
    return Budgets(
        gpu=draw(st.integers(50 * KIB, 4 * MIB)),
        cpu=draw(st.integers(96 * MIB, 102 * MIB)),
        disk=draw(st.sampled_from([0, 100 * KIB, MIB, GIB])),
    )


@given(limits=budgets(), tier=TIERS, layers=st.integers(1, 6), vocab=st.sampled_from([96, 2000]))
def test_a_plan_is_found_whenever_the_most_modest_one_fits(limits, tier, layers, vocab):
    make = planner(limits, tier, num_hidden_layers=layers, vocab_size=vocab)
    plan = choose_plan({}, make, tier, len(NEEDS))
    if not make(most_modest(tier)).shortfalls():
        assert not plan.shortfalls()


@given(limits=budgets(), tier=TIERS, dtype=st.sampled_from(["float32", "float16"]))
def test_nothing_is_streamed_when_everything_fits(limits, tier, dtype):
    make = planner(limits, tier, dtype=dtype)
    near = Shares(**{tier.value: 1.0})
    resident = Policy(
        weights=near,
        kv_cache=near,
        hidden=near,
        micro_batch_size=8,
        num_micro_batches=1,
    )
    if make(resident).shortfalls():
        return
    plan = choose_plan({}, make, tier, len(NEEDS))
    assert not plan.streamed_layers
    assert not plan.embed_streams
    assert {home for mb in plan.micro_batches for home in mb.kv_homes} == {tier}


def test_shares_of_hidden_get_as_many_micro_batches_as_they_need():
    """Whoever gives --percent alone need not know how many micro-batches make a third."""
    thirds = Shares(gpu=0.34, cpu=0.33, disk=0.33)
    plan = choose_plan({"hidden": thirds}, planner(LARGE, Tier.GPU), Tier.GPU, len(NEEDS))
    assert {mb.hidden_home for mb in plan.micro_batches} == set(Tier)


def test_a_machine_with_room_takes_all_rows_at_once():
    plan = choose_plan({}, planner(LARGE, Tier.CPU), Tier.CPU, len(NEEDS))
    assert [mb.num_places for mb in plan.micro_batches] == [len(NEEDS)]


def test_weights_that_do_not_fit_fill_the_fastest_tier_first():
    near = Shares(gpu=1.0)
    block = {"micro_batch_size": 7, "num_micro_batches": 1, "max_batch_tokens": 512}
    asked = {**block, "kv_cache": near, "hidden": near}
    whole = planner(LARGE, Tier.GPU, num_hidden_layers=12)(Policy(weights=near, **asked))
    weights = sum(pool.num_bytes for pool in whole.pools if pool.name == "weights")
    limits = Budgets(gpu=whole.tier_bytes(Tier.GPU) - weights // 4, cpu=GIB, disk=GIB)
    plan = choose_plan(asked, planner(limits, Tier.GPU, num_hidden_layers=12), Tier.GPU, 7)
    assert 0.3 < plan.policy.weights.gpu < 1
    assert plan.policy.weights.disk < 1e-9
    assert not plan.shortfalls()


GIVEN: dict[str, st.SearchStrategy[Any]] = {
    "micro_batch_size": st.integers(1, 100),
    "num_micro_batches": st.integers(1, 8),
    "max_batch_tokens": st.sampled_from([1, 7, 64, 512, 5000]),
    "kv_cache": st.sampled_from([Shares(cpu=1.0), Shares(cpu=0.5, disk=0.5), Shares(disk=1.0)]),
    "hidden": st.sampled_from([Shares(cpu=1.0), Shares(disk=1.0)]),
    "weights": st.sampled_from([Shares(cpu=1.0), Shares(cpu=0.5, disk=0.5), Shares(disk=1.0)]),
    "resident_dtype": st.sampled_from(RESIDENT_DTYPES),
    "strategy": st.sampled_from(STRATEGIES),
    "prefetch_depth": st.integers(1, 20),
    "separate_layers": st.booleans(),
}


@given(
    asked=st.fixed_dictionaries({}, optional=GIVEN),
    limits=budgets(),
    tier=TIERS,
    num_rows=st.integers(1, len(NEEDS)),
)
def test_what_was_given_is_kept_whatever_else_is_chosen(asked, limits, tier, num_rows):
    make = planner(limits, tier, NEEDS[:num_rows])
    try:
        plan = choose_plan(asked, make, tier, num_rows)
    except PolicyError as error:
        assert "--" in str(error) or "share" in str(error)
        return
    for name, value in asked.items():
        assert getattr(plan.policy, name) == value


@given(num_rows=st.sampled_from([1, 3, 40, 64, 65, 200, 3000]))
def test_a_block_is_no_larger_than_the_job_asks_for(num_rows):
    needs = tuple(Need(5, 3) for _ in range(num_rows))
    make = planner(Budgets(gpu=64 * MIB, cpu=GIB, disk=GIB), Tier.GPU, needs)
    plan = choose_plan({}, make, Tier.GPU, num_rows)
    assert not plan.shortfalls()
    rows = sum(mb.num_places for mb in plan.micro_batches)
    assert rows == num_rows if num_rows <= 64 else 64 <= rows <= num_rows


@pytest.mark.parametrize(
    ("tier", "limits"),
    [
        (Tier.GPU, Budgets(gpu=15 * GIB, cpu=200 * GIB, disk=2000 * GIB)),
        (Tier.GPU, Budgets(gpu=2 * GIB, cpu=2 * GIB, disk=20 * GIB)),
        (Tier.CPU, Budgets(gpu=0, cpu=60 * GIB, disk=500 * GIB)),
    ],
)
def test_a_plan_for_175b_takes_a_bounded_number_of_tries(repo, tier, limits):
    config = read_config(json.loads((repo / "policies/models/opt-175b.json").read_text()))
    make = Planner(
        config,
        [Need(512, 32)] * 1000,
        stored_tensors(config),
        limits,
        device_tier=tier,
        compute_dtype="float16" if tier == Tier.GPU else "float32",
    )
    num_made, make_counted = counted(make)
    plan = choose_plan({}, make_counted, tier, 1000)
    assert len(num_made) < 2000
    if limits.gpu != 2 * GIB:
        assert not plan.shortfalls()


def counted(make: Callable[[Policy], Plan]) -> tuple[list[Policy], Callable[[Policy], Plan]]:
    asked: list[Policy] = []

    def noted(policy: Policy) -> Plan:
        asked.append(policy)
        return make(policy)

    return asked, noted
