"""Steps through the stages of a pipeline, as boxes of time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.plan.pipeline import Pipeline
from flexpipe.policy.flow import Flow, StepShape, flow


def go(
    num_stages: int = 4,
    num_blocks: int = 4,
    num_rounds: int = 5,
    *,
    num_chunks: int = 1,
    count: int = 1,
    layers: int = 1,
    message_s: float = 0.0,
    return_s: float = 0.0,
    drains: bool = False,
    seconds: list[float] | None = None,
) -> Flow:
    """Steps of a second on each stage, or of as many as `seconds` has for them."""
    steps = [StepShape(block, count) for _ in range(num_rounds) for block in range(num_blocks)]
    pipeline = Pipeline(
        layers=(layers,) * num_stages * num_chunks, num_stages=num_stages, num_blocks=num_blocks
    )
    took = np.array([seconds or [1.0] * len(steps)] * num_stages)
    messages, returns = (np.full(len(steps), each) for each in (message_s, return_s))
    return flow(pipeline, steps, took, messages, returns, drains=drains)


@pytest.mark.parametrize(("num_stages", "num_blocks"), [(1, 1), (2, 2), (4, 4), (4, 8)])
def test_equal_stages_are_busy_but_for_one_fill(num_stages, num_blocks):
    assert go(num_stages, num_blocks).ends_s[-1] == 5 * num_blocks + num_stages - 1


@pytest.mark.parametrize("num_blocks", [4, 8, 16])
def test_rounds_that_drain_fill_every_time(num_blocks):
    assert go(4, num_blocks, drains=True).ends_s[-1] == 5 * (num_blocks + 3)


def test_fewer_blocks_than_stages_wait_for_their_tokens():
    assert go(4, 2, 10).ends_s[-1] == 10 * 4 + 1


def test_virtual_stages_fill_in_smaller_portions():
    assert go(4, 4, num_chunks=2).ends_s[-1] == 5 * 4 + 3 / 2


def test_micro_batches_pass_on_before_their_block_is_done_but_only_in_the_last_layer():
    assert go(4, 4, count=4, layers=1).ends_s[-1] == pytest.approx(20 + 3 / 4)
    assert go(4, 4, count=4, layers=3).ends_s[-1] == pytest.approx(20 + 3 * (1 - 1 / 4))


def test_messages_lengthen_the_way_and_not_the_steps():
    assert go(4, 8, message_s=0.25).ends_s[-1] == 40 + 3 * 1.25
    assert go(4, 4, 10, message_s=0.25).ends_s[-1] == 10 * (4 + 3 * 0.25) + 3


def test_tokens_on_their_way_back_hold_up_only_their_own_block():
    assert go(4, 8, return_s=3.0).ends_s[-1] == 40 + 3 + 3
    assert go(4, 4, 10, return_s=0.5).ends_s[-1] == 10 * 4.5 + 3


def test_a_long_step_holds_up_those_behind_it():
    seconds = [1.0] * 20
    seconds[4] = 5.0
    assert go(seconds=seconds).ends_s[-1] > go().ends_s[-1] + 4


@given(
    seconds=st.lists(st.floats(0.1, 9), min_size=20, max_size=20),
    num_stages=st.integers(1, 5),
    num_blocks=st.sampled_from([1, 2, 4, 5]),
    drains=st.booleans(),
)
def test_no_job_is_shorter_than_its_work_or_longer_than_its_steps_in_a_row(
    seconds, num_stages, num_blocks, drains
):
    made = go(num_stages, num_blocks, 20 // num_blocks, seconds=seconds, drains=drains)
    total = sum(seconds)
    assert total - 1e-9 <= made.ends_s[-1] <= num_stages * total + 1e-9
    assert made.took_s.sum() == pytest.approx(made.ends_s[-1])
    assert (made.begins_s <= made.ends_s).all()
