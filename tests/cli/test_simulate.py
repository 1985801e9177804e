"""`flexpipe simulate` plays the plan that a run would take and draws it in the same form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Flexpipe = Callable[..., int]
Capture = pytest.CaptureFixture[str]
SMALL = ("--num-prompts", 3, "--prompt-len", 12, "--gen-len", 4)
# leaves nothing to search for
GIVEN = (
    *("--percent", 50, 50, 0, 100, 100, 0, "--gpu-batch-size", 8, "--num-gpu-batches", 2),
    *("--overlap", "event"),
)


@pytest.fixture
def simulate(
    flexpipe: Flexpipe, hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> Callable[..., int]:
    """On a tiny model and an emulated accelerator here."""

    def call(*arguments: object) -> int:
        return flexpipe(
            *("simulate", "--model", hf_checkpoint("llama2")),
            *("--offload-dir", tmp_path / "offload", *arguments),
        )

    return call


def told(simulate: Flexpipe, capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert simulate("--json", *arguments) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    data: dict[str, Any] = json.loads(out)
    return data


def test_figures_of_the_whole_job_are_told(simulate: Flexpipe, capsys: Capture) -> None:
    assert simulate("--device", "emulated", *SMALL) == 0
    out = capsys.readouterr().out
    for word in ("load", "prefill", "decode", "total", "latency", "compute", "tokens/s", "gpu"):
        assert word in out
    assert "is the bottleneck" in out and "3 requests, 36 prompt tokens" in out


def test_json_holds_seconds_bytes_and_the_policy(simulate: Flexpipe, capsys: Capture) -> None:
    moving = ("--percent", 0, 50, 0, 100, 0, 100)
    data = told(simulate, capsys, "--device", "emulated", *SMALL, *moving)
    assert data["total_s"] == pytest.approx(data["load_s"] + data["prefill_s"] + data["decode_s"])
    assert data["bound_s"] <= data["run_s"] and data["bottleneck"]
    assert data["link_bytes"]["h2d"] > 0 and data["link_bytes"]["disk_read"] > 0
    assert data["policy"]["weights"]["cpu"] == 0.5
    assert (data["generated_tokens"], data["num_drawn_steps"]) == (12, 0)


def test_the_plan_is_the_one_that_run_takes(
    simulate: Flexpipe, flexpipe: Flexpipe, capsys: Capture, tmp_path: Path, hf_checkpoint: Any
) -> None:
    lines = [json.dumps({"prompt_token_ids": [7] * n, "max_tokens": 3}) for n in (4, 9, 30)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    machine = ("--device", "emulated", "--gpu-mem", "3MiB", "-i", tmp_path / "in.jsonl")
    predicted = told(simulate, capsys, *machine)
    where = ("--offload-dir", tmp_path / "offload", "-o", tmp_path / "out.jsonl", "--json")
    assert flexpipe("run", "--model", hf_checkpoint("llama2"), *machine, *where) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == predicted["policy"]


def test_the_timeline_has_the_form_of_a_runs_trace(
    simulate: Flexpipe, flexpipe: Flexpipe, tmp_path: Path, hf_checkpoint: Any, capsys: Capture
) -> None:
    knobs = ("--percent", 0, 50, 0, 100, 0, 100, "--device", "emulated")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt_token_ids": [7] * 12, "max_tokens": 4}) + "\n" for _ in "abc")
    )
    assert simulate(*SMALL, *knobs, "-o", tmp_path / "plan.json", "--steps", 2) == 0
    assert "plan.json shows the first 2 of 4 steps" in capsys.readouterr().err
    run = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--ignore-eos")
    where = ("--offload-dir", tmp_path / "offload", "--trace", tmp_path / "run.json")
    assert flexpipe("run", "--model", hf_checkpoint("llama2"), *run, *where, *knobs) == 0
    plan, ran = (events(tmp_path / name) for name in ("plan.json", "run.json"))
    computed = [e["name"] for e in ran if e["cat"] == "compute" and e["args"]["step"] < 2]
    assert [e["name"] for e in plan if e["cat"] == "compute"] == computed
    assert set(plan[0]) == set(ran[0])


def events(path: Path) -> list[dict[str, Any]]:
    trace = json.loads(path.read_text())["traceEvents"]
    return [event for event in trace if event["ph"] == "X"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_of_a_machine_on_paper(flexpipe: Flexpipe, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    asked = ("--model", "opt-6.7b", "--hardware", "t4-gcp", "--steps", 1, *GIVEN)
    assert flexpipe("simulate", *asked, "-o", path) == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "opt-175x"], "did you mean opt-175b"),
        (["--hardware", "t5-gcp"], "did you mean t4-gcp"),
        (["--hardware", "t4-gcp", "--emulate", "h2d=1GB/s"], "--hardware and --device exclude"),
        (["-i", "in.jsonl", "--prompt-len", "3"], "--input-file and --prompt-len exclude"),
        (["-i", "absent.jsonl"], "absent.jsonl"),
        (["-o", "plan.pdf"], "plan.pdf must end in .json, .png, .svg"),
        (["--hardware", "t4-gcp", "--gpu-mem", "1MiB"], "the plan does not fit"),
        (["--steps", "0"], "'--steps'"),
        (["--policy", "nowhere"], "no policy preset is called 'nowhere'"),
    ],
)
def test_what_cannot_be_played_is_refused(
    flexpipe: Flexpipe, capsys: Capture, arguments: list[str], named: str
) -> None:
    model = () if "--model" in arguments else ("--model", "opt-6.7b")
    assert flexpipe("simulate", *model, *arguments) in (2, 3, 4)
    out, err = capsys.readouterr()
    assert out == "" and named in err and "Traceback" not in err


def test_help_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys\nfrom flexpipe.cli.main import main\n"
        "try: main(['simulate', '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without running it" in done.stdout
