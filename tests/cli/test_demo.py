"""`flexpipe demo` runs the same job and tells how often it was right."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flexpipe.cli.demo import MODEL
from flexpipe.demo.tickets import tickets
from flexpipe.job.request import Request, RequestFile
from flexpipe.job.result import Result, ResultWriter
from flexpipe.job.spec import JobSpec
from tests.cli.conftest import REPORT, FakeJob

Flexpipe = Callable[..., int]
NUM = 10


def answer(spec: JobSpec) -> None:
    """Right for all but the first ticket, and in another order."""
    wanted = {ticket.id: ticket.answer for ticket in tickets("held-out", NUM, 0)}
    items = list(RequestFile(spec.input_path, spec.params))
    requests = [item for item in items if isinstance(item, Request)]
    with ResultWriter(spec.output_path) as writer:
        for request in reversed(requests):
            text = "?" if request is requests[0] else wanted[str(request.id)]
            writer.write(
                Result(
                    id=request.id,
                    text=f" {text}",
                    token_ids=[1],
                    finish_reason="stop",
                    prompt_tokens=1,
                )
            )


def test_answers_are_scored_and_shown(
    flexpipe: Flexpipe, job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job.act = answer
    assert flexpipe("demo", "--num", NUM, "--device", "cpu", "--gpu-batch-size", 4) == 0
    assert job.spec.model == str(MODEL)
    assert (job.spec.device, job.spec.given) == ("cpu", {"micro_batch_size": 4})
    out = capsys.readouterr().out
    first, second = tickets("held-out", 2, 0)
    assert f"got    ?\n  wanted {first.answer}" in out
    assert f"got    {second.answer}\n  wanted {second.answer}" in out
    assert "exact match: 9 of 10 (90.0%)" in out and REPORT.render() in out


def test_json_holds_the_score_and_the_report(
    flexpipe: Flexpipe, job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job.act = answer
    assert flexpipe("demo", "--num", NUM, "--json") == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["demo"] == {"num_tickets": 10, "num_right": 9, "exact_match": 0.9}
    assert data["generated_tokens"] == REPORT.generated_tokens
    assert "exact match: 9 of 10" in err


def test_nothing_is_left_behind(flexpipe: Flexpipe, job: FakeJob) -> None:
    job.act = answer
    flexpipe("demo", "--num", NUM)
    assert not job.spec.input_path.parent.exists()
