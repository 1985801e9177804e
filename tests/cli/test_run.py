"""`flexpipe run` asks for one job and prints its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flexpipe.job.spec import JobSpec
from tests.cli.conftest import REPORT, FakeJob

Flexpipe = Callable[..., int]


def test_options_become_the_spec(flexpipe: Flexpipe, job: FakeJob) -> None:
    code = flexpipe(
        *("run", "--model", "org/name", "--revision", "v2", "-i", "a.jsonl", "-o", "b.jsonl"),
        *("--max-tokens", 9, "--temperature", 0, "--device", "cuda:1", "--load-format", "dummy"),
        *("--seed", 3, "--offload-dir", "scratch", "--trace", "t.svg", "--overwrite"),
    )
    assert code == 0
    assert job.spec == JobSpec(
        model="org/name",
        revision="v2",
        input_path=Path("a.jsonl"),
        output_path=Path("b.jsonl"),
        max_tokens=9,
        device="cuda:1",
        load_format="dummy",
        seed=3,
        offload_dir=Path("scratch"),
        trace_path=Path("t.svg"),
        overwrite=True,
    )


def test_defaults_are_those_of_the_spec(flexpipe: Flexpipe, job: FakeJob) -> None:
    flexpipe("run", "--model", "m", "-i", "in", "-o", "out")
    assert job.spec == JobSpec(model="m", input_path=Path("in"), output_path=Path("out"))


def test_report_goes_to_stderr_and_stdout_stays_clean(
    flexpipe: Flexpipe, job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    flexpipe("run", "--model", "m", "-i", "in", "-o", "out")
    out, err = capsys.readouterr()
    assert out == "" and REPORT.render() in err


def test_json_is_one_line_last_on_stdout(
    flexpipe: Flexpipe, job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    flexpipe("run", "--model", "m", "-i", "in", "-o", "out", "--json")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out) == json.loads(json.dumps(REPORT.to_dict()))


@pytest.mark.parametrize(("most_restarts", "code"), [("0", 6), ("2", 0)])
def test_a_complete_job_with_failed_requests_ends_with_6_unless_that_would_start_it_again(
    flexpipe: Flexpipe,
    job: FakeJob,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    most_restarts: str,
    code: int,
) -> None:
    job.report = replace(REPORT, num_finished=1, num_failed=1)
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29401"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_MAX_RESTARTS": most_restarts}
    variables["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # so that what the command sets goes again
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = ("run", "--model", "m", "-i", "in", "-o", "out", "--pipeline-parallel-size", 2)
    assert flexpipe(*asked) == code
    assert "1 failed" in capsys.readouterr().err
