"""A flexpipe of its own process, which ends when the one that waits for it does.

As a module it is the child's first step: it asks the kernel to be killed when its parent dies, so
that no kill -9 of the parent leaves a run behind, and becomes `flexpipe` in the same process. No
Python runs between fork and exec of the parent, which may have threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 10.0  # what a run may take to tidy up after it was interrupted
_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a child ended and what it wrote; the exit code is that of subprocess."""

    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool = False


def run_flexpipe(
    arguments: Sequence[str], *, stdin: str = "", timeout_s: float | None = None
) -> Ended:
    """`flexpipe` with these arguments. Call it in the main thread: the child dies with the thread.

    After `timeout_s`, and when the wait is interrupted, the child and what it started are told to
    stop as by Ctrl-C, and are killed if they do not.
    """
    process = subprocess.Popen(
        [*_python(), "-m", __name__, str(os.getpid()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # a Ctrl-C of the terminal is ours to hand on, once
        env={**os.environ, "PYTHONPATH": _python_path()},
    )
    try:
        stdout, stderr = process.communicate(stdin, timeout_s)
    except subprocess.TimeoutExpired:
        stdout, stderr = _stop(process)
        return Ended(exit_code=process.returncode, stdout=stdout, stderr=stderr, timed_out=True)
    except BaseException:
        _stop(process)
        raise
    return Ended(exit_code=process.returncode, stdout=stdout, stderr=stderr)


def _python() -> list[str]:
    return [sys.executable, "-P"]  # this flexpipe, not one that lies in the working directory


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


def _stop(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the process and its group wrote before they ended."""
    _signal_group(process, signal.SIGINT)
    try:
        return process.communicate(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
    return process.communicate()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _become_flexpipe(parent: int, arguments: Sequence[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        sys.exit(f"flexpipe: error: prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execv(sys.executable, [*_python(), "-m", "flexpipe", *arguments])


if __name__ == "__main__":
    _become_flexpipe(int(sys.argv[1]), sys.argv[2:])
