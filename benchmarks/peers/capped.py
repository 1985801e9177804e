"""Run a command under a memory cgroup, and say what it took of it.

    PYTHONPATH=. python -m benchmarks.peers.capped --bytes 1.1e9 [--drop PATH ...] -- COMMAND ...

Everything counts that the kernel charges to a cgroup: memory, page cache, page tables. The files
under each `--drop` leave the page cache first, so nothing is found in it that an earlier run left.
Version 1 and version 2 of cgroups are known; it takes the right to make a group in them. The last
line on stderr is JSON: the return code, the peak, how often the limit was met, whether a process
was killed for it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """How a command under a cap ended."""

    returncode: int
    stdout: str
    stderr_tail: str
    limit_bytes: int | None
    peak_bytes: int | None
    limit_hits: int
    oom_kills: int
    seconds: float
    timed_out: bool


def run_capped(
    command: Sequence[str],
    *,
    limit_bytes: int | None,
    drop: Iterable[Path] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    capture: bool = True,
) -> Ran:
    """Run `command` with at most `limit_bytes` of memory (None: no group at all)."""
    for path in drop:
        drop_page_cache(path)
    start_s = time.perf_counter()
    group = None if limit_bytes is None else _Group(limit_bytes)
    try:
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                command,
                env=None if env is None else dict(env),
                stdout=subprocess.PIPE if capture else None,
                stderr=errors if capture else None,
                text=True,
                preexec_fn=None if group is None else group.enter,
            ) as process,
        ):
            timed_out = False
            try:
                out, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                out, _ = process.communicate()
                timed_out = True
            except BaseException:
                process.kill()
                raise
            return Ran(
                returncode=process.returncode,
                stdout=out or "",
                stderr_tail=_tail(errors),
                limit_bytes=limit_bytes,
                peak_bytes=None if group is None else group.peak_bytes(),
                limit_hits=0 if group is None else group.limit_hits(),
                oom_kills=0 if group is None else group.oom_kills(),
                seconds=time.perf_counter() - start_s,
                timed_out=timed_out,
            )
    finally:
        if group is not None:
            group.remove()


def _tail(file: IO[bytes], num_bytes: int = 2000) -> str:
    """The end of what was written."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - num_bytes))
    return file.read().decode(errors="replace")


def drop_page_cache(path: Path) -> None:
    """Have the kernel forget what it holds of the file, or of all files under the directory."""
    files = [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file())
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(fd)  # dirty pages would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class _Group:
    """One memory cgroup of our own."""

    def __init__(self, limit_bytes: int) -> None:
        self._is_v2 = (_V2 / "cgroup.controllers").exists()
        self._path = (_V2 if self._is_v2 else _V1) / f"peers-{os.getpid()}-{time.time_ns():x}"
        if self._is_v2:
            (_V2 / "cgroup.subtree_control").write_text("+memory")
        self._path.mkdir()
        limit = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
        (self._path / limit).write_text(str(limit_bytes))
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            if (self._path / swap).exists():
                (self._path / swap).write_text("0" if self._is_v2 else str(limit_bytes))

    def enter(self) -> None:
        (self._path / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if (self._path / name).exists():
                return int((self._path / name).read_text())
        return None

    def limit_hits(self) -> int:
        if self._is_v2:
            return _field(self._path / "memory.events", "max")
        return int((self._path / "memory.failcnt").read_text())

    def oom_kills(self) -> int:
        events = "memory.events" if self._is_v2 else "memory.oom_control"
        return _field(self._path / events, "oom_kill")

    def remove(self) -> None:
        """The processes in it are gone, or are ended now."""
        for _ in range(50):
            for pid in (self._path / "cgroup.procs").read_text().split():
                os.kill(int(pid), 9)
            try:
                self._path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, value = line.split()
        if key == name:
            return int(value)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, required=True)
    parser.add_argument("--drop", type=Path, action="append", default=[])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ran = run_capped(command, limit_bytes=int(args.bytes), drop=args.drop, capture=False)
    facts = {key: value for key, value in asdict(ran).items() if not key.startswith("std")}
    print(json.dumps(facts), file=sys.stderr)
    sys.exit(ran.returncode if ran.returncode >= 0 else 128 - ran.returncode)


if __name__ == "__main__":
    main()
