"""The linear programme and the plans of whole tensors and rows that come of it say the same of what
fits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.block import KV_PAGE, Need
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier
from flexpipe.policy.estimate import Demand
from flexpipe.policy.shares import (
    Machine,
    SharesProgramme,
    all_on,
    home_bytes,
    realize,
)
from flexpipe.units import GIB
from tests.policy.machine import OVERHEADS, SLOWDOWN, machine
from tests.schedule.plans import ROOMY, shares, stored_tensors, tiny_config

REAL = machine(overhead_s=OVERHEADS, slowdown=SLOWDOWN)
CONFIG = tiny_config(num_hidden_layers=10)
NEEDS = [Need(40 + 3 * index, 8) for index in range(20)]
LIMITS = settings(max_examples=40)
TIERS = st.sampled_from([Tier.GPU, Tier.CPU])
# Homes are whole tensors and rows: shares are met to one of each per tier, and each layer's part on
# a tier is rounded up to blocks of the disk.
TENSOR = 4 * CONFIG.vocab_size * CONFIG.hidden_size
ROW = CONFIG.num_layers * (max(need.total for need in NEEDS) * 2 * 4 * 64 + KV_PAGE)
MOST = 3_000_000  # about the weights, and about the KV cache of a large block
ROUNDING = TENSOR + ROW + 4096 * (CONFIG.num_layers + 4)


def planner(budgets: Budgets, tier: Tier) -> Planner:
    stored = stored_tensors(CONFIG)
    return Planner(CONFIG, NEEDS, stored, budgets, device_tier=tier, compute_dtype="float32")


def programme(make: Planner, tier: Tier, knobs: dict[str, Any], **how: Any) -> SharesProgramme:
    at = Machine(profile=REAL, device_tier=tier)
    return SharesProgramme(make, at, Demand.of(NEEDS), knobs, **how)


def tiers_of(tier: Tier) -> tuple[Tier, ...]:
    return Machine(profile=REAL, device_tier=tier).tiers


@st.composite
def knobs(draw: st.DrawFn, tier: Tier) -> dict[str, Any]:
    """All knobs but the shares of weights and KV cache."""
    return {
        "hidden": all_on(tier),
        "micro_batch_size": draw(st.integers(1, 8)),
        "num_micro_batches": draw(st.integers(1, 3)),
        "max_batch_tokens": 64,
        "prefetch_depth": draw(st.integers(1, 2)),
        "separate_layers": draw(st.booleans()),
        "cpu_attention": draw(st.booleans()),
    }


def more(budgets: Budgets, num_bytes: int | dict[Tier, int]) -> Budgets:
    by_tier = {
        tier.value: budgets.of(tier)
        + (num_bytes if isinstance(num_bytes, int) else num_bytes[tier])
        for tier in Tier
    }
    return Budgets(**by_tier)


def least(asked: dict[str, Any], tier: Tier) -> Budgets:
    """What these knobs need with weights and KV cache on disk."""
    slowest = all_on(Tier.DISK)
    plan = planner(ROOMY, tier)(Policy(**asked, weights=slowest, kv_cache=slowest))
    return Budgets(**{one.value: plan.tier_bytes(one) for one in Tier})


def fixed_bytes(plan: Plan, tier: Tier) -> float:
    """What is no home of weights or KV cache: slots, staging, workspace, the process."""
    return plan.tier_bytes(tier) - sum(home_bytes(plan, tier))


@LIMITS
@given(data=st.data(), tier=TIERS, travels=st.tuples(st.booleans(), st.booleans()))
def test_shares_that_the_programme_finds_make_a_plan_that_fits(data, tier, travels):
    """To within the rounding of a tensor and a row per tier."""
    asked = data.draw(knobs(tier))
    budgets = more(least(asked, tier), {one: data.draw(st.integers(-ROW, MOST)) for one in Tier})
    found = programme(planner(budgets, tier), tier, asked).solve({}, travels=travels)
    if found is None:
        return
    for kind, moves in (("weights", travels[0]), ("kv_cache", travels[1])):
        share = getattr(found, kind)
        assert sum(share.of(one) for one in Tier) == pytest.approx(1, abs=2e-6)
        assert moves or share == all_on(tier)
    plan = realize(planner(more(budgets, ROUNDING), tier), asked, found, tiers_of(tier))
    assert plan is not None and not plan.shortfalls()


@LIMITS
@given(data=st.data(), tier=TIERS)
def test_where_a_plan_fits_the_programme_finds_shares_no_slower(data, tier):
    """With room for slots and staging as large as the programme takes them: as if all travelled."""
    asked = {**data.draw(knobs(tier)), "cpu_attention": False}
    kinds = {"weights": data.draw(shares(tier)), "kv_cache": data.draw(shares(tier))}
    roomy = planner(ROOMY, tier)
    try:
        plan = roomy(Policy(**asked, **kinds))
    except PolicyError:
        return  # a share that no whole item fits
    slowest = all_on(Tier.DISK)
    most = roomy(Policy(**asked, weights=slowest, kv_cache=slowest))
    needed = {
        one: plan.tier_bytes(one) + max(0, int(fixed_bytes(most, one) - fixed_bytes(plan, one)))
        for one in Tier
    }
    budgets = more(Budgets(gpu=ROUNDING, cpu=ROUNDING, disk=ROUNDING), needed)
    solver = programme(planner(budgets, tier), tier, asked)
    found = solver.solve({}, travels=(True, True))
    same = solver.solve(kinds, travels=(True, True))
    assert found is not None and same is not None
    assert same.weights == kinds["weights"] and same.kv_cache == kinds["kv_cache"]
    assert found.seconds <= same.seconds * (1 + 1e-5)


@LIMITS
@given(data=st.data(), tier=TIERS, kind=st.sampled_from(["weights", "kv_cache"]))
def test_shares_that_are_fixed_stay_and_only_the_others_are_found(data, tier, kind):
    asked, given_shares = data.draw(knobs(tier)), data.draw(shares(tier))
    solver = programme(planner(ROOMY, tier), tier, asked)
    found = solver.solve({kind: given_shares}, travels=(True, True))
    free = solver.solve({}, travels=(True, True))
    assert found is not None and free is not None
    assert getattr(found, kind) == given_shares
    assert free.seconds <= found.seconds * (1 + 1e-5)


@pytest.mark.parametrize("tier", [Tier.GPU, Tier.CPU])
def test_nothing_leaves_the_device_where_there_is_room(tier):
    """Not even where moving would cost nothing, since another lane is busier."""
    for size in (1, 8):
        asked = {"hidden": all_on(tier), "micro_batch_size": size, "num_micro_batches": 2}
        found = programme(planner(ROOMY, tier), tier, asked).solve({}, travels=(True, True))
        assert found is not None
        assert found.weights == found.kv_cache == all_on(tier)


def test_a_device_without_room_has_no_shares():
    asked = {"hidden": all_on(Tier.GPU), "micro_batch_size": 4, "num_micro_batches": 1}
    for budgets in (Budgets(gpu=1000, cpu=GIB, disk=GIB), Budgets(gpu=GIB, cpu=1000, disk=GIB)):
        solver = programme(planner(budgets, Tier.GPU), Tier.GPU, asked)
        for travels in ((False, False), (True, True)):
            assert solver.solve({}, travels=travels) is None
            assert solver.solve({"weights": all_on(Tier.DISK)}, travels=travels) is None


def test_bytes_written_to_disk_stay_below_their_limit():
    asked = {"hidden": all_on(Tier.GPU), "micro_batch_size": 8, "num_micro_batches": 2}
    room = {Tier.GPU: 0, Tier.CPU: ROW, Tier.DISK: GIB}
    make = planner(more(least(asked, Tier.GPU), room), Tier.GPU)
    weights = {"weights": all_on(Tier.DISK)}
    free = programme(make, Tier.GPU, asked).solve(weights, travels=(True, True))
    assert free is not None and free.kv_cache.disk > 0.1
    for written, most in ((0.0, 1e-6), (200_000.0, free.kv_cache.disk / 2)):
        solver = programme(make, Tier.GPU, asked, most_written=written)
        found = solver.solve(weights, travels=(True, True))
        assert found is None or found.kv_cache.disk <= most
        all_on_disk = {**weights, "kv_cache": all_on(Tier.DISK)}
        assert solver.solve(all_on_disk, travels=(True, True)) is None


@LIMITS
@given(data=st.data(), tier=TIERS)
def test_what_no_longer_fits_when_shares_become_whole_tensors_moves_down(data, tier):
    asked = {**data.draw(knobs(tier)), "cpu_attention": False}
    budgets = more(least(asked, tier), {one: data.draw(st.integers(0, MOST)) for one in Tier})
    slow = more(budgets, {Tier.GPU: 0, Tier.CPU: 0, Tier.DISK: GIB})
    found = programme(planner(slow, tier), tier, asked).solve({}, travels=(True, True))
    assert found is not None
    plan = realize(planner(slow, tier), asked, found, tiers_of(tier))
    assert plan is not None and not plan.shortfalls()
