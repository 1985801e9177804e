"""Results as a file takes them: one JSON line per request, complete or absent.

A line is appended with one write, so a reader never sees half of it; what a full disk cuts off is
taken back before the error is raised. Order is the order of finishing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from flexpipe.errors import InputError, RunError

# "stop": an end-of-sequence token; "length": max_tokens or the model's last position
FinishReason = Literal["stop", "length", "error"]


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


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse, before anything is loaded, an output path that could not or should not be written."""
    if path.is_dir():
        raise InputError(f"--output-file {path} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output-file {path}: there is no directory {path.absolute().parent}")
    if path.is_file() and path.stat().st_size > 0 and not overwrite:
        raise InputError(
            f"--output-file {path} exists and is not empty; name another file, "
            "or give --overwrite to replace it"
        )
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"--output-file {path} cannot be written: permission denied")


class ResultWriter:
    """Appends results to a new file (or, with `overwrite`, to one it empties first)."""

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        check_output(path, overwrite)
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._fd: int | None = os.open(path, flags | (os.O_TRUNC if overwrite else 0), 0o666)
        except OSError as error:
            raise InputError(f"--output-file {path}: {error.strerror}") from error

    def write(self, result: Result) -> None:
        """Append one line; a RunError if the file system does not take all of it."""
        assert self._fd is not None, "the writer is closed"
        line = memoryview((result.to_json() + "\n").encode("utf-8"))
        num_written = 0
        try:
            while num_written < len(line):  # once, unless a disk is filling up
                num_written += os.write(self._fd, line[num_written:])
        except OSError as error:
            self._take_back(num_written)
            raise RunError(
                f"cannot write the result of request {result.id!r} to {self._path}: "
                f"{error.strerror}; results before it are complete"
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
