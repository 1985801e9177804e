"""The first steps of a job, played alone, are those of the whole job."""

from __future__ import annotations

import pytest

from flexpipe.plan.block import Need
from flexpipe.plan.policy import percent_shares
from flexpipe.policy import predict as predicting
from flexpipe.policy.predict import Assignment, first_spans, predict
from flexpipe.policy.profile import read_profile
from flexpipe.schedule.op import Kind
from flexpipe.schedule.simulate import SimulatedSpan
from tests.conftest import REPO
from tests.schedule.plans import tiny_plan

PROFILE = read_profile(REPO / "tests" / "profile.yaml")
NEEDS = [Need(20, 9)] * 6
PLAN = tiny_plan(
    percent_shares([0, 50, 0, 50, 0, 100]), needs=NEEDS, micro_batch_size=2, num_micro_batches=2
)


def placed(spans: object) -> list[tuple[int, float, float]]:
    return [(span.op.id, span.start_s, span.end_s) for span in spans]  # type: ignore[attr-defined]


def first_ops(num_steps: int | None = None) -> list[SimulatedSpan]:
    (spans,) = first_spans([Assignment(plan=PLAN, profile=PROFILE)], NEEDS, num_steps=num_steps)
    return spans


def test_the_first_steps_begin_as_the_whole_job_does() -> None:
    whole = {
        id: times for id, *times in placed(predict(PLAN, NEEDS, PROFILE, keep_spans=True).spans[0])
    }
    first = placed(first_ops(num_steps=1))
    assert first and len(first) < len(whole)
    assert [times for _, *times in first[:40]] == [whole[id] for id, *_ in first[:40]]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_so_many_steps_are_played_to_their_last_commit(num_steps: int) -> None:
    spans = first_ops(num_steps=num_steps)
    commits = [span.op for span in spans if span.op.kind == Kind.COMMIT]
    assert {op.step for op in commits} == set(range(num_steps))
    assert len(commits) == num_steps * len(PLAN.micro_batches)


def test_a_job_shorter_than_that_is_drawn_whole() -> None:
    whole = predict(PLAN, NEEDS, PROFILE, keep_spans=True).spans[0]
    assert placed(first_ops(num_steps=1000)) == placed(whole)
    assert placed(first_ops()) == placed(whole)


def test_without_a_number_no_step_begins_after_so_many_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "DRAWN_OPS", 1)
    spans = first_ops()
    assert {span.op.step for span in spans if span.op.batch is not None} == {0}


def test_requests_take_places_in_the_order_given() -> None:
    """The short one first leaves sooner than after the long ones."""
    needs = [Need(20, 9), Need(20, 9), Need(2, 1)]
    plan = tiny_plan(needs=needs, micro_batch_size=1)
    first = predict(plan, needs, PROFILE, order=[2, 0, 1], keep_spans=True)
    rows = [
        len(span.op.batch.rows[0].tokens) for span in first.spans[0] if span.op.batch is not None
    ]
    assert rows[0] == 2
    assert first.generated_tokens == predict(plan, needs, PROFILE).generated_tokens
