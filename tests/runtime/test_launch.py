"""One command starts all ranks, and nothing of them is left whatever becomes of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flexpipe.errors import RunError
from flexpipe.runtime import launch as launch_module
from flexpipe.runtime.launch import launch
from tests.waiting import eventually
from tests.warm import PRELOADED

RANK = "import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n"
WAIT = """
from flexpipe.runtime.launch import heed_launcher
heed_launcher()
pathlib.Path(sys.argv[1], f"{rank}").write_text(str(os.getpid()))
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1], f"tidied-{rank}").touch()
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., int]:
    """`start(code)`: the launcher with ranks that run this code."""

    def run(code: str, stages: int = 2) -> int:
        command = [sys.executable, "-S", "-c", RANK + code, str(tmp_path)]
        return launch(command, num_stages=stages, completed=(0, 6))

    return run


def pids(folder: Path, count: int = 2) -> list[int]:
    """Of the ranks, once all of them wait."""

    def written() -> bool:
        return all((folder / str(rank)).is_file() for rank in range(count))

    assert eventually(written)
    return [int((folder / str(rank)).read_text()) for rank in range(count)]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_stdout_is_rank_0s_and_stderr_everybodys_under_its_stage(
    start: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        start(
            "print('answer', rank)\nprint('flexpipe: one\\nflexpipe: two', file=sys.stderr)",
            stages=3,
        )
        == 0
    )
    out, err = capfd.readouterr()
    assert out == "answer 0\n"
    assert sorted(err.splitlines()) == sorted(
        f"[stage {rank}] flexpipe: {word}" for rank in range(3) for word in ("one", "two")
    )


def test_the_report_of_rank_0_needs_no_name(
    start: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("print('12 requests finished', file=sys.stderr) if rank == 0 else 0") == 0
    assert capfd.readouterr().err == "12 requests finished\n"


def test_ranks_learn_who_they_are_as_under_torchrun(start: Callable[..., int]) -> None:
    code = """
names = "WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR TORCHELASTIC_USE_AGENT_STORE"
seen = [os.environ[name] for name in names.split()]
sys.exit(seen != ["2", str(rank), "2", "127.0.0.1", "True"])
"""
    assert start(code) == 0


def test_a_complete_run_has_the_exit_code_of_rank_0(start: Callable[..., int]) -> None:
    assert start("sys.exit(0 if rank else 6)") == 6


def test_the_first_failures_words_come_last_and_once(
    start: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
time.sleep(0.3 * rank)
print("flexpipe: loading", file=sys.stderr)
print("flexpipe: error: no such model", file=sys.stderr)
sys.exit(3)
"""
    with pytest.raises(RunError, match=r"^no such model$") as raised:
        start(code)
    assert raised.value.exit_code == 3
    err = capfd.readouterr().err
    assert set(err.splitlines()) <= {
        "[stage 0] flexpipe: loading",
        "[stage 1] flexpipe: loading",
    }


def test_a_killed_rank_is_told_with_its_signal_and_ends_the_others(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "GRACE_S", 0.3)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"^stage 1 \(rank 1\) was killed by signal 9 \(SIGKILL\)$"):
        start("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)")
    assert time.monotonic() - began < 30


def test_ctrl_c_is_handed_on_and_raised_when_all_have_ended(
    start: Callable[..., int], tmp_path: Path
) -> None:
    def interrupt() -> None:
        pids(tmp_path)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        start(WAIT)
    assert all((tmp_path / f"tidied-{rank}").exists() for rank in range(2))


def test_kill_9_of_the_launcher_leaves_no_rank_not_even_a_frozen_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    command = [sys.executable, "-c", RANK + WAIT, str(tmp_path)]
    launcher = context.Process(target=launch, args=(command,), kwargs={"num_stages": 2})
    launcher.start()
    ranks = pids(tmp_path)
    os.kill(ranks[1], signal.SIGSTOP)
    launcher.kill()
    launcher.join()
    assert eventually(lambda: all(map(is_gone, ranks)), within_s=10)
    assert all((tmp_path / f"tidied-{rank}").exists() for rank in range(2))
