"""One measured point: which peer, which workload, how many rows, under which cap; how to run it.

A point is run in a process of its own, in its peer's environment, under its cgroup, holding the
lock file if one is given, so that measurements of one machine never disturb each other. What it
told is kept in a `Store`, a JSON file; a point that is in there is not run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.capped import run_capped
from benchmarks.peers.checkpoint import gguf_path, weight_files
from benchmarks.peers.workload import Workload
from benchmarks.trial import REPO


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where things lie on this machine."""

    model: Path
    python: str = sys.executable
    peers_python: str = sys.executable
    airllm_python: str = sys.executable
    airllm_shards: Path = Path("airllm-shards")
    scratch: Path = Path(".")
    threads: int = 2
    lock: Path | None = None
    timeout_s: float = 240.0
    retry: bool = False  # points that failed before


@dataclass(frozen=True, kw_only=True)
class Point:
    """What to measure. `options` are the runner's own, `flexpipe` those of `flexpipe run`."""

    peer: str
    workload: Workload
    batch: int
    cap_bytes: int | None = None
    num_prompts: int | None = None
    budget_s: float | None = None
    options: str = ""
    flexpipe: str = ""

    @property
    def key(self) -> str:
        cap = "in RAM" if self.cap_bytes is None else f"cap {self.cap_bytes / 1e9:g} GB"
        words = [self.peer, cap, str(self.workload), f"batch {self.batch}"]
        if self.num_prompts and self.num_prompts != self.batch:
            words.append(f"{self.num_prompts} prompts")
        return ", ".join([*words, *filter(None, (self.options, self.flexpipe))])


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a peer is started: its runner, its options, which files it reads."""

    runner: str
    options: Sequence[str] = ()
    gguf: str | None = None
    environment: str = "peers"
    capped: bool = field(default=False)


# name -> how; those with `capped` are the ones that can run weights from disk
PEERS = {
    "flexpipe": Peer(runner="runner_flexpipe", environment="flexpipe"),
    "transformers bf16": Peer(runner="runner_transformers", options=("--dtype", "bfloat16")),
    "transformers fp32": Peer(runner="runner_transformers", options=("--dtype", "float32")),
    "llama.cpp bf16": Peer(runner="runner_llama_cpp", options=("--ubatch", "2048"), gguf="bf16"),
    "llama.cpp f16": Peer(runner="runner_llama_cpp", options=("--ubatch", "2048"), gguf="f16"),
    "llama.cpp bf16 mmap": Peer(
        runner="runner_llama_cpp", options=("--mmap",), gguf="bf16", capped=True
    ),
    "llama.cpp f16 mmap": Peer(
        runner="runner_llama_cpp", options=("--mmap",), gguf="f16", capped=True
    ),
    "airllm bf16": Peer(
        runner="runner_airllm", options=("--dtype", "bfloat16"), environment="airllm", capped=True
    ),
    "accelerate bf16": Peer(
        runner="runner_transformers",
        options=("--dtype", "bfloat16", "--offload-memory", "100MB"),
        capped=True,
    ),
}


def command(point: Point, site: Site) -> list[str]:
    peer = PEERS[point.peer]
    pythons = {
        "flexpipe": site.python,
        "peers": site.peers_python,
        "airllm": site.airllm_python,
    }
    model = gguf_path(site.model, peer.gguf) if peer.gguf else site.model
    words = [pythons[peer.environment], "-m", f"benchmarks.peers.{peer.runner}"]
    words += ["--model", str(model), "--batch", str(point.batch)]
    words += ["--workload", str(point.workload), "--threads", str(site.threads)]
    words += peer.options
    if peer.environment == "airllm":
        words += ["--shards", str(site.airllm_shards)]
    if "--offload-memory" in peer.options:
        words += ["--offload-folder", str(site.scratch / "offload")]
    if point.num_prompts:
        words += ["--num-prompts", str(point.num_prompts)]
    if point.budget_s is not None:
        words += ["--budget-s", str(point.budget_s)]
    words += shlex.split(point.options)
    if point.flexpipe:
        words.append(f"--options={point.flexpipe}")
    return words


def files(point: Point, site: Site) -> list[Path]:
    """What the peer reads, to be dropped from the page cache."""
    peer = PEERS[point.peer]
    if peer.environment == "airllm":
        return [site.airllm_shards]
    if peer.gguf:
        return [gguf_path(site.model, peer.gguf)]
    return weight_files(site.model)


def run_point(point: Point, site: Site) -> dict[str, Any]:
    """What the point's runner told, or an `error`; never raises for a peer that fails."""
    env = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": str(site.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    capped = point.cap_bytes is not None
    with _held(site.lock), contextlib.chdir(site.scratch):
        ran = run_capped(
            command(point, site),
            limit_bytes=point.cap_bytes,
            drop=files(point, site) if capped else (),
            env=env,
            timeout_s=site.timeout_s,
        )
    facts: dict[str, Any] = {"key": point.key, "peer": point.peer, "cap_bytes": point.cap_bytes}
    facts |= {"batch": point.batch, "workload": str(point.workload)}
    if capped:
        facts |= {"cgroup_peak_bytes": ran.peak_bytes, "oom_kills": ran.oom_kills}
    try:
        facts["result"] = json.loads(ran.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        facts |= {"error": _why(ran, site), "stderr": ran.stderr_tail}
    return facts


def _why(ran: Any, site: Site) -> str:
    if ran.timed_out:
        return f"no answer within {site.timeout_s:g} s"
    if ran.oom_kills:
        return f"killed for memory after {ran.seconds:.0f} s"
    return f"exit code {ran.returncode} after {ran.seconds:.0f} s"


@contextlib.contextmanager
def _held(lock: Path | None) -> Iterator[None]:
    """The lock file, as `flock` of the command line takes it."""
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """Points by key in a JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        if path.exists():
            self.facts = json.loads(path.read_text(encoding="utf-8"))
        self.points: dict[str, dict[str, Any]] = self.facts.setdefault("points", {})

    def measure(self, point: Point, site: Site, *, repetition: int = 0) -> dict[str, Any]:
        """The stored point, or else a run of it, stored."""
        key = f"{point.key} #{repetition}" if repetition else point.key
        if key not in self.points or (site.retry and "error" in self.points[key]):
            facts = run_point(point, site)
            print(facts.pop("stderr", ""), end="", file=sys.stderr)  # names paths: not for the file
            self.points[key] = facts
            self.save()
        facts = self.points[key]
        print(f"{key}: {told(facts)}", file=sys.stderr, flush=True)
        return facts

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
        partial.rename(self.path)


def told(facts: dict[str, Any]) -> str:
    if "error" in facts:
        return str(facts["error"])
    result = facts["result"]
    projected = f" (projected: {result['projected']})" if result["projected"] else ""
    return f"{result['tokens_per_s']:.2f} token/s{projected}"


def tokens_per_s(facts: dict[str, Any]) -> float:
    """0 for a point that failed."""
    return float(facts["result"]["tokens_per_s"]) if "result" in facts else 0.0


def best(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(points, key=tokens_per_s)
