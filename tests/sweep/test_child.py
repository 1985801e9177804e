"""A child ends with its parent, its timeout or its interruption, and leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flexpipe import __version__
from flexpipe.sweep import child
from flexpipe.sweep.child import run_flexpipe
from tests.waiting import eventually

# what stands for flexpipe: it says who it is, starts a child of its own, and waits
WAITER = """
import os, pathlib, subprocess, sys, time
inner = subprocess.Popen(["sleep", "60"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {inner.pid}")
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("tidied up", flush=True)
    print("on stderr", file=sys.stderr)
"""
PARENT = "import sys\nfrom flexpipe.sweep.child import run_flexpipe\nrun_flexpipe([sys.argv[1]])"


@pytest.fixture
def waiter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `flexpipe` that is found before ours once the child has asked to die with us."""
    package = tmp_path / "flexpipe"
    (package / "sweep").mkdir(parents=True)
    for name in ("__init__.py", "sweep/__init__.py"):
        (package / name).write_text("")
    (package / "sweep/child.py").write_text(Path(child.__file__).read_text())
    (package / "__main__.py").write_text(WAITER)
    monkeypatch.setattr(child, "_ROOT", tmp_path)
    return tmp_path / "pids"


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def started(pids: Path) -> bool:
    return pids.is_file() and len(pids.read_text().split()) == 2


def test_it_is_flexpipe_with_its_streams_and_its_exit_code() -> None:
    ended = run_flexpipe(["--version"])
    assert (ended.exit_code, ended.stdout) == (0, f"flexpipe, version {__version__}\n")
    ended = run_flexpipe(["runn"])
    assert ended.exit_code == 2 and "No such command 'runn'" in ended.stderr


def test_it_is_this_flexpipe_wherever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flexpipe.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)
    assert run_flexpipe(["--version"]).exit_code == 0


def test_a_child_that_is_late_may_tidy_up_before_it_ends(waiter: Path) -> None:
    ended = run_flexpipe([str(waiter)], timeout_s=2)
    assert ended.timed_out and (ended.stdout, ended.stderr) == ("tidied up\n", "on stderr\n")
    assert eventually(lambda: all(is_gone(int(pid)) for pid in waiter.read_text().split()))


def test_a_child_that_does_not_listen_is_killed(
    waiter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "GRACE_S", 0.1)
    main = waiter.parent / "flexpipe/__main__.py"
    main.write_text(f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAITER}")
    ended = run_flexpipe([str(waiter)], timeout_s=2)
    assert ended.timed_out and ended.exit_code == -signal.SIGKILL


def test_ctrl_c_ends_the_child_first(waiter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = interrupting(monkeypatch, lambda: started(waiter))
    with pytest.raises(KeyboardInterrupt):
        run_flexpipe([str(waiter)])
    assert interrupted
    assert all(is_gone(int(pid)) for pid in waiter.read_text().split()[:1])


def interrupting(monkeypatch: pytest.MonkeyPatch, ready: Callable[[], bool]) -> list[bool]:
    """Ctrl-C reaches the parent, alone, once `ready`."""
    communicate, calls = subprocess.Popen.communicate, list[bool]()

    def interrupted(self: subprocess.Popen[str], *arguments: object, **named: object) -> object:
        if not calls:
            calls.append(eventually(ready))
            raise KeyboardInterrupt
        return communicate(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    return calls


def test_kill_9_of_the_parent_kills_the_child(waiter: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(waiter.parent))}
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT, str(waiter)], env=env)
    assert eventually(lambda: started(waiter))
    pid = int(waiter.read_text().split()[0])
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    try:
        assert eventually(lambda: is_gone(pid))
    finally:
        os.killpg(pid, signal.SIGKILL)  # what stands for a run started a sleep of its own


def test_a_child_whose_parent_is_dead_already_does_not_begin() -> None:
    command = [sys.executable, "-m", "flexpipe.sweep.child", "1", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
