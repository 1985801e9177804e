"""`flexpipe plan` and `simulate` of a pipeline: stage by stage, from options or a policy file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexpipe.plan.policy_file import PolicyFile

Flexpipe = Callable[..., int]
Capture = pytest.CaptureFixture[str]
JOB = ("--num-prompts", 8, "--prompt-len", 12, "--gen-len", 4)
BLOCK = ("--gpu-batch-size", 2, "--num-gpu-batches", 1)


@pytest.fixture
def ask(flexpipe: Flexpipe, hf_checkpoint: Callable[..., Path], tmp_path: Path) -> Flexpipe:
    """A command about a tiny model on small emulated accelerators."""
    model = hf_checkpoint("llama2")
    where = ("--offload-dir", tmp_path / "offload", "--device", "emulated", "--gpu-mem", "3MiB")

    def call(command: str, *arguments: object) -> int:
        return flexpipe(command, "--model", model, *where, *JOB, *BLOCK, *arguments)

    return call


def told(capsys: Capture) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_the_stages_found_are_told_and_a_file_brings_them_back(
    ask: Flexpipe, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    assert ask("plan", "--pipeline-parallel-size", 2, "-o", path, "--json") == 0
    found = told(capsys)
    assert [stage["stage"] for stage in found["stages"]] == [0, 1]
    assert all(0 <= stage["bubble"] < 1 for stage in found["stages"])
    assert len(PolicyFile.read(path).stages) == 2
    assert ask("simulate", "--policy", path, "--json") == 0
    played = told(capsys)
    for name in ("layers", "policy"):
        assert [s[name] for s in played["stages"]] == [s[name] for s in found["stages"]]
    assert played["run_s"] == pytest.approx(
        found["prediction"]["prefill_s"] + found["prediction"]["decode_s"]
    )


def test_people_see_a_row_per_stage_and_a_trace_a_process_per_stage(
    ask: Flexpipe, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    assert ask("simulate", "--pipeline-parallel-size", 2, "-o", path) == 0
    out = capsys.readouterr().out
    assert "stage  layers" in out and "bubble" in out
    events = json.loads(path.read_text())["traceEvents"]
    named = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert named == {"stage 0", "stage 1"}
    assert {"send", "receive"} <= {
        event["args"]["name"] for event in events if event["name"] == "thread_name"
    }


def test_what_several_machines_would_come_to_is_told_beside_one(
    ask: Flexpipe, capsys: Capture
) -> None:
    assert ask("plan", "--json") == 0
    by_count = told(capsys)["stages"]
    assert set(by_count) == {"1", "2"}  # it has no more layers
    assert all(one["generated_tokens_per_s"] > 0 for one in by_count.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pipeline-parallel-size", 9), "cannot be cut into 9 stages"),
        (("--pipeline-parallel-size", 2, "--layers-per-stage", "1,9"), "adds up to 10"),
        (("--layers-per-stage", "1;1"), "write it like 10,14,8"),
    ],
)
def test_a_cut_that_is_none_is_refused_in_one_line(
    ask: Flexpipe, capsys: Capture, options: tuple[object, ...], said: str
) -> None:
    assert ask("plan", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err.splitlines()[-1] and "Traceback" not in err


def test_a_command_that_knows_no_stages_refuses_a_file_of_them(
    ask: Flexpipe, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("stages: [{layers: 1}, {layers: 1}]\n")
    assert ask("bench", "--policy", path) == 2
    assert "a pipeline of 2 stages" in capsys.readouterr().err
