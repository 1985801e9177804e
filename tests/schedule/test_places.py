"""Who sits where: the job and its prediction see the same steps, and steps come to phases."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.plan.block import Need
from flexpipe.plan.plan import Plan
from flexpipe.policy.predict import predict
from flexpipe.schedule.op import Kind
from flexpipe.schedule.places import Phases, StepCount, phases
from flexpipe.schedule.step import MicroBatch
from tests.job.test_batcher import Job, plan_for, request
from tests.policy.machine import OVERHEADS, machine

NEEDS = st.lists(st.builds(Need, st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=12)
STEPS = st.builds(
    StepCount,
    prompt_tokens=st.integers(0, 2),
    decode_tokens=st.integers(0, 2),
    end_s=st.just(0.0),
)
Seen = dict[int, list[tuple[int, list[tuple[int, int, int, bool]]]]]


def seen(steps: dict[int, list[MicroBatch]]) -> Seen:
    """Of each step its micro-batches, and what their rows do."""
    return {
        index: [
            (
                batch.index,
                [(row.place, row.num_context, row.num_new, row.sampled) for row in batch.rows],
            )
            for batch in sorted(batches, key=lambda batch: batch.index)
        ]
        for index, batches in steps.items()
    }


def predicted_steps(plan: Plan, needs: list[Need]) -> Seen:
    found: dict[int, list[MicroBatch]] = defaultdict(list)
    (spans,) = predict(plan, needs, machine(overhead_s=OVERHEADS), keep_spans=True).spans
    for span in spans:
        if span.op.kind == Kind.COMMIT:
            assert span.op.batch is not None
            found[span.op.step].append(span.op.batch)
    return seen({rank: found[step] for rank, step in enumerate(sorted(found))})


@given(
    needs=NEEDS,
    rows=st.integers(1, 4),
    block=st.integers(1, 3),
    tokens=st.sampled_from([4, 16, 2048]),
)
def test_a_prediction_sees_the_steps_of_a_job_whose_answers_reach_their_limits(
    needs, rows, block, tokens
):
    requests = [request(index, need.prompt, need.output) for index, need in enumerate(needs)]
    plan = plan_for(
        requests, micro_batch_size=rows, num_micro_batches=block, max_batch_tokens=tokens
    )
    job = Job(plan, requests).run()
    assert predicted_steps(plan, needs) == seen(dict(enumerate(job.steps)))


@given(needs=NEEDS, rows=st.integers(1, 4), block=st.integers(1, 3))
def test_a_prediction_computes_every_token_once(needs, rows, block):
    requests = [request(index, need.prompt, need.output) for index, need in enumerate(needs)]
    plan = plan_for(requests, micro_batch_size=rows, num_micro_batches=block)
    steps = predicted_steps(plan, needs).values()
    rows_seen = [row for step in steps for _, batch in step for row in batch]
    assert sum(new for _, _, new, _ in rows_seen) == sum(
        need.prompt + need.output - 1 for need in needs
    )
    assert sum(sampled for *_, sampled in rows_seen) == sum(need.output for need in needs)


@given(steps=st.lists(STEPS, max_size=6), took=st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_phases_are_all_the_time_of_steps_that_did_something(steps, took):
    now = 10.0
    for step, seconds in zip(steps, took, strict=False):
        if step.prompt_tokens or step.decode_tokens:
            now += seconds
            step.end_s = now
    made = phases(steps, 10.0)
    assert made.prefill_s + made.decode_s == pytest.approx(now - 10.0)


def test_a_step_with_a_prompt_in_it_counts_as_prefill():
    steps = [
        StepCount(prompt_tokens=8, end_s=12.0),
        StepCount(prompt_tokens=4, decode_tokens=2, end_s=15.0),
        StepCount(decode_tokens=3, end_s=16.0),
    ]
    assert phases(steps, 10.0) == Phases(prefill_s=5.0, decode_s=1.0, decoded=3)
