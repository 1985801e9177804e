"""Work in a forked process comes back as if it had been done here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from flexpipe.beside import Beside
from flexpipe.errors import PlanError


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.mark.usefixtures("two_cores")
def test_work_is_done_by_another_process() -> None:
    with Beside(os.getpid) as beside:
        assert beside.result() != os.getpid()


@pytest.mark.usefixtures("two_cores")
def test_what_the_work_raises_is_raised_here() -> None:
    def fail() -> None:
        raise PlanError("does not fit")

    with Beside(fail) as beside, pytest.raises(PlanError, match="does not fit"):
        beside.result()


@pytest.mark.usefixtures("two_cores")
def test_work_whose_process_dies_is_done_here() -> None:
    here = os.getpid()

    def die_elsewhere() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    with Beside(die_elsewhere) as beside:
        assert beside.result() == here


def test_with_one_core_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with Beside(os.getpid) as beside:
        assert beside.result() == os.getpid()


@pytest.mark.usefixtures("two_cores")
def test_work_that_nobody_wants_any_more_ends(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def sleep() -> None:
        started.write_text(str(os.getpid()))
        time.sleep(60)

    with Beside(sleep) as beside:
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
    beside.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
