"""`flexpipe run` asks for one job and prints its report."""

from __future__ import annotations

import json
from collections.abc import Callable
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
