"""The plan that a search finds: it fits, keeps what was asked, and loses to nothing tried."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.job.outlook import Outlook, Shape
from flexpipe.model.config import ModelConfig
from flexpipe.plan.block import Need
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import RESIDENT_DTYPES, STRATEGIES, Policy, Shares
from flexpipe.plan.policy_file import PolicyFile
from flexpipe.plan.rule import choose_plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.predict import QUICK, Prediction, predict
from flexpipe.policy.profile import Profile, read_profile
from flexpipe.policy.search import Found, Limits, best_plan, disk_writes, search
from flexpipe.policy.shares import Machine, all_on
from flexpipe.preset import policy_file
from flexpipe.schedule.op import Kind
from flexpipe.units import GIB, MIB
from tests.conftest import REPO
from tests.policy.machine import OVERHEADS, SLOWDOWN, machine
from tests.schedule.plans import FakeForm, stored_tensors, tiny_config

TIE = 1.02  # plans whose times are closer than this are taken for equally fast
REAL = machine(overhead_s=OVERHEADS, slowdown=SLOWDOWN)
CONFIG = tiny_config(num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
NEEDS = [Need(20 + 3 * index % 40, 5) for index in range(12)]
NO_ROOM = 88 * MIB  # what a plan takes of host memory for the process, about


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its requests and a machine."""

    config: ModelConfig = CONFIG
    needs: list[Need]
    budgets: Budgets
    tier: Tier
    profile: Profile = REAL
    emulation: Emulation | None = None
    dtype: str = "float32"

    @property
    def planner(self) -> Planner:
        return Planner(
            self.config,
            self.needs,
            stored_tensors(self.config),
            self.budgets,
            device_tier=self.tier,
            compute_dtype=self.dtype,
            form_of=partial(FakeForm.of, self.config),
        )

    @property
    def machine(self) -> Machine:
        return Machine(profile=self.profile, device_tier=self.tier, emulation=self.emulation)

    def search(self, given: Mapping[str, Any] | None = None, **limits: Any) -> Found:
        how = self.planner, self.needs, self.machine, Limits(**limits)
        return search(given or {}, *how)

    def predict(self, plan: Plan) -> Prediction:
        return predict(plan, self.needs, self.profile, self.emulation, effort=QUICK)


def tiny(gpu: float, cpu: float, disk: float, tier: Tier = Tier.GPU, **changes: Any) -> Case:
    """Budgets in MiB; what the process takes of host memory comes on top."""
    budgets = Budgets(gpu=int(gpu * MIB), cpu=NO_ROOM + int(cpu * MIB), disk=int(disk * MIB))
    return Case(**{"needs": NEEDS, "budgets": budgets, "tier": tier, **changes})


# the tiny model has 25 MiB of weights; a row's KV cache is up to 0.7 MiB
CASES = {
    "all fits": tiny(80, 40, 100),
    "weights travel": tiny(24, 80, 100),
    "KV cache on disk": tiny(14, 10, 100),
    "CPU": tiny(0, 90, 100, Tier.CPU),
    "CPU with disk": tiny(0, 22, 100, Tier.CPU),
    "slow links": tiny(16, 40, 100, emulation=Emulation(h2d_bytes_per_s=1e9, d2h_bytes_per_s=1e9)),
}


@cache
def found(name: str) -> Found:
    return CASES[name].search()


@cache
def explained(name: str) -> Found:
    case = CASES[name]
    return search({}, case.planner, case.needs, case.machine, explain=True)


def moved_weights(plan: Plan) -> bool:
    return bool(plan.streamed_layers) or plan.embed_streams


@pytest.mark.parametrize("name", CASES)
def test_the_plan_found_fits_and_is_no_slower_than_the_naive_plans_and_the_rules(name: str) -> None:
    case, best = CASES[name], found(name).best
    assert best is not None and not best.plan.shortfalls()
    naive = [one for one in found(name).naive.values() if one is not None]
    rule = choose_plan({}, case.planner, case.tier, len(case.needs))
    rivals = [one.run_s for one in (*naive, *found(name).others)]
    assert naive and best.run_s <= TIE * min(*rivals, case.predict(rule).run_s)


def draw_shares(draw: random.Random, tiers: tuple[Tier, ...]) -> Shares:
    if draw.random() < 0.5:
        return all_on(draw.choice(tiers))
    cuts = [0, *sorted(draw.randint(0, 100) for _ in tiers[1:]), 100]
    return Shares(**{
        tier.value: (stop - start) / 100
        for tier, start, stop in zip(tiers, cuts, cuts[1:], strict=False)
    })  # fmt: skip


def random_plans(case: Case, seed: int) -> Iterator[Plan]:
    """Legal policies that fit, drawn freely."""
    draw, make, tiers = random.Random(seed), case.planner, case.machine.tiers
    while True:
        size = draw.choice((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64))
        policy = Policy(
            weights=draw_shares(draw, tiers),
            kv_cache=draw_shares(draw, tiers),
            hidden=all_on(draw.choice(tiers[:2])),
            micro_batch_size=size,
            num_micro_batches=draw.choice((1, 2, 3, 4, 8)),
            strategy=draw.choice(STRATEGIES),
            separate_layers=draw.random() < 0.3,
            prefetch_depth=draw.randint(1, 3),
            resident_dtype=draw.choice(RESIDENT_DTYPES),
            cpu_attention=draw.random() < 0.4,
            max_batch_tokens=max(size, draw.choice((64, 512, 2048))),
        )
        try:
            plan = make(policy)
        except PolicyError:
            continue
        if not plan.shortfalls():
            yield plan


def fastest(case: Case, num_plans: int) -> float:
    """Seconds of the fastest of so many random plans."""
    plans = random_plans(case, seed=1)
    return min(case.predict(next(plans)).run_s for _ in range(num_plans))


@pytest.mark.parametrize("num_plans", [12, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_no_random_policy_is_faster_in_the_same_simulator(name: str, num_plans: int) -> None:
    case, best = CASES[name], found(name).best
    assert best is not None
    assert best.run_s <= TIE * fastest(case, num_plans)


@pytest.mark.parametrize("name", ["weights travel", "KV cache on disk", "slow links"])
def test_the_fastest_tier_is_filled_where_something_is_left_to_place(name: str) -> None:
    best = found(name).best
    assert best is not None
    assert best.plan.tier_bytes(Tier.GPU) >= 0.9 * CASES[name].budgets.gpu


@pytest.mark.parametrize("name", ["all fits", "CPU"])
def test_a_model_that_fits_moves_no_weight(name: str) -> None:
    best = found(name).best
    assert best is not None and not moved_weights(best.plan)
    kinds = {Kind.READ_WEIGHT, Kind.LOAD_WEIGHT, Kind.READ_EMBED, Kind.LOAD_EMBED}
    made = predict(best.plan, NEEDS, REAL, keep_spans=True)
    (spans,) = made.spans
    assert spans and not kinds & {span.op.kind for span in spans}


def test_more_memory_is_never_predicted_to_be_slower() -> None:
    def run_s(tier: Tier, gpu: float = 13.0, cpu: float = 24.0) -> float:
        best = tiny(gpu, cpu, 100.0, tier, needs=NEEDS[:6]).search().best
        assert best is not None
        return best.run_s

    on_gpu, on_cpu = run_s(Tier.GPU), run_s(Tier.CPU)
    assert run_s(Tier.GPU, gpu=29.0) <= TIE * on_gpu
    assert run_s(Tier.GPU, cpu=40.0) <= TIE * on_gpu
    assert run_s(Tier.CPU, cpu=40.0) <= TIE * on_cpu


GIVEN: Mapping[str, st.SearchStrategy[Any]] = {
    "weights": st.sampled_from([Shares(cpu=1.0), Shares(cpu=0.3, disk=0.7), Shares(disk=1.0)]),
    "kv_cache": st.sampled_from([Shares(cpu=1.0), Shares(cpu=0.5, disk=0.5), Shares(disk=1.0)]),
    "hidden": st.sampled_from([Shares(cpu=1.0), Shares(disk=1.0)]),
    "micro_batch_size": st.integers(2, 24),
    "num_micro_batches": st.integers(2, 4),
    "strategy": st.sampled_from(STRATEGIES),
    "separate_layers": st.booleans(),
    "pin_weights": st.booleans(),
    "prefetch_depth": st.integers(1, 4),
    "compute_dtype": st.sampled_from(["auto", "float32"]),
    "resident_dtype": st.sampled_from(RESIDENT_DTYPES),
    "compress_weight": st.sampled_from(["none", "8", "4"]),
    "compress_vocabulary": st.sampled_from(["none", "8"]),
    "compress_cache": st.sampled_from(["none", "4"]),
    "compress_group": st.sampled_from([32, 128]),
    "cpu_attention": st.booleans(),
    "max_batch_tokens": st.sampled_from([64, 500, 4000]),
    "gpu_mem": st.just(40 * MIB),
    "cpu_mem": st.just(300 * MIB),
    "disk_mem": st.just(200 * MIB),
}


@settings(max_examples=10)
@given(
    asked=st.fixed_dictionaries({}, optional=dict(GIVEN)),
    tier=st.sampled_from([Tier.GPU, Tier.CPU]),
)
def test_every_knob_that_is_given_is_kept(asked: dict[str, Any], tier: Tier) -> None:
    case = tiny(40, 200, 200, tier, needs=NEEDS[:9])
    best = case.search(asked).best
    assert best is not None and not best.plan.shortfalls()
    assert {name: getattr(best.plan.policy, name) for name in asked} == asked
    plain = {"compress_weight", "compress_vocabulary", "compress_cache"} - asked.keys()
    assert all(getattr(best.plan.policy, name) == "none" for name in plain)


def test_where_everything_is_given_the_plan_is_that_and_no_other_is_tried() -> None:
    asked = {
        **{name: all_on(Tier.CPU) for name in ("weights", "kv_cache", "hidden")},
        "micro_batch_size": 5,
        "num_micro_batches": 2,
    }
    made = CASES["weights travel"].search({**asked, "cpu_attention": False})
    assert made.best is not None and not made.others and not made.naive
    assert {name: getattr(made.best.plan.policy, name) for name in asked} == asked


def test_attention_on_the_cpu_is_chosen_only_where_rows_attend_there() -> None:
    for name in CASES:
        made = found(name)
        for one in (made.best, *made.others):
            assert one is not None
            assert one.plan.policy.cpu_attention <= one.plan.attends_on_cpu


def test_no_two_plans_that_were_played_are_the_same() -> None:
    for name in CASES:
        made = found(name)
        assert made.best is not None
        policies = [one.plan.policy for one in (made.best, *made.others)]
        assert len(set(policies)) == len(policies)


# limits


def test_a_shorter_latency_is_found_at_the_cost_of_throughput() -> None:
    case, free = CASES["weights travel"], found("weights travel").best
    assert free is not None
    most_s = 0.6 * free.prediction.latency_s
    quick = case.search(max_latency_s=most_s).best
    assert quick is not None and quick.prediction.latency_s <= most_s
    assert quick.run_s >= free.run_s / TIE


def test_fewer_bytes_written_to_disk_are_found() -> None:
    case = CASES["KV cache on disk"]
    free = found("KV cache on disk").best
    assert free is not None and disk_writes(free.prediction) > 0
    for share in (0.5, 0.0):
        most = share * disk_writes(free.prediction)
        sparing = case.search(max_disk_writes=most).best
        assert sparing is not None and disk_writes(sparing.prediction) <= most
        assert sparing.run_s >= free.run_s / TIE


def test_a_limit_that_no_plan_keeps_leaves_none_and_says_why() -> None:
    made = CASES["weights travel"].search(max_latency_s=1e-6)
    assert made.best is None and made.refused
    assert all("a request would take" in why for _, why in made.refused)


def test_lossy_choices_are_made_only_where_they_are_allowed() -> None:
    """And then only where they win."""
    case = CASES["slow links"]
    plain = found("slow links")
    lossy = case.search(compression=True).best
    assert lossy is not None and plain.best is not None
    assert lossy.plan.policy.weight_codec or lossy.plan.policy.cache_codec
    assert lossy.run_s < plain.best.run_s
    for one in (plain.best, *plain.others):
        policy = one.plan.policy
        assert policy.weight_codec is policy.vocabulary_codec is policy.cache_codec is None
    assert max(explained("slow links").lossy.values()) > 1


def test_what_would_help_is_what_the_plan_lacks() -> None:
    wishes = explained("slow links").wishes
    assert wishes["h2d twice as fast"] > 1.1
    assert wishes["1 GiB more gpu memory"] > 1.1
    wishes = explained("all fits").wishes.values()
    assert all(gain == pytest.approx(1, abs=0.02) for gain in wishes)


# where there is nothing to search, or nothing to search with


def test_without_rates_the_plan_is_the_rules() -> None:
    case = CASES["weights travel"]
    rule = choose_plan({}, case.planner, case.tier, len(case.needs))
    plan = best_plan({}, case.planner, case.needs, case.tier, None)
    assert plan.policy == rule.policy
    lacking = replace(case, profile=machine(compute=replace(REAL.compute, sample={})))
    plan = best_plan({}, lacking.planner, lacking.needs, lacking.tier, lacking.machine)
    assert plan.policy == rule.policy


def test_where_nothing_fits_the_plan_says_what_is_missing() -> None:
    case = tiny(0.1, 80, 100)
    assert case.search().best is None
    plan = best_plan({}, case.planner, case.needs, case.tier, case.machine)
    assert set(plan.shortfalls()) == {Tier.GPU}


# real shapes on paper


@pytest.mark.parametrize(
    ("model", "prompts", "presets"),
    [
        pytest.param(
            "opt-30b",
            144,
            [
                "flexgen-opt-30b-t4",
                "flexgen-opt-30b-t4-no-overlap",
                "flexgen-opt-30b-t4-no-cpu-attention",
            ],
            marks=pytest.mark.slow,
        ),
        ("opt-175b", 256, ["flexgen-opt-175b-t4"]),
    ],
)
def test_flexgens_policies_are_beaten_on_its_machine_within_the_bound(
    model: str, prompts: int, presets: list[str]
) -> None:
    look = Outlook.on_paper(Shape.open(model), [Need(512, 32)] * prompts, "t4-gcp", {})
    profile = look.machine.profile
    best = search({}, look.planner(), look.needs, look.machine).best
    assert best is not None and not best.plan.shortfalls()
    assert best.plan.tier_bytes(Tier.GPU) > 0.9 * look.budgets.gpu
    made = predict(best.plan, look.needs, profile)
    assert made.bound_share <= 1
    for preset in presets:
        policy = Policy(**PolicyFile.read(policy_file(preset)).knobs)
        theirs = predict(look.planner(policy.compute_dtype)(policy), look.needs, profile)
        assert made.generated_tokens_per_s > theirs.generated_tokens_per_s


def test_a_cpu_on_paper_with_part_of_the_weights_on_disk_loses_to_no_random_policy() -> None:
    look = Outlook.on_paper(
        Shape.open("llama-3-8b"),
        [Need(128, 16)] * 16,
        str(REPO / "tests" / "profile.yaml"),
        {"cpu_mem": 9 * GIB},
    )
    best = search({}, look.planner(), look.needs, look.machine).best
    assert best is not None and best.plan.tier_bytes(Tier.CPU) > 0.9 * 9 * GIB
    case = Case(
        config=look.shape.config,
        needs=list(look.needs),
        budgets=look.budgets,
        tier=Tier.CPU,
        profile=read_profile(REPO / "tests" / "profile.yaml"),
        dtype=look.compute_dtype,
    )
    assert best.run_s <= TIE * fastest(case, 12)
