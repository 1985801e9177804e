"""The doctor's findings on stdout, and an exit code that a script can ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Flexpipe = Callable[..., int]


def test_a_healthy_machine_is_exit_code_0_with_a_line_per_finding(
    flexpipe: Flexpipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flexpipe("doctor", "--device", "cpu", "--offload-dir", tmp_path / "offload") == 0
    out = capsys.readouterr().out
    for about in ("torch", "device", "cpu", "memory", "offload", "profile", "hub"):
        assert f" {about} " in out
    assert "no problem, " in out.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_exit_code_1_also_in_json(
    flexpipe: Flexpipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("doctor", "--json", "--device", "cuda:99", "--offload-dir", tmp_path)
    assert flexpipe(*words) == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    told = json.loads(out)
    (broken,) = [item for item in told["findings"] if item["level"] == "problem"]
    assert told["num_problems"] == 1 and broken["about"] == "device" and broken["advice"]
