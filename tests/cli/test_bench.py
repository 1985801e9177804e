"""`flexpipe bench` runs the one job several times and tells every figure of it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexpipe.job.bench import FIGURES, Workload, measure
from flexpipe.job.report import Report
from flexpipe.job.result import Result, ResultWriter
from flexpipe.job.spec import JobSpec
from tests.cli.conftest import REPORT

Flexpipe = Callable[..., int]
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
    "eos_token_id": [2, 7],
}
SPECIAL = {1, 2, 7, 9}
SMALL = {"num_prompts": 2, "prompt_len": 12, "gen_len": 5}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A shape without weights, whose tokenizer names one more special token."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    added = [{"id": 9, "special": True}, {"id": 10, "special": False}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return folder


@pytest.fixture
def bench(flexpipe: Flexpipe, model: Path, tmp_path: Path) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        return flexpipe(
            *("bench", "--model", model / "config.json", "--load-format", "dummy"),
            *("--offload-dir", tmp_path / "offload", "--device", "cpu"),
            *("--prompt-len", 12, "--gen-len", 5, "--num-prompts", 3, *arguments),
        )

    return call


Bench = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def told(bench: Bench, capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert bench("--json", *arguments) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    data: dict[str, Any] = json.loads(out)
    return data


def test_json_holds_every_repetition_its_median_and_its_spread(
    bench: Bench, capsys: Capture
) -> None:
    data = told(bench, capsys, "--repetitions", 3)
    assert (data["num_prompts"], data["prompt_len"], data["gen_len"]) == (3, 12, 5)
    assert data["ignore_eos"] is True and data["warmup"] == 1
    assert len(data["repetitions"]) == 3
    for name in set(FIGURES) - {"peak_gpu_bytes", "peak_disk_bytes"}:
        low, middle, high = sorted(run[name] for run in data["repetitions"])
        assert low > 0 and data["median"][name] == middle
        assert data["spread"][name] == pytest.approx(high - low)
    assert data["median"]["peak_gpu_bytes"] is None  # a CPU has no gpu tier
    times = data["repetitions"][0]
    generated = times["generated_tokens_per_s"] * (times["prefill_s"] + times["decode_s"])
    assert generated == pytest.approx(3 * 5), "an end token ended an answer"


def test_markdown_is_the_default_and_says_that_eos_is_ignored(
    bench: Bench, capsys: Capture
) -> None:
    assert bench("--repetitions", 2) == 0
    out, err = capsys.readouterr()
    assert "3 prompts of 12 random tokens (seed 0), 5 tokens generated for each, EOS ignored" in out
    runs, beside = tables(out)
    assert [row.split()[1] for row in runs[2:]] == ["1", "2", "median", "spread"]
    assert beside[0].split() == ["|", "figure", "|", "predicted", "|", "median", "|", "error", "|"]
    assert len({len(row) for row in runs}) == len({len(row) for row in beside}) == 1
    assert "sha256 `" in out and "--gpu-batch-size" in out
    assert "bench: warm-up 1 of 1" in err and "bench: repetition 2 of 2" in err
    assert "bench:" not in out


def tables(text: str) -> list[list[str]]:
    """The rows of each Markdown table."""
    blocks = (block.splitlines() for block in text.split("\n\n"))
    return [block for block in blocks if block[0].startswith("| ")]


def test_the_prediction_stands_beside_the_median(bench: Bench, capsys: Capture) -> None:
    data = told(bench, capsys, "--repetitions", 3)
    figures = {figure["name"]: figure for figure in data["prediction"]["figures"]}
    for name in ("load_s", "prefill_s", "decode_s", "total_s", "latency_s", "peak_cpu_bytes"):
        assert figures[name]["measured"] == data["median"][name]
        assert figures[name]["error"] == pytest.approx(
            figures[name]["predicted"] / data["median"][name] - 1
        )
    assert data["prediction"]["generated_tokens_per_s"] > 0


def test_csv_has_a_line_per_repetition(bench: Bench, capsys: Capture) -> None:
    assert bench("--repetitions", 2, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["repetition"] for row in rows] == ["1", "2", "median", "spread"]
    assert {row["gen_len"] for row in rows} == {"5"} and set(FIGURES) < set(rows[0])
    assert all(float(row["decode_tokens_per_s"]) > 0 for row in rows)


def test_placement_and_batch_shape_do_not_show_in_the_hash(bench: Bench, capsys: Capture) -> None:
    once = ("--warmup", 0, "--repetitions", 1)
    resident = told(bench, capsys, *once)
    disk = ("--percent", 0, 0, 0, 0, 0, 0, "--gpu-batch-size", 2, "--device", "emulated")
    moved = told(bench, capsys, *once, *disk)
    assert moved["median"]["peak_disk_bytes"] > 0 and moved["policy"]["micro_batch_size"] == 2
    assert moved["output_sha256"] == resident["output_sha256"]
    assert told(bench, capsys, *once, "--seed", 1)["output_sha256"] != resident["output_sha256"]


def test_one_generated_token_leaves_no_decode_rate(bench: Bench, capsys: Capture) -> None:
    data = told(bench, capsys, "--gen-len", 1, "--warmup", 0, "--repetitions", 1)
    assert data["median"]["decode_tokens_per_s"] is None


def test_trace_shows_the_last_repetition(bench: Bench, tmp_path: Path) -> None:
    assert bench("--repetitions", 1, "--trace", tmp_path / "trace.json") == 0
    assert json.loads((tmp_path / "trace.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt-len", "125"], "--prompt-len 125 and --gen-len 5 make 130, more than"),
        (["--num-prompts", "0"], "'--num-prompts'"),
        (["--repetitions", "0"], "'--repetitions'"),
        (["--json", "--format", "csv"], "--json asks for JSON and --format for csv"),
        (["--emulate", "h2d=1GB/s"], "--device is cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench: Bench, capsys: Capture, arguments: list[str], named: str
) -> None:
    assert bench(*arguments) == 2
    assert named in capsys.readouterr().err


def test_without_a_number_of_prompts_there_is_one_block(
    flexpipe: Flexpipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Workload] = []

    def keep(spec: JobSpec, workload: Workload) -> Any:
        asked.append(workload)
        raise KeyboardInterrupt

    monkeypatch.setattr("flexpipe.cli.bench.measure", keep)
    flexpipe("bench", "--model", "m", "--gpu-batch-size", 4, "--num-gpu-batches", 6)
    flexpipe("bench", "--model", "m")
    assert [workload.num_prompts for workload in asked] == [24, 32]
    assert (asked[0].prompt_len, asked[0].gen_len) == (512, 32)
    assert (asked[0].warmup, asked[0].repetitions) == (1, 3)


def spec(model: Path, tmp_path: Path, **changes: Any) -> JobSpec:
    values: Mapping[str, Any] = {
        "model": str(model),
        "input_path": tmp_path / "in.jsonl",
        "output_path": tmp_path / "out.jsonl",
        "load_format": "dummy",
        "offload_dir": tmp_path / "offload",
    }
    return JobSpec(**{**values, **changes})


def answering(
    monkeypatch: pytest.MonkeyPatch, tokens: Callable[[int], int], report: Report = REPORT
) -> list[JobSpec]:
    """Put a job in place whose run `n`, from 0, answers every prompt with the token `tokens(n)`."""
    specs: list[JobSpec] = []

    def run_job(spec: JobSpec) -> Report:
        answer = [tokens(len(specs))]
        specs.append(spec)
        with ResultWriter(spec.output_path, overwrite=True) as writer:
            for line in reversed(spec.input_path.read_text().splitlines()):
                id = json.loads(line)["id"]
                writer.write(
                    Result(
                        id=id, text="", token_ids=answer, finish_reason="length", prompt_tokens=1
                    )
                )
        return report

    monkeypatch.setattr("flexpipe.job.run.run_job", run_job)
    return specs


def test_prompts_are_drawn_by_the_seed_and_hold_no_special_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda run: 1)
    drawn = []
    for seed in (0, 0, 1):
        asked = spec(model, tmp_path, seed=seed)
        measure(asked, Workload(num_prompts=20, prompt_len=100, gen_len=5, repetitions=1))
        lines = map(json.loads, asked.input_path.read_text().splitlines())
        drawn.append([line["prompt_token_ids"] for line in lines])
    assert drawn[0] == drawn[1] != drawn[2]
    assert {len(prompt) for prompt in drawn[0]} == {100} and len(drawn[0]) == 20
    assert {token for prompt in drawn[0] for token in prompt} == set(range(64)) - SPECIAL


def test_only_repetitions_count_and_only_the_last_is_traced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = answering(monkeypatch, lambda run: 1)
    asked = spec(model, tmp_path, trace_path=tmp_path / "t.json")
    report = measure(asked, Workload(**SMALL, warmup=2, repetitions=3))
    assert len(report.repetitions) == 3 and len(specs) == 5
    assert report.to_dict()["compute_dtype"] == "float32"
    assert [bool(spec.trace_path) for spec in specs] == [False] * 4 + [True]
    assert all(spec.ignore_eos and spec.max_tokens == 5 and spec.overwrite for spec in specs)


def test_runs_that_generate_other_tokens_are_an_error_and_no_figure(
    bench: Bench, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda run: 1 + (run == 2))
    assert bench() == 5
    out, err = capsys.readouterr()
    assert out == "" and "repetition 2 of 3 generated other tokens than warm-up 1 of 1" in err


def test_failed_requests_are_an_error(
    bench: Bench, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda run: 1, replace(REPORT, num_failed=1))
    assert bench() == 5
    assert "1 of 2 requests failed" in capsys.readouterr().err


def test_repetitions_of_different_policies_are_noted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = iter(replace(REPORT, policy={"micro_batch_size": size}) for size in (4, 4, 5))
    answering(monkeypatch, lambda run: 1)
    run_job = sys.modules["flexpipe.job.run"].run_job

    def with_policy(spec: JobSpec) -> Report:
        run_job(spec)
        return next(reports)

    monkeypatch.setattr("flexpipe.job.run.run_job", with_policy)
    report = measure(spec(model, tmp_path), Workload(**SMALL, repetitions=2))
    assert any("different policies" in note for note in report.notes)


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\nfrom flexpipe.cli.main import main\n"
        "try: main(['bench', '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "EOS" in done.stdout
