"""An estimate is a job in three kinds of steps, priced as if its lanes overlapped perfectly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.plan.block import Need
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.estimate import Demand, Work, phases_of, work_of
from flexpipe.policy.predict import predict
from flexpipe.policy.profile import Profile
from flexpipe.schedule.simulate import Cost
from tests.policy.machine import OVERHEADS, SLOWDOWN, machine
from tests.schedule.plans import tiny_config, tiny_plan

FREE = machine()
REAL = machine(overhead_s=OVERHEADS, slowdown=SLOWDOWN)
CONFIG = tiny_config(num_hidden_layers=8)


def estimate_s(plan: Plan, demand: Demand, profile: Profile) -> float:
    costs = CostModel(plan, profile)
    return sum(
        phase.num_steps * work_of(costs, phase, demand).bound_s for phase in phases_of(plan, demand)
    )


@given(
    prompt=st.integers(1, 400),
    output=st.integers(1, 60),
    requests=st.integers(1, 90),
    size=st.integers(1, 16),
    count=st.integers(1, 4),
)
def test_steps_compute_every_prompt_token_and_decode_every_other_one(
    prompt, output, requests, size, count
):
    demand = Demand(num_requests=requests, prompt=prompt, output=output)
    needs = [Need(prompt, output)] * requests
    plan = tiny_plan(
        needs=needs, micro_batch_size=size, num_micro_batches=count, max_batch_tokens=256
    )
    phases, num_mbs = phases_of(plan, demand), len(plan.micro_batches)
    computed = num_mbs * sum(phase.num_steps * phase.prompt_tokens for phase in phases)
    decoded = num_mbs * sum(phase.num_steps * phase.decoding for phase in phases)
    places = sum(mb.num_places for mb in plan.micro_batches)
    # a micro-batch is as large as the mean, rounded up, and a step has whole tokens
    rounding = 1 + num_mbs / places
    steps = sum(phase.num_steps for phase in phases)
    assert computed == pytest.approx(requests * prompt, rel=0.02, abs=steps * num_mbs)
    if output > 1:
        least = (requests - places) * output + places * (output - 1)
        assert least * 0.999 <= decoded * rounding
    assert (phases[0].decoding == 0 and phases[-1].prompt_tokens == 0) or output == 1


HOMES = [
    {"weights": weights, "kv_cache": kv_cache, "hidden": hidden, "cpu_attention": attends}
    for weights in (Shares(gpu=1.0), Shares(cpu=1.0), Shares(disk=1.0))
    for kv_cache, attends in (
        (Shares(gpu=1.0), False),
        (Shares(cpu=1.0), False),
        (Shares(cpu=1.0), True),
        (Shares(disk=1.0), False),
    )
    for hidden in (Shares(gpu=1.0), Shares(cpu=1.0))
]


@pytest.mark.parametrize("profile", [FREE, REAL], ids=["free", "real"])
@pytest.mark.parametrize("block", [(8, 1), (4, 3)], ids=str)
def test_an_estimate_is_hardly_above_what_the_simulator_plays(
    profile: Profile, block: tuple[int, int]
) -> None:
    """Or the search would give a good plan up unplayed."""
    needs = [Need(64, 12)] * 24
    size, count = block
    ratios = []
    for homes in HOMES:
        plan = tiny_plan(
            homes, config=CONFIG, needs=needs, micro_batch_size=size, num_micro_batches=count
        )
        ratios.append(
            estimate_s(plan, Demand.of(needs), profile) / predict(plan, needs, profile).run_s
        )
    assert max(ratios) < 1.08
    assert min(ratios) > 0.5


@settings(max_examples=25)
@given(
    busy=st.dictionaries(
        st.sampled_from(["compute", "attend", "copy", "disk_read"]), st.floats(0, 10), min_size=1
    ),
    duty=st.floats(0.1, 1),
)
def test_disturbed_lanes_take_longer_but_never_than_one_after_the_other(busy, duty):
    work = Work()
    for activity, seconds in busy.items():
        work.add(activity, Cost(seconds, activity, duty), 1)
    slow = work.disturbed({(one, other): 1.5 for one in busy for other in busy if one != other})
    for name, seconds in work.seconds.items():
        assert seconds <= slow.seconds[name] <= sum(busy.values()) * (1 + 1e-9)
    assert work.disturbed({}).seconds == pytest.approx(work.seconds)


def test_one_micro_batch_waits_for_its_attention_on_the_cpu_and_several_do_not() -> None:
    """With few of them the path of one is what a step takes, with more the busiest lane."""
    needs = [Need(100, 24)] * 24
    homes: dict[str, Any] = {
        "weights": Shares(gpu=1.0),
        "kv_cache": Shares(cpu=1.0),
        "hidden": Shares(gpu=1.0),
        "cpu_attention": True,
    }
    bound_by = []
    for count in (1, 6):
        plan = tiny_plan(
            homes, config=CONFIG, needs=needs, micro_batch_size=24 // count, num_micro_batches=count
        )
        demand = Demand.of(needs)
        phases = phases_of(plan, demand)
        work = work_of(CostModel(plan, FREE), phases[-1], demand)
        lanes = work.seconds["compute"] + work.seconds["attend_cpu"]
        assert work.seconds["path"] * count >= lanes * 0.999
        bound_by.append(work.bottleneck)
    assert bound_by[0] == "path" and bound_by[1] != "path"


def test_what_rests_nowhere_else_moves_over_no_link() -> None:
    needs = [Need(64, 24)] * 8
    plan = tiny_plan(
        {"weights": Shares(gpu=1.0), "kv_cache": Shares(gpu=1.0), "hidden": Shares(gpu=1.0)},
        needs=needs,
        micro_batch_size=8,
    )
    demand = Demand.of(needs)
    for phase in phases_of(plan, demand):
        moved = work_of(CostModel(plan, FREE), phase, demand).num_bytes
        assert set(moved) <= {"d2h"}  # tokens that were sampled
        assert moved.get("d2h", 0) < 1000
    assert plan.device_tier == Tier.GPU
