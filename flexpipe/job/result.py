"""Results as a file takes them: one JSON line per request, complete or absent.

A line is appended with one write, so a reader never sees half of it; what a full disk cuts off is
taken back before the error is raised, what a killed job or a power failure left of a last line is
found by `read_done` and cut off when the file is appended to. Order is the order of finishing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from flexpipe.closing import Closing
from flexpipe.errors import InputError, RunError
from flexpipe.job.request import BadLine, Line, Request, id_digest, read_lines
from flexpipe.units import MIB

# "stop": an end-of-sequence token or a stop string; "length": max_tokens
FinishReason = Literal["stop", "length", "error"]
MAX_RECORD_BYTES = 256 * MIB
_START = b'{"id": '  # every record starts so, and so does what is left of one


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one request, under its own id; `error` says why it failed."""

    id: str | int
    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason
    prompt_tokens: int
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        line: dict[str, Any] = {
            "id": self.id,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": len(self.token_ids),
            },
        }
        if self.error is not None:
            line["error"] = self.error
        return line

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @property
    def name(self) -> str:
        return f"request {self.id!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A line of the input that was never run, and why; `id` is None if it named none."""

    id: str | int | None
    line: int
    error: str

    @classmethod
    def of(cls, bad: BadLine) -> Rejection:
        return cls(id=bad.id, line=bad.index, error=bad.reason)

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "line": self.line, "error": self.error, "finish_reason": "error"}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @property
    def name(self) -> str:
        return f"line {self.line}"


@dataclass(kw_only=True, slots=True)
class Done:
    """What an output file holds already: some 100 bytes for each record.

    A rejected line is known by its number and never by its id, which may be another line's.
    """

    ids: set[bytes] = field(default_factory=set)  # digests
    lines: set[int] = field(default_factory=set)
    num_failed: int = 0  # of `ids`; all of `lines` failed
    valid_bytes: int = 0

    def holds(self, item: Request | BadLine) -> bool:
        """Whether `item`, read from the same input, needs nothing more."""
        if item.index in self.lines:
            return True
        return isinstance(item, Request) and id_digest(item.id) in self.ids

    def add(self, record: dict[str, Any]) -> None:
        """Count one line of the file in."""
        if "line" in record:
            self.lines.add(record["line"])
        else:
            self.ids.add(id_digest(record["id"]))
            self.num_failed += record["finish_reason"] == "error"


def read_done(path: Path) -> Done:
    """The records in `path`, and where what is left of a torn last one starts.

    A missing file holds none. A line that is no record, other than such a rest at the end, is an
    InputError: the file is not the output of a job.
    """
    try:
        with path.open("rb") as file:
            return _read_done(path, file)
    except FileNotFoundError:
        return Done()
    except OSError as error:
        raise InputError(f"cannot read the output file {path}: {error.strerror}") from error


def _read_done(path: Path, file: BinaryIO) -> Done:
    done = Done()
    lines = read_lines(file, MAX_RECORD_BYTES)
    for line in lines:
        record = _record(line)
        if record is not None and line.raw.endswith(b"\n"):
            done.add(record)
            done.valid_bytes = line.offset + len(line.raw)
        elif next(lines, None) is not None or (record is None and not _is_rest(line)):
            raise InputError(
                f"--output-file {path}: line {line.number} is no result of a job, so nothing can "
                "be appended; name another file, or give --overwrite to replace it"
            )
    return done


def _record(line: Line) -> dict[str, Any] | None:
    """The record that a line says; None if it says something else."""
    record = _parsed(line)
    if not isinstance(record, dict) or record.get("finish_reason") not in get_args(FinishReason):
        return None
    key, kinds = ("line", int) if "line" in record else ("id", (str, int))
    return record if isinstance(record.get(key), kinds) else None


def _is_rest(line: Line) -> bool:
    """Whether a record began here; after a power failure there may be zeros instead."""
    begun = line.raw.removesuffix(b"\n").rstrip(b"\0")
    return _parsed(line) is None and (begun.startswith(_START) or _START.startswith(begun))


def _parsed(line: Line) -> Any:
    """The JSON value of a line; None if it holds none."""
    try:
        return None if line.is_too_long else json.loads(line.raw)
    except (ValueError, RecursionError):
        return None


def check_output(path: Path, overwrite: bool, mode: Literal["new", "append"] = "new") -> None:
    """Refuse, before anything is loaded, an output path that could not or should not be written."""
    if path.is_dir():
        raise InputError(f"--output-file {path} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output-file {path}: there is no directory {path.absolute().parent}")
    is_kept = mode == "new" and not overwrite
    if is_kept and path.is_file() and path.stat().st_size > 0:
        raise InputError(
            f"--output-file {path} exists and is not empty; name another file, "
            "or give --overwrite to replace it"
        )
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"--output-file {path} cannot be written: permission denied")


class ResultWriter(Closing):
    """Appends results to a new file, to one it empties (`overwrite`), or to an earlier job's.

    In mode "append" all behind the first `keep_bytes` is cut off first; None keeps everything.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        *,
        mode: Literal["new", "append"] = "new",
        keep_bytes: int | None = None,
    ) -> None:
        check_output(path, overwrite, mode)
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        if mode == "new" and overwrite:
            flags |= os.O_TRUNC
        try:
            self._fd: int | None = os.open(path, flags, 0o666)
            if mode == "append" and keep_bytes is not None:
                self._cut(keep_bytes)
        except OSError as error:
            raise InputError(f"--output-file {path}: {error.strerror}") from error

    def _cut(self, num_bytes: int) -> None:
        assert self._fd is not None
        if os.fstat(self._fd).st_size > num_bytes:
            os.ftruncate(self._fd, num_bytes)

    def write(self, record: Result | Rejection) -> None:
        """Append one line; a RunError if the file system does not take all of it."""
        assert self._fd is not None, "the writer is closed"
        line = memoryview((record.to_json() + "\n").encode("utf-8", "backslashreplace"))
        num_written = 0
        try:
            while num_written < len(line):  # once, unless a disk is filling up
                num_written += os.write(self._fd, line[num_written:])
        except OSError as error:
            self._take_back(num_written)
            raise RunError(
                f"cannot write the result of {record.name} to {self._path}: {error.strerror}; "
                "results before it are complete"
            ) from error

    def _take_back(self, num_bytes: int) -> None:
        assert self._fd is not None
        with contextlib.suppress(OSError):  # a pipe cannot be cut
            if num_bytes:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - num_bytes)

    def close(self) -> None:
        """Close the file; what the file system reports only now is a RunError too."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            os.close(fd)
        except OSError as error:
            raise RunError(f"cannot finish {self._path}: {error.strerror}") from error
