"""A run takes its memory at the start and holds it: no tier outgrows its plan, then or later."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flexpipe.job.probes import Probes
from flexpipe.job.report import Report
from flexpipe.memory.tier import TierMemory
from flexpipe.plan.hardware import rss_bytes
from flexpipe.plan.policy import percent_shares
from flexpipe.schedule.op import Kind, Op
from flexpipe.units import MIB
from tests.hf import CheckpointFactory, ragged_prompts, shallow
from tests.runtime.jobs import EVERYWHERE, EVERYWHERE_ON_CPU, Runner

TOLERANCE_BYTES = 100 * 10**6
FEW_BYTES = 8 * MIB  # what Python's and the allocator's free lists may gain


@dataclass
class Sampled:
    """The process's memory before the SAMPLE of each step."""

    rss: dict[int, int] = field(default_factory=dict)

    def __call__(self, op: Op) -> None:
        if op.kind == Kind.SAMPLE:
            self.rss[op.step] = rss_bytes()


@pytest.fixture
def runner(hf_checkpoint: CheckpointFactory, tmp_path: Path) -> Runner:
    """Three rows for each micro-batch, so that every tier gets something of everything."""
    prompts = ragged_prompts([5, 9, 30, 70, 12, 40, 8, 20, 33])
    return Runner(hf_checkpoint("llama2"), tmp_path, prompts)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_memory_in_the_thousandth_step_is_that_of_the_first(
    hf_checkpoint: CheckpointFactory, tmp_path: Path, device: str
) -> None:
    prompts = ragged_prompts(list(range(4, 12)))  # one behind the other; some end early
    model = shallow(hf_checkpoint("llama3"), tmp_path / "model", num_layers=1)
    runner = Runner(model, tmp_path, prompts, 201)
    shares = [0, 50, 0, 0, 0, 100] if device == "cpu" else [50, 50, 0, 100, 0, 100]
    given = {**percent_shares(shares), "micro_batch_size": 1, "num_micro_batches": 1}
    sampled = Sampled()
    runner(given, device=device, probes=Probes(before_op=sampled))
    first, last = min(sampled.rss), max(sampled.rss)
    assert last - first >= 1000
    late = max(size for step, size in sampled.rss.items() if step > 900)
    early = max(size for step, size in sampled.rss.items() if step < first + 10)
    print(f"{device}: step {first} {early / MIB:.1f} MiB, step {last} {late / MIB:.1f} MiB")
    assert late - early < FEW_BYTES


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_no_tier_memory_is_taken_once_the_stage_stands(
    runner: Runner, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, str, int]] = []
    planned: list[tuple[int, int, int]] = []

    def watched(name: str) -> Any:
        real = getattr(TierMemory, name)

        def take(memory: TierMemory, num_bytes: int, what: str) -> Any:
            taken.append((name, what, num_bytes))
            return real(memory, num_bytes, what)

        return take

    def loaded(stage: Any) -> None:
        pools = stage.plan.pools
        device_bytes = sum(p.num_bytes for p in pools if p.tier == stage.plan.device_tier)
        host_bytes = sum(p.num_bytes for p in pools if p.tier == "cpu")
        planned.append((len(taken), device_bytes, 0 if device == "cpu" else host_bytes))

    for name in ("take_on_device", "take_on_host"):
        monkeypatch.setattr(TierMemory, name, watched(name))
    given = EVERYWHERE_ON_CPU if device == "cpu" else EVERYWHERE
    runner(given, device=device, probes=Probes(on_stage=loaded))
    ((num_taken, device_bytes, host_bytes),) = planned
    assert len(taken) == num_taken, f"taken late: {taken[num_taken:]}"
    assert sum(size for name, _, size in taken if name == "take_on_device") == device_bytes
    assert sum(size for name, _, size in taken if name == "take_on_host") == host_bytes


@pytest.mark.parametrize("knobs", [{}, {"compress_weight": "4", "compress_vocabulary": "8"}])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_what_was_measured_is_what_was_planned(
    runner: Runner, device: str, knobs: dict[str, str]
) -> None:
    given = EVERYWHERE_ON_CPU if device == "cpu" else EVERYWHERE
    tiers = runner({**given, **knobs}, device=device).report.tiers
    assert [use.tier for use in tiers] == (["gpu"] if device != "cpu" else []) + ["cpu", "disk"]
    for use in tiers:
        index_bytes = FEW_BYTES if use.tier == "disk" else 0  # where the file system keeps extents
        assert use.measured_bytes <= use.planned_bytes + index_bytes, use
        assert use.planned_bytes - use.measured_bytes < TOLERANCE_BYTES, use


# -- under a limit of the kernel's ----------------------------------------------------------------

V1 = Path("/sys/fs/cgroup/memory")
SHAPE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16_000,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}


@pytest.fixture
def limited() -> Iterator[Path]:
    """A memory cgroup below the one of this process, limited to 640 MiB."""
    own = next(
        (line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
         if "memory" in line.split(":")[1].split(",")),
        None,
    )  # fmt: skip
    if own is None or not (V1 / "cgroup.procs").exists():
        pytest.skip("there is no cgroup of version 1 that limits memory")
    base = V1 / own.lstrip("/")
    group = (base if base.is_dir() else V1) / f"flexpipe-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(640 * MIB))
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here: {error}")
    yield group
    group.rmdir()


def in_group(group: Path, folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 16_000) for _ in range(20)] for _ in range(6)]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in prompts)
    )
    words = (
        *("run", "--model", folder / "config.json", "--load-format", "dummy", "--overwrite"),
        *("-i", folder / "prompts.jsonl", "-o", folder / "out.jsonl", "--max-tokens", 3),
        *("--device", "cpu", "--offload-dir", folder / "offload", "--json", *options),
    )
    enter = f'echo $$ > "{group}/cgroup.procs"; exec "$@"'
    return subprocess.run(
        ["sh", "-c", enter, "sh", sys.executable, "-m", "flexpipe", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


def test_under_a_limit_the_rule_finds_a_plan_that_runs(limited: Path, tmp_path: Path) -> None:
    done = in_group(limited, tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["num_finished"] == 6
    fields = Report.__dataclass_fields__
    assert set(fields) <= set(report)
    (on_disk,) = (s for s in report["shares"] if (s["kind"], s["tier"]) == ("weights", "disk"))
    assert 0 < on_disk["achieved"] <= 1
    (cpu,) = (use for use in report["tiers"] if use["tier"] == "cpu")
    print(f"planned {cpu['planned_bytes'] / MIB:.0f}, measured {cpu['measured_bytes'] / MIB:.0f}")
    # the process's own bytes hold pages of shared libraries that other groups may be charged for
    assert cpu["measured_bytes"] <= cpu["planned_bytes"]
    assert "oom_kill 0" in (limited / "memory.oom_control").read_text()
    assert int((limited / "memory.max_usage_in_bytes").read_text()) <= 640 * MIB

    refused = in_group(limited, tmp_path, "--percent", 0, 100, 0, 100, 0, 100)
    assert refused.returncode == 4 and refused.stdout == ""
    text = refused.stderr.strip().splitlines()[-1]
    assert text.startswith("flexpipe: error: the plan does not fit: cpu needs ")
    assert "more than its budget of" in text and "This would fit: " in text
    advised = text.rpartition("This would fit: ")[2].rstrip(".").split()
    followed = in_group(limited, tmp_path, *advised)
    assert followed.returncode == 0, followed.stderr
