"""`flexpipe run` over several ranks, started for real: one command, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import eventually

NUM_PROMPTS = 12
SLOW = ("--device", "emulated", "--emulate", "h2d=20MB/s", "--percent", "0 100 100 0 100 0")


class Job:
    """One command line, which may be given again."""

    def __init__(self, folder: Path, repo: Path) -> None:
        self.folder, self._repo = folder, repo
        prompts = folder / "prompts.jsonl"
        lines = ({"prompt": f"ticket {i}: it prints {i * 7}"} for i in range(NUM_PROMPTS))
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(self, name: str, *options: str) -> list[str]:
        words = [word for option in options for word in option.split()]
        return [
            *("run", "--model", str(self._repo / "flexpipe/demo/model")),
            *("-i", str(self.folder / "prompts.jsonl"), "-o", str(self.output(name))),
            *("--offload-dir", str(self.folder / "offload"), "--ignore-eos"),
            *("--max-tokens", "12", "--gpu-batch-size", "2", "--num-gpu-batches", "1", *words),
        ]

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def start(self, name: str, *options: str, under: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [sys.executable, *under, "-m", "flexpipe", *self.arguments(name, *options)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self._repo), "OMP_NUM_THREADS": "1"},
        )

    def answers(self, name: str) -> dict[Any, list[int]]:
        records = [json.loads(line) for line in self.output(name).read_text().splitlines()]
        tokens = {record["id"]: record["token_ids"] for record in records}
        assert len(tokens) == len(records) == NUM_PROMPTS
        return tokens

    def has_answers(self, name: str) -> bool:
        return self.output(name).is_file() and bool(self.output(name).read_text())

    @property
    def left_behind(self) -> list[Path]:
        return list((self.folder / "offload/jobs").iterdir())


@pytest.fixture
def job(tmp_path: Path, repo: Path) -> Iterator[Job]:
    """Processes that are left at the end fail the test, and are killed."""
    yield Job(tmp_path, repo)
    left = [process for process in psutil.process_iter(["cmdline"]) if is_of(process, tmp_path)]
    for process in left:
        process.kill()
    assert not left


def is_of(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in word for word in process.info["cmdline"] or ())


def test_two_ranks_answer_as_one_and_say_nothing_that_alarms(job: Job) -> None:
    alone, shared = job.start("alone"), job.start("shared", "--pipeline-parallel-size 2", "--json")
    out, err = shared.communicate()
    alone.communicate()
    assert (alone.returncode, shared.returncode) == (0, 0), err
    assert job.answers("shared") == job.answers("alone")
    assert json.loads(out)["num_finished"] == NUM_PROMPTS
    for stage in range(2):
        assert f"[stage {stage}] flexpipe: stage {stage} is rank {stage} of 2 on " in err
    assert not [word for word in ("Traceback", "[W", "[E", "arning") if word in err], err
    assert not job.left_behind


@pytest.mark.slow
def test_kill_9_of_the_launcher_leaves_no_rank_and_the_same_command_goes_on(job: Job) -> None:
    launcher = job.start("shared", "--pipeline-parallel-size 2", *SLOW)
    assert eventually(lambda: job.has_answers("shared"), within_s=60)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks) == 2
    launcher.kill()
    launcher.communicate()
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    assert not job.left_behind
    assert len(job.output("shared").read_text().splitlines()) < NUM_PROMPTS
    again = job.start("shared", "--pipeline-parallel-size 2")
    again.communicate()
    assert again.returncode == 0
    job.answers("shared")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_or_freezes_ends_the_command_with_its_name_last(
    job: Job, victim: int, number: signal.Signals
) -> None:
    launcher = job.start("shared", "--pipeline-parallel-size 2", "--heartbeat-timeout 2", *SLOW)
    assert eventually(lambda: job.has_answers("shared"), within_s=60)
    ranks = sorted(psutil.Process(launcher.pid).children(), key=lambda rank: rank.pid)
    os.kill(ranks[victim].pid, number)
    try:
        _, err = launcher.communicate(timeout=9)
    finally:
        launcher.kill()
    assert launcher.returncode == 5
    last = err.splitlines()[-1]
    assert last.startswith(f"flexpipe: error: stage {victim} (rank {victim}, layers "), err
    assert not job.left_behind


@pytest.mark.slow
def test_a_gang_that_torchrun_starts_again_goes_on_by_itself(job: Job) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    agent = job.start(
        "shared",
        "--pipeline-parallel-size 2",
        *SLOW,
        under=(*torchrun, "--max-restarts", "1"),
    )
    assert eventually(lambda: job.has_answers("shared"), within_s=60)
    ranks = psutil.Process(agent.pid).children()
    os.kill(ranks[-1].pid, signal.SIGKILL)
    _, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err
    job.answers("shared")
    assert not job.left_behind


@pytest.mark.slow
def test_the_launcher_for_several_hosts_starts_its_ranks_through_ssh(
    job: Job, repo: Path, tmp_path: Path
) -> None:
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nshift 4  # -tt -o OPTION HOST\nexec sh -c "$1"\n')
    ssh.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = subprocess.run(
        [
            *(str(repo / "bin/flexpipe-hosts"), "127.0.0.1,localhost", "1"),
            *job.arguments("it's shared", "--pipeline-parallel-size 2"),
        ],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PATH": f"{ssh.parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "FLEXPIPE_VENV": str(tmp_path),  # none there: PYTHON is taken
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    job.answers("it's shared")
