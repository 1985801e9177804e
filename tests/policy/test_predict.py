"""What a prediction claims of a whole job, and that a long one is told from few of its steps."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.model.config import ModelConfig
from flexpipe.model.families import read_config
from flexpipe.plan.block import KV_PAGE, Need
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import STRATEGIES, Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.predict import THOROUGH, Effort, predict
from flexpipe.preset import find_preset
from tests.policy.machine import OVERHEADS, SLOWDOWN, machine
from tests.schedule.plans import tiny_config, tiny_plan

CPU, GPU, DISK = Shares(cpu=1.0), Shares(gpu=1.0), Shares(disk=1.0)
OFF_DEVICE: dict[str, Any] = {"weights": CPU, "kv_cache": CPU, "hidden": GPU}
EQUAL = [Need(24, 12)] * 24
REAL = machine(overhead_s=OVERHEADS, slowdown=SLOWDOWN)
WHOLE = 10**9  # ops; more than any job here has


def ragged(count: int, seed: int) -> list[Need]:
    draw = random.Random(seed)
    return [Need(draw.randint(4, 40), draw.randint(2, 24)) for _ in range(count)]


@given(
    needs=st.lists(st.builds(Need, st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=9),
    strategy=st.sampled_from(STRATEGIES),
    rows=st.integers(1, 3),
)
@settings(max_examples=40)
def test_a_prediction_adds_up(needs, strategy, rows):
    plan = tiny_plan(
        **OFF_DEVICE, needs=needs, micro_batch_size=rows, num_micro_batches=2, strategy=strategy
    )
    made = predict(plan, needs, REAL)
    assert made.bound_s <= made.run_s * (1 + 1e-9)
    assert made.total_s == pytest.approx(made.load_s + made.prefill_s + made.decode_s)
    assert 0 < made.latency_s <= made.run_s * (1 + 1e-9)
    assert made.prompt_tokens == sum(need.prompt for need in needs)
    assert made.generated_tokens == sum(need.output for need in needs)
    assert made.num_steps >= max(need.output for need in needs)
    assert made.tier_bytes == {
        tier.value: plan.tier_bytes(tier) for tier in Tier if plan.tier_bytes(tier)
    }
    for lane, busy_s in made.busy_s.items():
        assert busy_s <= made.run_s * (1 + 1e-9), lane


@given(faster=st.sampled_from([1.25, 2.0, 8.0]), strategy=st.sampled_from(STRATEGIES))
@settings(max_examples=20)
def test_a_machine_with_faster_links_is_never_predicted_to_be_slower(faster, strategy):
    needs = [Need(24, 4)] * 6
    plan = tiny_plan(
        **OFF_DEVICE, needs=needs, micro_batch_size=2, num_micro_batches=3, strategy=strategy
    )
    links = {name: curve.scaled(faster) for name, curve in REAL.links.items()}
    free = {**OVERHEADS, "hop": 0.0}
    before = predict(plan, needs, machine(overhead_s=free))
    after = predict(plan, needs, machine(overhead_s=free, links=links))
    assert after.run_s <= before.run_s * 1.01  # an op that is ready sooner may go before another


def test_weights_nearer_to_the_device_never_make_a_job_slower():
    took = []
    for weights in (DISK, CPU, Shares(gpu=0.5, cpu=0.5), GPU):
        plan = tiny_plan(
            needs=EQUAL, weights=weights, kv_cache=GPU, hidden=GPU,
            micro_batch_size=4, num_micro_batches=2,
        )  # fmt: skip
        took.append(predict(plan, EQUAL, REAL).run_s)
    assert took == sorted(took, reverse=True)
    assert took[-1] < took[0]


def test_a_product_takes_longer_when_it_meets_a_number_of_rows_for_the_first_time(monkeypatch):
    monkeypatch.setattr("flexpipe.plan.stage.ONEDNN_ELEMENTS", 1)
    needs = [Need(20, 3), Need(20, 5)]  # 40 tokens, then two rows, then one
    plan = tiny_plan(tier=Tier.CPU, needs=needs, micro_batch_size=2)
    before = predict(plan, needs, REAL)
    after = predict(plan, needs, machine(overhead_s={**OVERHEADS, "first": 1.0}, slowdown=SLOWDOWN))
    assert plan.num_product_shapes > 2
    assert after.prefill_s - before.prefill_s == pytest.approx(plan.num_product_shapes)
    assert after.decode_s - before.decode_s == pytest.approx(2 * plan.num_product_shapes)
    assert after.latency_s / before.latency_s == pytest.approx(after.run_s / before.run_s)


def test_a_request_waits_for_the_steps_of_its_own_stay():
    needs = [Need(8, 4)] * 8
    one = tiny_plan(needs=needs, micro_batch_size=8)
    two = tiny_plan(needs=needs, micro_batch_size=4)  # one half after the other
    together, in_turn = (predict(plan, needs, REAL) for plan in (one, two))
    assert together.latency_s == pytest.approx(together.run_s, rel=0.01)
    assert in_turn.latency_s == pytest.approx(in_turn.run_s / 2, rel=0.1)


# -- long jobs ------------------------------------------------------------------------------------

JOBS: dict[str, tuple[list[Need], dict[str, Any]]] = {
    "equal, resident": (EQUAL, {"weights": GPU, "kv_cache": GPU, "hidden": GPU}),
    "equal, off the device": (EQUAL, OFF_DEVICE),
    "equal, on disk": (EQUAL, {"weights": DISK, "kv_cache": CPU, "hidden": CPU}),
    "equal, multi": (EQUAL, {**OFF_DEVICE, "strategy": "multi"}),
    "equal, no overlap": (EQUAL, {**OFF_DEVICE, "strategy": "none"}),
    "ragged, off the device": (ragged(60, 1), OFF_DEVICE),
    "ragged, weights on two tiers": (
        ragged(60, 2),
        {"weights": Shares(gpu=0.5, cpu=0.5), "kv_cache": GPU, "hidden": GPU},
    ),
    "ragged, KV cache on disk": (
        ragged(48, 3),
        {"weights": GPU, "kv_cache": DISK, "hidden": GPU},
    ),
}


def job(name: str) -> tuple[Plan, list[Need]]:
    needs, knobs = JOBS[name]
    config = tiny_config(num_hidden_layers=20)
    return tiny_plan(
        config=config, needs=needs, micro_batch_size=4, num_micro_batches=2, **knobs
    ), needs


@pytest.mark.parametrize("name", JOBS)
def test_a_long_job_is_told_from_few_steps_as_if_all_were_played(name):
    plan, needs = job(name)
    whole = predict(plan, needs, REAL, effort=Effort(exact_ops=WHOLE))
    few = predict(plan, needs, REAL, effort=Effort(exact_ops=0))
    assert few.num_simulated < whole.num_simulated
    assert few.run_s == pytest.approx(whole.run_s, rel=0.05)
    assert few.latency_s == pytest.approx(whole.latency_s, rel=0.08)
    assert few.num_steps == pytest.approx(whole.num_steps, rel=0.03)
    assert few.bound_s == pytest.approx(whole.bound_s, rel=0.05)
    # a row's last page, which may never fill, counts by its share
    page = len(needs) * plan.config.num_layers * KV_PAGE // 2
    for link, num_bytes in whole.link_bytes.items():
        room = page if link == "disk_write" else 0
        assert few.link_bytes[link] == pytest.approx(num_bytes, rel=0.1, abs=room), link


def published(name: str) -> ModelConfig:
    return read_config(json.loads(find_preset("models", name).read_text(encoding="utf-8")))


def test_a_job_of_days_is_told_from_a_bounded_number_of_ops():
    needs = [Need(512, 256)] * 40_000
    plan = tiny_plan(
        config=published("llama-3-405b"),
        needs=needs,
        weights=Shares(gpu=0.1, cpu=0.5, disk=0.4),
        kv_cache=CPU,
        hidden=GPU,
        micro_batch_size=32,
        num_micro_batches=8,
    )
    made = predict(plan, needs, REAL)
    assert made.generated_tokens == 40_000 * 256
    assert made.num_simulated <= max(THOROUGH.exact_ops, 2 * THOROUGH.sampled_ops)
    assert made.num_steps >= 40_000 / (32 * 8) * 256
    assert made.bound_s <= made.run_s
