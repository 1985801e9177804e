"""The pipeline that a search finds: it fits everywhere, keeps what was asked, and balances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest

from flexpipe.errors import PlanError, PolicyError
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.pipeline import (
    FoundPipeline,
    best_pipeline,
    search_pipeline,
)
from flexpipe.policy.room import pipeline_by_rule
from flexpipe.policy.shares import Machine
from flexpipe.policy.site import Model, Site
from flexpipe.units import MIB
from tests.policy.test_predict_stages import LINKED
from tests.policy.test_search import CONFIG, NO_ROOM
from tests.schedule.plans import FakeForm, stored_tensors

NEEDS = [Need(20 + 3 * index % 40, 5) for index in range(16)]
BLOCK: dict[str, Any] = {"micro_batch_size": 4, "num_micro_batches": 2}
SHAPE = ("micro_batch_size", "num_micro_batches", "max_batch_tokens", "strategy")


def planner_for(needs: Sequence[Need], pipeline: Pipeline, rank: int, budgets: Budgets) -> Planner:
    return Planner(
        CONFIG,
        needs,
        stored_tensors(CONFIG),
        budgets,
        device_tier=Tier.GPU,
        compute_dtype="float32",
        form_of=partial(FakeForm.of, CONFIG),
        pipeline=pipeline,
        rank=rank,
    )


MODEL = Model(num_layers=CONFIG.num_layers, needs=NEEDS, make_planner=partial(planner_for, NEEDS))


def site(gpu_mib: float, cpu_mib: float = 400, *, faster: float = 1.0, **given: Any) -> Site:
    """A machine with so much memory, whose products are so much faster."""
    rates = LINKED.compute
    matmul = {
        dtype: replace(surface, curves=tuple(curve.scaled(faster) for curve in surface.curves))
        for dtype, surface in rates.matmul.items()
    }
    profile = replace(LINKED, compute=replace(rates, matmul=matmul, packed={}))
    return Site(
        budgets=Budgets(
            gpu=int(gpu_mib * MIB), cpu=NO_ROOM + int(cpu_mib * MIB), disk=2**40, overhead=0
        ),
        device_tier=Tier.GPU,
        machine=Machine(profile=profile, device_tier=Tier.GPU),
        given=given,
    )


def find(sites: Sequence[Site], **asked: Any) -> FoundPipeline:
    return search_pipeline(MODEL, sites, Arrangement(num_stages=len(sites), **asked))


@cache
def two_alike() -> FoundPipeline:
    return find([site(30)] * 2)


def best(found: FoundPipeline) -> tuple[Plan, ...]:
    assert found.best is not None
    return found.best.plans


def counts(plans: Sequence[Plan]) -> list[int]:
    return [plan.num_decoder_layers for plan in plans]


def test_every_stage_fits_and_all_share_the_shape_of_a_block():
    plans = best(two_alike())
    assert [plan.rank for plan in plans] == [0, 1]
    assert all(plan.shortfalls() == {} for plan in plans)
    first, second = (plan.policy for plan in plans)
    assert [getattr(first, name) for name in SHAPE] == [getattr(second, name) for name in SHAPE]
    assert sum(counts(plans)) == CONFIG.num_layers
    assert len(plans[0].blocks) == 2


def test_no_pipeline_played_is_faster_than_the_one_found():
    found = two_alike()
    assert found.best is not None and found.others
    assert all(found.best.run_s <= other.run_s for other in found.others)


def test_a_machine_three_times_as_fast_gets_more_of_the_layers():
    first, second = counts(best(find([site(60, faster=3.0, **BLOCK), site(60, **BLOCK)])))
    assert first > second


def test_what_is_given_for_one_stage_is_kept_there_and_nowhere_else():
    weights = Shares(cpu=1.0)
    plans = best(find([site(60, weights=weights, **BLOCK), site(60, **BLOCK)], partition="even"))
    assert plans[0].policy.weights == weights
    assert plans[1].policy.weights != weights


def test_a_cut_by_hand_or_even_is_taken_as_it_is():
    assert counts(best(find([site(60, **BLOCK)] * 2, layers=(5, 1)))) == [5, 1]
    assert counts(best(find([site(60, **BLOCK)] * 4, partition="even"))) == [2, 2, 1, 1]
    with pytest.raises(PolicyError, match="adds up to 7, but the model has 6"):
        find([site(60)] * 2, layers=(5, 2))


def test_virtual_stages_deal_each_ranks_layers_to_its_chunks():
    plans = best(find([site(60, **BLOCK)] * 2, num_chunks=2))
    assert len(plans[0].pipeline.layers) == 4
    assert sum(counts(plans)) == CONFIG.num_layers


def test_a_rank_that_can_hold_nothing_is_told_of():
    with pytest.raises(PlanError, match="no cut of 6 layers into 2 stages"):
        find([site(60, **BLOCK), site(0.01, 0, **BLOCK)])


def test_without_rates_the_rule_plans_every_stage_in_one_shape():
    sites = [replace(site(60), machine=None), replace(site(30), machine=None)]
    plans = best_pipeline(MODEL, sites, Arrangement(num_stages=2))
    assert counts(plans) == [3, 3]
    assert all(plan.shortfalls() == {} for plan in plans)
    first, second = (plan.policy for plan in plans)
    assert [getattr(first, name) for name in SHAPE] == [getattr(second, name) for name in SHAPE]


def test_without_rates_the_cut_is_even_unless_only_another_one_fits():
    little = 14.0  # holds the head and a few layers
    sites = [replace(site(60), machine=None), replace(site(little, 0), machine=None)]
    asked: dict[str, Any] = {"weights": Shares(gpu=1.0), "kv_cache": Shares(gpu=1.0)}
    sites = [replace(one, given=asked) for one in sites]
    plans = best_pipeline(MODEL, sites, Arrangement(num_stages=2))
    assert all(plan.shortfalls() == {} for plan in plans)
    assert counts(plans) != [3, 3]
    even = best_pipeline(MODEL, sites, Arrangement(num_stages=2, partition="even"))
    assert counts(even) == [3, 3]
    assert even[1].shortfalls()


def test_where_no_large_block_fits_the_search_finds_what_the_rule_finds():
    all_there = {"weights": Shares(gpu=1.0), "kv_cache": Shares(gpu=1.0), "hidden": Shares(gpu=1.0)}
    needs = [Need(480, 4)] * 2
    model = replace(MODEL, needs=needs, make_planner=partial(planner_for, needs))
    sites, halves = [site(21.5, **all_there)] * 2, Arrangement(num_stages=2)
    plans = best(search_pipeline(model, sites, halves))
    assert plans == pipeline_by_rule(model, sites, halves)
    assert all(plan.shortfalls() == {} for plan in plans)
    assert plans[0].policy.max_batch_tokens < 2048


@pytest.mark.parametrize("gpu_mib", [16, 30, 60])
def test_a_coarse_search_comes_near_the_full_one(gpu_mib: int) -> None:
    sites, arrangement = [site(gpu_mib)] * 2, Arrangement(num_stages=2, partition="even")
    full, coarse = (
        search_pipeline(MODEL, sites, arrangement, coarse=coarse) for coarse in (False, True)
    )
    assert full.best is not None and coarse.best is not None
    assert 0.8 * full.best.run_s <= coarse.best.run_s <= 1.25 * full.best.run_s
    assert len(coarse.others) < 2 and coarse.num_choices < full.num_choices
