"""A proposal tells the plan found, why it is that one, and what would change it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from flexpipe.errors import PlanError
from flexpipe.job.outlook import Outlook, Shape
from flexpipe.job.proposal import Proposal, propose
from flexpipe.plan.block import Need
from flexpipe.plan.plan import Budgets
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.policy_file import MadeFor, PolicyFile
from flexpipe.plan.tier import Tier
from flexpipe.policy.search import Limits
from flexpipe.units import MIB
from tests.policy.machine import OVERHEADS, SLOWDOWN, machine
from tests.schedule.plans import stored_tensors, tiny_config

DAY = "2026-11-21"
CONFIG = tiny_config(num_hidden_layers=6, hidden_size=256, intermediate_size=1024)


def outlook(gpu: float = 14, cpu: float = 110, disk: float = 100) -> Outlook:
    """Budgets in MiB, on a machine of round numbers."""
    stored: Any = stored_tensors(CONFIG)
    return Outlook(
        shape=Shape(name="tiny", config=CONFIG, stored=stored, directory=None),
        needs=[Need(40, 5)] * 12,
        profile=machine(overhead_s=OVERHEADS, slowdown=SLOWDOWN),
        emulation=None,
        device="round",
        device_tier=Tier.GPU,
        budgets=Budgets(gpu=int(gpu * MIB), cpu=int(cpu * MIB), disk=int(disk * MIB)),
        compute_dtype="float32",
    )


@pytest.fixture(scope="module")
def proposal() -> Proposal:
    return propose(outlook(), {"cpu_attention": False}, Limits(), DAY)


def test_the_file_holds_the_plans_policy_and_what_it_was_made_for(proposal: Proposal) -> None:
    text = proposal.policy_file()
    read = PolicyFile.of(yaml.safe_load(text))
    assert Policy(**read.knobs) == proposal.plan.policy
    assert read.made_for == MadeFor.of("tiny", CONFIG)
    opening = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("tiny", DAY, "12 requests", "round", "tokens/s", "bottleneck"):
        assert any(word in line for line in opening)


def test_the_policy_of_the_file_makes_the_same_plan(proposal: Proposal) -> None:
    read = PolicyFile.of(yaml.safe_load(proposal.policy_file()))
    assert outlook().choose(read.knobs).policy == proposal.plan.policy


def test_each_tiers_bytes_add_up_to_its_budget(proposal: Proposal) -> None:
    tiers = proposal.to_dict()["tiers"]
    assert set(tiers) == {"gpu", "cpu", *(["disk"] if "disk" in tiers else [])}
    for tier, held in tiers.items():
        parts = sum(held[name] for name in ("weights", "KV cache", "hidden", "buffers", "free"))
        assert parts == held["budget"] == outlook().budgets.of(Tier(tier))
        assert min(held.values()) >= 0


def test_data_are_plain_and_hold_all_that_is_shown(proposal: Proposal) -> None:
    data = json.loads(json.dumps(proposal.to_dict(), allow_nan=False))
    assert data["policy"] == proposal.plan.policy.to_dict()
    made = data["prediction"]
    assert made["total_s"] == pytest.approx(made["load_s"] + made["prefill_s"] + made["decode_s"])
    assert made["bottleneck"] and 0 < made["bound_s"] <= made["prefill_s"] + made["decode_s"]
    assert made["disk_bytes_per_1000_tokens"] >= 0 and made["generated_tokens_per_s"] > 0
    assert len(data["naive"]) == 4 and data["others"] and data["num_choices"] > 0
    assert any("1 GiB more" in what for what in data["gain_of"])
    assert all("bit" in what for what in data["gain_of_compression"])
    assert data["hardware"].startswith("round, made up")


def test_people_see_the_plan_its_bound_the_naive_plans_and_what_would_help(
    proposal: Proposal,
) -> None:
    text = proposal.render()
    for words in (
        "tiny on round in float32: 12 requests, 480 prompt tokens, 60 to generate",
        "written to disk per 1,000 tokens",
        "of that bound is reached",
        "all resident",
        "all weights streamed from host memory",
        "all weights streamed from disk",
        "more gpu memory",
        "lossy, so only with --compression",
        "choices estimated",
    ):
        assert words in text
    best = proposal.prediction.bottleneck
    assert f"bottleneck: {best}" in text


def test_an_alternative_is_told_by_what_differs_from_the_plan_found(proposal: Proposal) -> None:
    lines = proposal.render().splitlines()
    told = [line for line in lines if line.lstrip().startswith("next best")]
    assert len(told) == min(5, len(proposal.found.others))
    assert len({line.split("  ")[-1] for line in told}) == len(told)
    assert all("--overlap" not in line and "--cpu-cache-compute" not in line for line in told)


def test_limits_that_no_plan_keeps_are_refused_with_what_comes_nearest() -> None:
    with pytest.raises(PlanError) as refused:
        propose(outlook(), {}, Limits(max_latency_s=1e-6), DAY)
    text = str(refused.value)
    assert "The shortest latency found is" in text and "raise --max-latency" in text
    assert "\n" not in text and refused.value.exit_code == 4


def test_a_machine_on_which_nothing_fits_is_refused_with_the_shortfall() -> None:
    with pytest.raises(PlanError, match="the plan does not fit: gpu needs"):
        propose(outlook(gpu=0.2), {}, Limits(), DAY)


def test_given_knobs_are_shown_as_they_were_given() -> None:
    given = {"weights": Shares(cpu=1.0), "prefetch_depth": 3, "strategy": "multi"}
    made = propose(outlook(gpu=20, cpu=130), given, Limits(), DAY)
    line = made.render().splitlines()[2]
    assert line.startswith("--percent 0 100 ") and "--prefetch-depth 3" in line
    assert "--overlap multi" in line
