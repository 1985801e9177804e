"""Where jobs keep what they offload, and what becomes of it when they die.

`jobs/<id>` belongs to one job: it is locked while its process lives and goes away with it. `cache/`
is shared and stays. Whoever opens the directory removes the folders of jobs that died.
Invariant: a folder whose lock is free belongs to nobody, because folders are made and cleared under
the directory's own lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from flexpipe.closing import Closing
from flexpipe.errors import InputError
from flexpipe.units import format_bytes

log = logging.getLogger("flexpipe")


class OffloadDirectory(Closing):
    """A job's own folder `job` and the shared folder `cache` under one path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cache = self.path / "cache"
        self.job_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.job = self.path / "jobs" / self.job_id
        self._lock_fd = -1
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            self.job.parent.mkdir(exist_ok=True)
            with file_lock(self.path / "lock"):  # a folder without its lock is never seen alive
                _clear_dead_jobs(self.job.parent)
                self.job.mkdir()
                self._lock_fd = _lock_job(self.job)
        except OSError as error:
            raise InputError(
                f"cannot use {self.path} for offloading: {error.strerror or error}. Name a "
                "writable directory on a local disk."
            ) from error

    def close(self) -> None:
        """Remove the job's folder and let go of its lock."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            # one that starts now would find a folder without a lock, and half of its files
            with contextlib.suppress(OSError), file_lock(self.path / "lock"):
                shutil.rmtree(self.job, ignore_errors=True)
            os.close(fd)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of `path` among processes; the kernel frees it if this one dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _lock_job(job: Path) -> int:
    fd = os.open(job / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _clear_dead_jobs(jobs: Path) -> None:
    dead = [job for job in jobs.iterdir() if job.is_dir() and _is_dead(job)]
    freed = sum(_remove(job) for job in dead)
    if dead:
        log.info(
            "removed the leftovers of %d dead jobs in %s: %s freed",
            len(dead),
            jobs,
            format_bytes(freed),
        )


def _is_dead(job: Path) -> bool:
    """Whether nobody holds the lock of `job`; a folder without one was never finished."""
    try:
        fd = os.open(job / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # another user's
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _remove(job: Path) -> int:
    """Remove a job's folder; the bytes that came free."""
    freed = sum(path.lstat().st_blocks * 512 for path in job.rglob("*") if path.is_file())
    shutil.rmtree(job, ignore_errors=True)
    return freed
