"""A sweep from the command line: real benches, a kill in the middle, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from flexpipe.errors import PlanError
from flexpipe.job.bench import Workload
from flexpipe.job.spec import JobSpec
from flexpipe.sweep.child import Ended
from tests.waiting import eventually

Flexpipe = Callable[..., int]
Capture = pytest.CaptureFixture[str]
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SLOW = ("--emulate", "compute=2MFLOP/s", "--gpu-batch-size", "1")  # 100 tokens take seconds


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A sweep of a tiny model, as words; its points are still to be given."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPE))
    return [
        *("sweep", "--model", str(config), "--load-format", "dummy"),
        *("--offload-dir", str(tmp_path / "offload"), "--device", "emulated"),
        *("--prompt-len", "12", "--gen-len", "4", "--warmup", "0", "--repetitions", "1"),
    ]


@pytest.fixture
def sweep(flexpipe: Flexpipe, command: list[str], tmp_path: Path) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        return flexpipe(*command, "-o", tmp_path / "rows.jsonl", *arguments)

    return call


Sweep = Callable[..., int]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_points_are_measured_the_policy_is_read_back_and_a_failure_is_a_row(
    sweep: Sweep, tmp_path: Path, capsys: Capture
) -> None:
    varied = ("--vary", "weights.gpu=0.5", "--vary", "gpu-batch-size=2", "--vary", "gen_len=4,200")
    assert sweep(*varied) == 0
    out, err = capsys.readouterr()
    done, failed = lines(tmp_path / "rows.jsonl")
    measured = done["measured"]
    assert measured["policy"]["weights"] == {"gpu": 0.5, "cpu": 0.5, "disk": 0.0}
    assert (measured["device"], measured["compute_dtype"]) == ("emulated", "float32")
    assert (measured["num_prompts"], measured["gen_len"]) == (2, 4)
    assert failed["measured"] is None and "more than the model's 128" in failed["measure_error"]
    assert "| 1 | " in out and f"gen_len=200: {failed['measure_error']}" in out
    assert "sweep: point 1 of 2: weights.gpu=0.5 micro_batch_size=2 gen_len=4" in err
    assert sweep(*varied) == 0
    again, err = capsys.readouterr()
    assert again == out and "nothing to do for 2 of 2 points" in err


def test_kill_9_loses_the_running_point_alone_and_ends_it(
    sweep: Sweep, command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    rows = tmp_path / "rows.jsonl"
    slow = [*SLOW, "--vary", "gen_len=1,100"]
    running = subprocess.Popen(
        [sys.executable, "-m", "flexpipe", *command, "-o", str(rows), *slow],
        stderr=subprocess.DEVNULL,
    )
    child = None
    try:
        assert eventually(lambda: rows.is_file() and rows.stat().st_size > 0)
        assert eventually(lambda: bool(psutil.Process(running.pid).children()))
        (child,) = psutil.Process(running.pid).children()
    finally:
        running.kill()
        running.wait()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    assert [line["settings"] for line in lines(rows)] == [{"gen_len": 1}]
    capsys.readouterr()
    assert sweep(*slow, "--dry-run") == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == ["   1  gen_len=1: finished", "   2  gen_len=100: to measure"]


def test_ctrl_c_is_one_line_with_the_command_that_goes_on(
    command: list[str], tmp_path: Path
) -> None:
    slow = [*SLOW, "--vary", "gen_len=100,101"]
    words = [*command, "-o", str(tmp_path / "rows.jsonl"), *slow]
    running = subprocess.Popen(
        [sys.executable, "-m", "flexpipe", *words], stderr=subprocess.PIPE, text=True
    )
    assert eventually(lambda: bool(psutil.Process(running.pid).children()))
    (child,) = psutil.Process(running.pid).children()
    os.kill(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and not child.is_running()
    last = err.splitlines()[-1]
    assert last.startswith(
        "flexpipe: interrupted; what is done is kept, go on with: flexpipe sweep"
    )
    assert "Traceback" not in err


# -- with benches and predictions that only pretend ------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Benches that end at once; the points they were given."""
    asked: list[Any] = []

    def run(words: list[str], *, stdin: str, timeout_s: float | None) -> Ended:
        asked.append(json.loads(stdin))
        rate = float(asked[-1]["micro_batch_size"])
        figures = {"generated_tokens_per_s": rate, "total_s": 1.0}
        told = {"median": figures, "spread": figures, "timeout_s": timeout_s, "words": words}
        return Ended(exit_code=0, stdout=json.dumps(told), stderr="")

    monkeypatch.setattr("flexpipe.sweep.run.run_flexpipe", run)
    return asked


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands where `flexpipe.sweep.forecast` would; more than 4 rows do not fit."""

    def forecast(knobs: Mapping[str, Any], workload: Workload) -> Mapping[str, Any]:
        if knobs["micro_batch_size"] > 4:
            raise PlanError("the plan does not fit")
        rate = 2.0 * workload.num_prompts
        return {"generated_tokens_per_s": rate, "latency_s": 1.0, "total_s": 1.0, "policy": None}

    def forecaster(spec: JobSpec) -> Callable[..., Mapping[str, Any]]:
        return forecast

    module = ModuleType("flexpipe.sweep.forecast")
    module.forecaster = forecaster  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flexpipe.sweep.forecast", module)


@pytest.mark.usefixtures("predictor")
def test_predict_runs_nothing_and_needs_no_file(
    flexpipe: Flexpipe, command: list[str], pretended: list[Any], capsys: Capture
) -> None:
    vary = ("--vary", "micro_batch_size=2,4,8", "--predict", "--format", "json")
    assert flexpipe(*command, *vary) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["settings"]["micro_batch_size"] for row in rows] == [4, 2, 8]
    assert rows[0]["predicted"]["generated_tokens_per_s"] == 8
    assert rows[2]["reason"] == "the plan does not fit"
    assert pretended == []


@pytest.mark.usefixtures("predictor")
def test_predict_and_measure_do_both(sweep: Sweep, pretended: list[Any], capsys: Capture) -> None:
    assert sweep("--vary", "micro_batch_size=2,4", "--predict", "--measure") == 0
    assert len(pretended) == 2
    assert "+100.0%" in capsys.readouterr().out


def test_options_fix_what_is_not_varied(
    sweep: Sweep, pretended: list[Any], tmp_path: Path, capsys: Capture
) -> None:
    policy = tmp_path / "mine.yaml"
    policy.write_text("strategy: none\nprefetch_depth: 3\nmicro_batch_size: 7\n")
    fixed = ("--policy", policy, "--overlap", "multi", "--num-gpu-batches", 2)
    assert sweep(*fixed, "--vary", "micro_batch_size=2,4", "--timeout", 90) == 0
    assert pretended == [
        {
            "strategy": "multi",
            "prefetch_depth": 3,
            "micro_batch_size": rows,
            "num_micro_batches": 2,
        }
        for rows in (2, 4)
    ]
    assert [line["measured"]["timeout_s"] for line in lines(tmp_path / "rows.jsonl")] == [90, 90]


def test_what_is_varied_goes_before_the_file(
    sweep: Sweep, pretended: list[Any], tmp_path: Path
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("micro_batch_size: [2, 4]\npoints: [{micro_batch_size: 1}]\n")
    assert sweep("--grid", grid, "--vary", "micro_batch_size=3") == 0
    assert [knobs["micro_batch_size"] for knobs in pretended] == [3, 1]


def test_the_plot_is_drawn_beside_the_table(
    sweep: Sweep, pretended: list[Any], tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib")
    assert sweep("--vary", "micro_batch_size=2,4", "--plot", tmp_path / "p.svg") == 0
    assert (tmp_path / "p.svg").stat().st_size > 1000
    assert capsys.readouterr().out.startswith("| ")


def test_a_dry_run_lists_the_points_and_writes_nothing(
    sweep: Sweep, pretended: list[Any], tmp_path: Path, capsys: Capture
) -> None:
    assert sweep("--vary", "weights.gpu=0.5,1", "--vary", "weights.cpu=0.75", "--dry-run") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "   1  weights.gpu=0.5 weights.cpu=0.75: cannot be: weights.gpu=0.5 and"
    )
    assert "add up to 1.75" in second
    assert pretended == [] and not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "nothing is varied"),
        (["--vary", "micro_batch_sizes=4"], "did you mean micro_batch_size?"),
        (["--vary", "gen_len=4:1"], "gen_len: '4:1' must rise"),
        (["--vary", "gen_len=1", "--grid", "no/grid.yaml"], "cannot read the grid no/grid.yaml"),
        (["--vary", "gen_len=1", "--plot", "p.gif"], "--plot p.gif must end in .svg or .png"),
        (["--vary", "gen_len=1", "--plot", "no/p.svg"], "there is no directory"),
        (["--vary", "gen_len=1", "--timeout", "0"], "'--timeout'"),
        (["--vary", "gen_len=1", "--device", "tpu"], "--device 'tpu' is unknown"),
        (["--vary", "gen_len=1", "--gpu-mem", "lots"], "'--gpu-mem': cannot read 'lots'"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_one_line_and_no_file(
    sweep: Sweep,
    pretended: list[Any],
    tmp_path: Path,
    capsys: Capture,
    arguments: list[str],
    named: str,
) -> None:
    assert sweep(*arguments) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("error") == 1
    assert pretended == [] and not (tmp_path / "rows.jsonl").exists()


def test_measuring_without_a_file_is_refused(
    flexpipe: Flexpipe, command: list[str], capsys: Capture
) -> None:
    assert flexpipe(*command, "--vary", "gen_len=1") == 2
    assert "give -o FILE.jsonl" in capsys.readouterr().err


def test_a_missing_matplotlib_is_told_before_anything_runs(
    sweep: Sweep,
    pretended: list[Any],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert sweep("--vary", "gen_len=1", "--plot", tmp_path / "p.svg") == 2
    assert "pip install 'flexpipe[plot]'" in capsys.readouterr().err
    assert pretended == []


def test_nothing_feasible_is_an_error_with_the_reason(
    sweep: Sweep, pretended: list[Any], tmp_path: Path, capsys: Capture
) -> None:
    assert sweep("--vary", "weights.gpu=0.5,1", "--vary", "weights.cpu=0.75") == 5
    out, err = capsys.readouterr()
    assert out == "" and "none of the sweep's 2 points could run" in err
    assert "add up to 1.25, more than 1" in err
    assert len(lines(tmp_path / "rows.jsonl")) == 2
