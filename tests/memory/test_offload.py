"""Claims about the folders that jobs offload to."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flexpipe.errors import InputError
from flexpipe.memory.offload import OffloadDirectory

MIB = 1 << 20


def test_a_job_has_its_own_folder_and_takes_it_along(tmp_path: Path) -> None:
    with OffloadDirectory(tmp_path / "offload") as first, OffloadDirectory(first.path) as second:
        assert first.job != second.job
        (first.job / "kv").write_bytes(b"x")
        assert first.cache.is_dir()
        assert {first.job, second.job} == set((tmp_path / "offload" / "jobs").iterdir())
    assert list((tmp_path / "offload" / "jobs").iterdir()) == []
    assert (tmp_path / "offload" / "cache").is_dir()
    first.close()  # a second time


def test_leftovers_of_dead_jobs_are_cleared_with_one_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = """
        import os, sys
        from flexpipe.memory.offload import OffloadDirectory
        offload = OffloadDirectory(sys.argv[1])
        (offload.job / "kv").write_bytes(bytes(1 << 20))
        (offload.path / "cache" / "kept").write_bytes(b"x")
        os._exit(9)
    """
    for _ in range(2):  # the second clears what the first left
        run = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
        assert subprocess.run(run, check=False).returncode == 9
    (tmp_path / "jobs" / "never-locked").mkdir()
    assert len(list((tmp_path / "jobs").iterdir())) == 2
    with caplog.at_level(logging.INFO, logger="flexpipe"), OffloadDirectory(tmp_path) as offload:
        assert list((tmp_path / "jobs").iterdir()) == [offload.job]
    (record,) = caplog.records
    assert "2 dead jobs" in record.getMessage()
    assert "1 MiB freed" in record.getMessage()
    assert (tmp_path / "cache" / "kept").exists()


def _open_and_close(path: str, rounds: int) -> None:
    for _ in range(rounds):
        with OffloadDirectory(path) as offload:
            (offload.job / "kv").write_bytes(b"x")
            assert (offload.job / "kv").read_bytes() == b"x"


def test_processes_that_start_together_leave_each_others_folders_alone(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=_open_and_close, args=(str(tmp_path), 30)) for _ in range(4)]
    with OffloadDirectory(tmp_path) as mine:
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(30)
        assert [job.exitcode for job in jobs] == [0] * 4
        assert mine.job.is_dir()


def test_a_folder_goes_away_under_the_directorys_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def rmtree(path: Path, ignore_errors: bool) -> None:
        with (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused.append(path)

    offload = OffloadDirectory(tmp_path)
    monkeypatch.setattr("flexpipe.memory.offload.shutil.rmtree", rmtree)
    offload.close()
    assert refused == [offload.job]


def test_an_unusable_directory_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Name a writable directory"):
        OffloadDirectory(tmp_path / "file")
