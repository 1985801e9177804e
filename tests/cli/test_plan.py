"""`flexpipe plan` finds the policy that a run takes; what it cannot plan it refuses in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexpipe.plan.policy import Policy
from flexpipe.plan.policy_file import PolicyFile

Flexpipe = Callable[..., int]
Capture = pytest.CaptureFixture[str]
SMALL = ("--num-prompts", 3, "--prompt-len", 12, "--gen-len", 4)
PAPER = ("--model", "opt-6.7b", "--hardware", "t4-gcp")


@pytest.fixture
def tiny(hf_checkpoint: Callable[..., Path]) -> Path:
    return hf_checkpoint("llama2")


@pytest.fixture
def plan(flexpipe: Flexpipe, tiny: Path, tmp_path: Path) -> Flexpipe:
    """For a tiny model on a small emulated accelerator here."""

    def call(*arguments: object) -> int:
        where = ("--offload-dir", tmp_path / "offload", "--device", "emulated")
        return flexpipe("plan", "--model", tiny, *where, "--gpu-mem", "3MiB", *arguments)

    return call


def refusal(capsys: Capture) -> str:
    """The one line on stderr beside what is told of the machine; stdout is empty."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    assert err.splitlines()[-1] == lines[0]
    return lines[0]


def test_the_file_reads_back_to_the_policy_that_was_told(
    plan: Flexpipe, capsys: Capture, tmp_path: Path, tiny: Path
) -> None:
    path = tmp_path / "new" / "policy.yaml"
    assert plan(*SMALL, "-o", path, "--json") == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and f"{path} holds the policy" in err
    told = json.loads(out)
    read = PolicyFile.read(path)
    assert Policy(**read.knobs).to_dict() == told["policy"]
    assert read.made_for is not None and read.made_for.model == str(tiny)
    assert plan(*SMALL, "--policy", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["policy"] == told["policy"]


def test_run_and_simulate_take_the_plan_that_is_found(
    plan: Flexpipe, flexpipe: Flexpipe, capsys: Capture, tmp_path: Path, tiny: Path
) -> None:
    requests = [{"prompt_token_ids": [7] * n, "max_tokens": 3} for n in (4, 9, 30)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    assert plan("-i", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    machine = ("--model", tiny, "--device", "emulated", "--gpu-mem", "3MiB", "-i", path)
    where = ("--offload-dir", tmp_path / "offload", "--json")
    assert flexpipe("run", *machine, *where, "-o", tmp_path / "out.jsonl") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["policy"] == found["policy"]
    figures = {one["name"]: one for one in report["prediction"]["figures"]}
    assert figures["total_s"]["predicted"] > 0 and figures["total_s"]["measured"] > 0
    assert "predicted" in err and "measured" in err
    assert flexpipe("simulate", *machine, *where) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == found["policy"]


def test_a_run_on_the_cpu_without_knobs_takes_the_plan_found_too(
    flexpipe: Flexpipe, capsys: Capture, tmp_path: Path, tiny: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt_token_ids": [7] * 9, "max_tokens": 3}) + "\n")
    machine = ("--model", tiny, "--device", "cpu", "-i", path, "--json")
    where = ("--offload-dir", tmp_path / "offload")
    assert flexpipe("plan", *machine, *where) == 0
    found = json.loads(capsys.readouterr().out)
    assert flexpipe("run", *machine, *where, "-o", tmp_path / "out.jsonl") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["policy"] == found["policy"] and report["prediction"]["figures"]
    assert report["policy"]["weights"]["cpu"] == 1


def test_the_table_is_for_people(plan: Flexpipe, capsys: Capture) -> None:
    assert plan(*SMALL) == 0
    out = capsys.readouterr().out
    for word in ("tier", "budget", "predicted:", "bottleneck:", "instead", "choices estimated"):
        assert word in out


def test_flags_fix_single_knobs(plan: Flexpipe, capsys: Capture) -> None:
    asked = ("--gpu-batch-size", 2, "--overlap", "multi", "--percent", 0, 100, 0, 100, 0, 100)
    assert plan(*SMALL, *asked, "--json") == 0
    policy = json.loads(capsys.readouterr().out)["policy"]
    assert (policy["micro_batch_size"], policy["strategy"]) == (2, "multi")
    assert policy["weights"]["cpu"] == policy["hidden"]["cpu"] == 1


def test_compression_is_used_only_where_it_is_allowed(plan: Flexpipe, capsys: Capture) -> None:
    slow = ("--emulate", "h2d=20MB/s,d2h=20MB/s", "--gpu-mem", "900KiB")
    told = {}
    for allowed in ("--no-compression", "--compression"):
        assert plan(*SMALL, *slow, allowed, "--json") == 0
        told[allowed] = json.loads(capsys.readouterr().out)
    knobs = ("compress_weight", "compress_vocabulary", "compress_cache")
    assert {told["--no-compression"]["policy"][name] for name in knobs} == {"none"}
    assert {told["--compression"]["policy"][name] for name in knobs} != {"none"}
    assert max(told["--no-compression"]["gain_of_compression"].values()) > 1


def test_limits_that_no_plan_keeps_exit_with_4_and_leave_no_file(
    plan: Flexpipe, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    assert plan(*SMALL, "--max-latency", "0.000001", "-o", path) == 4
    assert "no plan that fits keeps the limits" in refusal(capsys)
    assert not path.exists()


def test_a_limit_on_writes_is_kept(flexpipe: Flexpipe, capsys: Capture) -> None:
    kv_on_disk = ("--num-prompts", 8, "--prompt-len", 64, "--gen-len", 4, "--cpu-mem", "16GiB")
    assert flexpipe("plan", *PAPER, *kv_on_disk, "--max-disk-writes", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["disk_bytes_per_1000_tokens"] == 0


# does it fit


def test_whether_it_fits_is_told_without_measuring(
    plan: Flexpipe, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(tmp_path / "missing.yaml"))
    assert plan(*SMALL, "--fit-only", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["ways"]["on gpu"]["least_stages"] == 1
    assert list(told["ways"]) == ["on gpu", "on gpu and cpu", "on gpu and cpu and disk"]
    for way in told["ways"].values():
        assert all(way["bytes"][tier] <= told["budgets"][tier] for tier in way["bytes"])
    assert plan(*SMALL, "--fit-only") == 0
    assert "least pipeline stages" in capsys.readouterr().out


def test_what_fits_nowhere_exits_with_4_and_tells_the_stages(
    flexpipe: Flexpipe, capsys: Capture
) -> None:
    asked = ("--num-prompts", 1, "--prompt-len", 8, "--gen-len", 1, "--fit-only", "--json")
    little = ("--model", "opt-30b", "--hardware", "t4-gcp", "--gpu-mem", "64MiB")
    assert flexpipe("plan", *little, *asked) == 4
    told = json.loads(capsys.readouterr().out)
    assert not told["fits"] and told["ways"]["on gpu"]["policy"] is None
    assert flexpipe("plan", "--model", "opt-30b", "--hardware", "t4-gcp", *asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert not told["ways"]["on gpu"]["fits"] and told["ways"]["on gpu and cpu"]["fits"]
    assert told["ways"]["on gpu"]["least_stages"] == 5  # 60 GB over 13.3 GiB each


def test_what_one_machine_cannot_hold_is_refused_with_the_least_number_that_can(
    flexpipe: Flexpipe, capsys: Capture
) -> None:
    asked: tuple[object, ...] = ("--model", "opt-30b", "--hardware", "t4-gcp")
    asked += ("--num-prompts", 4, "--prompt-len", 8, "--gen-len", 2)
    asked += ("--percent", 100, 0, 100, 0, 100, 0)
    assert flexpipe("plan", *asked) == 4
    line = refusal(capsys)
    least = int(line.partition("--pipeline-parallel-size ")[2].partition(".")[0])
    assert flexpipe("plan", *asked, "--pipeline-parallel-size", least, "--json") == 0
    assert json.loads(capsys.readouterr().out)["least_stages"] == least
    assert flexpipe("plan", *asked, "--pipeline-parallel-size", least - 1) == 4


# bad input


@pytest.fixture
def profile(tmp_path: Path, repo: Path) -> Callable[..., Path]:
    """The tests' profile with some keys changed."""

    def write(**changes: Any) -> Path:
        content = yaml.safe_load((repo / "tests" / "profile.yaml").read_text()) | changes
        path = tmp_path / "machine.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"memry": {}}, "unknown key memry; did you mean memory?"),
        ({"memory": {"gqu": "1GiB"}}, "unknown key memory.gqu; did you mean gpu?"),
        ({"memory": {"cpu": "3 GB/s"}}, "memory.cpu: cannot read '3 GB/s' as a size"),
        ({"memory": {"cpu": -5}}, "memory.cpu: a size cannot be negative"),
        ({"links": {"disk_read": "4GiB"}}, "links needs disk_write"),
        ({"links": {"disk_read": "fast", "disk_write": "1GB/s"}}, "links.disk_read: cannot read"),
        ({"compute": {}}, "a hardware description needs compute"),
        ({"slowdown": {"compute": {"copy": 0.5}}}, "slowdown.compute.copy is a factor from 1"),
    ],
)
def test_a_wrong_hardware_file_is_refused_with_its_name_and_the_key(
    flexpipe: Flexpipe,
    capsys: Capture,
    profile: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
    named: str,
) -> None:
    path, target = profile(**changes), tmp_path / "policy.yaml"
    for command in ("plan", "simulate"):
        out = tmp_path / "plan.json" if command == "simulate" else target
        asked = ("--model", "opt-6.7b", "--hardware", path, "-o", out)
        assert flexpipe(command, *asked) == 2
        line = refusal(capsys)
        assert named in line and str(path) in line
        assert not out.exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("micro_batch_sise: 4", "did you mean micro_batch_size"),
        ("weights: {gpu: 0.5, cpu: 0.6}", "shares must add up to 1, got 1.1"),
        ("gpu_mem: 4 GB/s", "cannot read '4 GB/s' as a size"),
        ("cpu_mem: -4", "a size cannot be negative, got -4"),
        ("micro_batch_size: -2", "must be a whole number from 1, got -2"),
        ("a: b: c", "is not a YAML file"),
        (
            "made_for: {model: opt-30b, num_layers: 48, hidden_size: 7168}",
            "made for opt-30b (48 layers of 7168)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate", "run", "sweep"])
def test_a_wrong_policy_file_is_refused_by_every_command(
    flexpipe: Flexpipe,
    capsys: Capture,
    tiny: Path,
    tmp_path: Path,
    command: str,
    text: str,
    named: str,
) -> None:
    path, target = tmp_path / "mine.yaml", tmp_path / "made.json"
    path.write_text(text)
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [7]}\n')
    asked: tuple[object, ...] = ("--model", tiny, "--policy", path, "--device", "emulated")
    asked += ("--offload-dir", tmp_path / "offload")
    if command == "run":
        asked += ("-i", tmp_path / "in.jsonl")
    if command == "sweep":
        asked += ("--predict", "--vary", "prefetch_depth=1,2")
    # a point of a sweep that cannot be is a row, and a sweep of such rows alone has no result
    assert flexpipe(command, *asked, "-o", target) in ((2, 5) if command == "sweep" else (2,))
    assert named in refusal(capsys)
    if command != "sweep":
        assert not target.exists()


def test_a_profile_of_another_kind_of_device_is_refused(
    plan: Flexpipe,
    flexpipe: Flexpipe,
    capsys: Capture,
    tiny: Path,
    tmp_path: Path,
    repo: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(repo / "policies" / "hardware" / "t4-gcp.yaml"))
    path = tmp_path / "made.yaml"
    assert plan(*SMALL, "-o", path) == 2
    assert "a profile of t4-gcp, device cuda, but layers run on cpu" in refusal(capsys)
    assert flexpipe("profile", "--device", "cpu", "-o", path) == 2
    assert "device cuda, but layers run on cpu" in refusal(capsys)
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [7]}\n')
    files = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert flexpipe("run", "--model", tiny, "--device", "cpu", *files) == 2
    assert "device cuda, but layers run on cpu" in refusal(capsys)
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "named", "code"),
    [
        (("--hardware", "t5-gcp"), "did you mean t4-gcp", 2),
        (("--hardware", "t4-gcp", "--device", "cpu"), "--hardware and --device exclude", 2),
        (("--hardware", "t4-gcp", "--gpu-mem", "-1GiB"), "as a size", 2),
        (("--hardware", "t4-gcp", "--gpu-mem", "3GB/s"), "as a size", 2),
        (("--hardware", "t4-gcp", "--max-latency", "0"), "'--max-latency'", 2),
        (("--hardware", "t4-gcp", "--gen-len", "-3"), "'--gen-len'", 2),
        (("--hardware", "t4-gcp", "--gpu-mem", "10MiB"), "the plan does not fit: gpu needs", 4),
        (("--hardware", "t4-gcp", "--fit-only", "-o", "x.yaml"), "--fit-only knows no rates", 2),
        (("--hardware", "t4-gcp", "--percent", 60, 60, 0, 100, 0, 100), "at most 100", 2),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line_and_leaves_no_file(
    flexpipe: Flexpipe,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    named: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = () if "-o" in arguments else ("-o", "policy.yaml")
    assert flexpipe("plan", "--model", "opt-6.7b", *arguments, *files) == code
    assert named in refusal(capsys)
    assert os.listdir(tmp_path) == []


def test_a_sweep_of_which_nothing_is_feasible_ends_with_the_reason(
    flexpipe: Flexpipe, capsys: Capture, tiny: Path, tmp_path: Path
) -> None:
    asked = ("--model", tiny, "--device", "emulated", "--offload-dir", tmp_path / "offload")
    grid = ("--predict", "--vary", "gpu_mem=1KiB,2KiB", "--num-prompts", 2, "--prompt-len", 4)
    assert flexpipe("sweep", *asked, *grid) == 5
    line = refusal(capsys)
    assert "none of the sweep's 2 points could run" in line and "does not fit" in line


def test_help_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys\nfrom flexpipe.cli.main import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the search finds the rest" in done.stdout
