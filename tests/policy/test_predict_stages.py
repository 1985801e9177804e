"""What a prediction claims of a pipeline, and that a long job is told from few of its steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from flexpipe.errors import PolicyError
from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.policy.curve import Curve
from flexpipe.policy.predict import Assignment, Effort, Prediction, predict_stages
from flexpipe.policy.profile import Profile
from tests.policy.machine import OVERHEADS, SLOWDOWN, machine
from tests.policy.test_predict import CPU, DISK, GPU, REAL, WHOLE, ragged
from tests.schedule.plans import tiny_config, tiny_plan

LINKED = machine(
    overhead_s=OVERHEADS,
    slowdown=SLOWDOWN,
    links={**REAL.links, "comm": Curve.of({1024: 1e8, 2**20: 4e9})},
)
RESIDENT: dict[str, Any] = {"weights": GPU, "kv_cache": GPU, "hidden": GPU}
STREAMED: dict[str, Any] = {"weights": CPU, "kv_cache": CPU, "hidden": GPU}
ON_DISK: dict[str, Any] = {"weights": DISK, "kv_cache": CPU, "hidden": CPU}


def stages(
    needs: Sequence[Need],
    num_stages: int,
    num_blocks: int,
    *,
    num_chunks: int = 1,
    profile: Profile = LINKED,
    **knobs: Any,
) -> list[Assignment]:
    """A tiny model of 24 layers, in even stages on machines alike."""
    count = num_stages * num_chunks
    pipeline = Pipeline(layers=(24 // count,) * count, num_stages=num_stages, num_blocks=num_blocks)
    how: dict[str, Any] = {"micro_batch_size": 2, "num_micro_batches": 2, **RESIDENT, **knobs}
    config = tiny_config(num_hidden_layers=24)
    plans = [
        tiny_plan(config=config, needs=needs, pipeline=pipeline, rank=rank, **how)
        for rank in range(num_stages)
    ]
    return [Assignment(plan=plan, profile=profile) for plan in plans]


def both(assigned: list[Assignment], needs: Sequence[Need]) -> tuple[Prediction, Prediction]:
    """Played whole, and told from few steps."""
    whole, few = (
        predict_stages(assigned, needs, effort=Effort(exact_ops=exact)) for exact in (WHOLE, 0)
    )
    return whole, few


EQUAL = [Need(24, 12)] * 16


def test_a_prediction_of_stages_adds_up():
    assigned = stages(EQUAL, 4, 4, **STREAMED)
    made = predict_stages(assigned, EQUAL)
    assert [stage.rank for stage in made.stages] == [0, 1, 2, 3]
    assert [stage.num_layers for stage in made.stages] == [6] * 4
    assert made.bound_s == max(stage.bound_s for stage in made.stages) <= made.run_s
    assert made.bottleneck.endswith(" of stage 3")  # which has the head
    assert made.generated_tokens == 16 * 12
    for name, num_bytes in made.link_bytes.items():
        assert num_bytes == sum(stage.link_bytes.get(name, 0) for stage in made.stages)
    for stage, one in zip(made.stages, assigned, strict=True):
        assert stage.tier_bytes["gpu"] == one.plan.tier_bytes(one.plan.device_tier)
        assert 0 <= stage.bubble < 1
        assert stage.busy_s["compute"] <= (1 - stage.bubble) * made.run_s + 1e-9


def test_each_stage_sends_the_hidden_of_every_token_and_the_last_one_only_tokens():
    made = predict_stages(stages(EQUAL, 2, 2), EQUAL)
    first, last = made.stages
    num_tokens = sum(need.prompt + need.output - 1 for need in EQUAL)
    assert first.link_bytes["comm"] == num_tokens * 64 * 4  # hidden of 64 float32
    assert last.link_bytes["comm"] == sum(need.output for need in EQUAL) * 16


def test_more_stages_are_faster_and_more_blocks_fill_them():
    took = [predict_stages(stages(EQUAL, 1, 1), EQUAL).run_s]
    for num_blocks in (1, 2, 4):
        took.append(predict_stages(stages(EQUAL, 4, num_blocks), EQUAL).run_s)
    alone, one_block, two, four = took
    assert one_block > two > four
    assert four < alone


def test_an_unknown_link_is_told_by_name():
    with pytest.raises(PolicyError, match="has no link for comm"):
        predict_stages(stages(EQUAL, 2, 2, profile=REAL), EQUAL)


JOBS: dict[str, tuple[dict[str, Any], float]] = {  # and how near it comes
    "resident": (RESIDENT, 0.03),
    "streamed": (STREAMED, 0.05),
    "from disk": (ON_DISK, 0.06),
    "resident, multi": ({**RESIDENT, "strategy": "multi"}, 0.15),
    "streamed, no overlap": ({**STREAMED, "strategy": "none"}, 0.15),
}


LENGTHS = {"equal": [Need(24, 12)] * 16, "ragged": ragged(32, 1)}
SAMPLE = [("resident", "ragged"), ("streamed", "equal"), ("resident, multi", "equal")]


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        pytest.param(*job, marks=[] if job in SAMPLE else pytest.mark.slow)
        for job in itertools.product(JOBS, LENGTHS)
    ],
)
def test_a_long_job_of_stages_is_told_from_few_steps_as_if_all_were_played(name, lengths):
    (knobs, near), needs = JOBS[name], LENGTHS[lengths]
    whole, few = both(stages(needs, 4, 4, **knobs), needs)
    assert few.run_s == pytest.approx(whole.run_s, rel=near)
    assert few.latency_s == pytest.approx(whole.latency_s, rel=0.2)
    assert few.num_steps == pytest.approx(whole.num_steps, rel=0.03)
    assert few.bound_s == pytest.approx(whole.bound_s, rel=0.05)
    for one, other in zip(few.stages, whole.stages, strict=True):
        assert one.bubble == pytest.approx(other.bubble, abs=0.06)


@pytest.mark.slow
def test_virtual_stages_of_a_long_job_are_told_too():
    needs = [Need(24, 16)] * 8
    whole, few = both(stages(needs, 2, 2, num_chunks=2, **STREAMED), needs)
    assert few.run_s == pytest.approx(whole.run_s, rel=0.15)


def test_stages_alike_are_played_once():
    needs = [Need(24, 16)] * 64
    four = predict_stages(stages(needs, 4, 4), needs, effort=Effort(exact_ops=0))
    eight = predict_stages(stages(needs, 8, 4), needs, effort=Effort(exact_ops=0))
    assert eight.num_simulated <= 1.2 * four.num_simulated
