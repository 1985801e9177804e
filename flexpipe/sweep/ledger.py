"""What a sweep has finished, as lines of a file that any kill leaves readable.

Each line is one JSON object with the point's `key`; a later line of a key replaces an earlier one.
A line is on the disk when `write` returns. What is left of a line after a kill is cut off when the
file is opened again. The file may hold points of several sweeps, but one process writes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexpipe.closing import Closing
from flexpipe.errors import InputError, RunError

_START = b'{"key": "'  # every line starts so, and so does what is left of one


class Ledger(Closing):
    """The lines of one file, by key; locked while it is open."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. An InputError if it is no ledger or another process has it."""
        self.path = path
        self._is_mine = False
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"cannot write --output-file {path}: {error.strerror}") from error
        try:
            self._lock()
            self.lines, self._num_bytes = read_ledger(path)
            os.ftruncate(self._fd, self._num_bytes)
        except BaseException:
            self.close()
            raise

    def write(self, key: str, line: Mapping[str, Any]) -> None:
        """Append one line and wait until it is on the disk; a RunError if it cannot be."""
        data = json.dumps({"key": key, **line}).encode() + b"\n"
        try:
            written = 0
            while written < len(data):  # once, unless a disk is filling up
                written += os.write(self._fd, data[written:])
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._num_bytes)
            raise RunError(
                f"cannot write to {self.path}: {error.strerror}; the points before are kept. Make "
                "room and run the same command again"
            ) from error
        self._num_bytes += len(data)
        self.lines[key] = json.loads(data)

    def close(self) -> None:
        """Let go of the file; one that holds nothing is removed."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with contextlib.suppress(OSError):
            if self._is_mine and os.fstat(fd).st_size == 0:
                self.path.unlink()
        os.close(fd)

    def _lock(self) -> None:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # its owner may have removed it before we had the lock
            self._is_mine = os.path.samestat(os.fstat(self._fd), self.path.stat())
        if not self._is_mine:
            raise InputError(
                f"another sweep is writing to {self.path}; wait until it has ended, or name "
                "another --output-file"
            )


def read_ledger(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The lines by key, and the bytes of the file that are whole lines.

    A missing file has none. An InputError if something else than a sweep wrote the file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise InputError(f"cannot read --output-file {path}: {error.strerror}") from error
    *whole, rest = content.split(b"\n")
    rest = rest.rstrip(b"\0")  # what a power failure may leave in place of a line
    lines = {}
    for number, text in enumerate(whole, 1):
        line = _line(text)
        if line is None:
            raise _foreign(path, number)
        lines[line["key"]] = line
    if not rest.startswith(_START) and not _START.startswith(rest):
        raise _foreign(path, len(whole) + 1)
    return lines, len(content) - len(content.rpartition(b"\n")[2])


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("key"), str) else None


def _foreign(path: Path, number: int) -> InputError:
    return InputError(
        f"--output-file {path}: line {number} was not written by a sweep, so nothing is appended; "
        "name another file"
    )
