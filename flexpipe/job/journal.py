"""What a killed job had generated of the rows it did not finish.

The journal lies beside the output. Its first line says what the tokens depend on and how much of
the input was known; each further line holds one batch: rows that are done, then new tokens per
row. Every line starts with its checksum, so a tail torn by a kill is recognized and left out, and
with it everything behind it: what is recovered of a row is always a prefix of its tokens. Results
are the output file's business; a row may be in both, if the job died between the two, and then the
output wins.

Invariants: under the journal's name lies nothing, an empty file or one with a whole first line,
because a new file gets the name only once it is written; whoever holds the lock of the file under
that name owns the job; memory and file hold no more than the unfinished rows need.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from flexpipe.errors import InputError, RunError
from flexpipe.units import MIB

log = logging.getLogger("flexpipe")

VERSION = 1
INTERVAL_S = 1.0  # a kill costs at most the tokens of about this long
SYNC_S = 5.0  # and a power failure those of this long
ROTATE_BYTES = 4 * MIB
WASTE = 4  # a file this many times larger than what is alive in it is rewritten
_KEY = "flexpipe_journal"
_MAX_HEADER_BYTES = MIB
_TOKEN_BYTES, _ROW_BYTES = 8, 32  # about what one takes in a rewritten file
_CHUNK_BYTES = MIB
_SHOWN = 40

# What changes tokens: the part's name, as a user knows it, and its value or digest.
Fingerprint: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemCalls:
    """What a journal asks of the system; tests put themselves in between."""

    write: Callable[[int, memoryview], int] = os.write
    sync: Callable[[int], None] = os.fdatasync
    replace: Callable[[Path, Path], None] = os.replace
    clock: Callable[[], float] = time.monotonic


def path_for(output: Path) -> Path:
    """Where the journal of a job with this output file lies."""
    return output.with_name(output.name + ".journal")


def digest_input(path: Path, num_bytes: int) -> str:
    """SHA-256 of the first `num_bytes` of the input, with a newline after its last line.

    So an input whose last line lacks the newline may be added to all the same, but where that line
    itself went on, the digest is another.
    """
    digest, last = hashlib.sha256(), b"\n"
    with path.open("rb") as file:
        left = num_bytes
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left, last = left - len(chunk), chunk[-1:]
        after = file.read(2)
    if last != b"\n" and (after[:1] in (b"", b"\n") or after == b"\r\n"):
        digest.update(b"\n")
    return digest.hexdigest()


@dataclass(slots=True)
class _Row:
    """The tokens of an unfinished row; the first `num_written` are in the file."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    num_written: int = 0


class Journal:
    """The unfinished rows of one job, in memory and in its file. Threads may share one.

    `line_index` is the caller's name of a row. It must mean the same row when the job is resumed,
    also from a longer input.
    """

    def __init__(self, file: _LockedFile, header: bytes, rows: dict[int, _Row], new: bool) -> None:
        """Use `Journal.open`."""
        self.path = file.path
        self.is_new = new
        self.unfinished: Mapping[int, tuple[int, ...]] = {
            index: tuple(row.tokens) for index, row in rows.items()
        }
        self._file = file
        self._header = header
        self._rows = rows
        self._fresh: set[int] = set()  # rows with tokens that are not in the file
        self._gone: set[int] = set()  # rows done since, of which the file has tokens
        self._lock = threading.Lock()  # of the three above
        self._writing = threading.Lock()  # of the file; taken before the other
        self._torn = False  # the file may not hold what it should; only a new one will do
        self._unsynced = False
        self._flushed_s = self._synced_s = file.system.clock()

    @classmethod
    def open(
        cls,
        path: Path,
        fingerprint: Fingerprint,
        input_digest: Callable[[int], str],
        input_bytes: int,
        overwrite: bool = False,
        *,
        on_new: Callable[[], None] = lambda: None,
        system: SystemCalls | None = None,
    ) -> Journal:
        """Lock the journal at `path` and recover its rows; begin it if there is none.

        An InputError if another process holds it, if it is no journal, or if it belongs to a run
        that differs in a part of `fingerprint` or in the input it knew, as `input_digest` of its
        length tells; with `overwrite` the last two are forgotten instead. `on_new` is called under
        the lock, before a journal is begun: it is the place to refuse or to empty the output. What
        it raises leaves no journal behind.
        """
        file = _LockedFile(path, system or SystemCalls())
        try:
            recovered = None if overwrite else _read(file)
            if recovered is not None:
                _check_same(path, recovered[0], fingerprint, input_digest, input_bytes)
            else:
                file.cut(0)  # before on_new: never an old journal beside a new output
                on_new()
            header = {
                _KEY: VERSION,
                "fingerprint": dict(fingerprint),
                "input": {"num_bytes": input_bytes, "sha256": input_digest(input_bytes)},
            }
            rows = {} if recovered is None else recovered[1]
            journal = cls(file, _encode(header), rows, recovered is None)
            journal._rewrite()  # drops a torn tail, and knows of an input that grew
        except BaseException:
            file.discard_if_empty()
            file.close()
            raise
        return journal

    def append(self, line_index: int, token: int) -> None:
        """One more token of a row. It counts on from `unfinished`."""
        with self._lock:
            row = self._rows.get(line_index)
            if row is None:
                row = self._rows[line_index] = _Row()
            row.tokens.append(token)
            self._fresh.add(line_index)

    def done(self, line_index: int) -> None:
        """Forget a row whose result was written; one that is not known is fine."""
        with self._lock:
            row = self._rows.pop(line_index, None)
            self._fresh.discard(line_index)
            if row is not None and row.num_written:
                self._gone.add(line_index)

    def flush(self, force: bool = False) -> None:
        """Write what is new, if the last time was `INTERVAL_S` ago or with `force`.

        Then a kill loses none of it; a power failure may cost the last `SYNC_S`. A RunError if the
        file system does not take it; what was written before stays.
        """
        if not force and self._file.system.clock() - self._flushed_s < INTERVAL_S:
            return
        if not self._writing.acquire(blocking=force):
            return  # another thread is at it
        try:
            if self._file.is_open:
                self._flush()
        finally:
            self._writing.release()

    def close(self, complete: bool) -> None:
        """Let go of the job, keeping its unfinished rows unless it is `complete`.

        The header stays, so that lines added to the input are known to be new.
        """
        with self._writing:
            if not self._file.is_open:
                return
            try:
                if complete:
                    self._file.cut(len(self._header))
                else:
                    self._flush()
                    self._sync()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close what was not closed as complete; the first error is the one to tell."""
        with contextlib.suppress(*(() if error is None else (RunError,))):
            self.close(complete=False)

    def _flush(self) -> None:
        self._flushed_s = self._file.system.clock()
        if self._torn or self._is_wasteful():
            self._rewrite()
            return
        with self._lock:
            batch = self._batch()
        if batch:
            self._torn = True
            self._file.append(_encode(batch))
            self._torn, self._unsynced = False, True
        if self._unsynced and self._flushed_s - self._synced_s >= SYNC_S:
            self._sync()

    def _batch(self) -> dict[str, Any]:
        """What the file does not know yet; from now on it does."""
        batch: dict[str, Any] = {}
        if self._gone:
            batch["done"] = sorted(self._gone)
        if self._fresh:
            batch["tokens"] = {index: _take_fresh(self._rows[index]) for index in self._fresh}
        self._gone.clear()
        self._fresh.clear()
        return batch

    def _is_wasteful(self) -> bool:
        with self._lock:
            tokens = sum(len(row.tokens) for row in self._rows.values())
            alive = len(self._header) + _TOKEN_BYTES * tokens + _ROW_BYTES * len(self._rows)
        return self._file.num_bytes > max(ROTATE_BYTES, WASTE * alive)

    def _rewrite(self) -> None:
        """Replace the file by one of what is alive."""
        self._torn = True
        with self._lock:
            for row in self._rows.values():
                row.num_written = 0
            lines = [self._header]
            lines += [
                _encode({"tokens": {index: _take_fresh(row)}}) for index, row in self._rows.items()
            ]
            self._fresh.clear()
            self._gone.clear()
        self._file.rewrite(b"".join(lines))
        self._torn = self._unsynced = False
        self._synced_s = self._file.system.clock()

    def _sync(self) -> None:
        self._file.sync()
        self._unsynced, self._synced_s = False, self._file.system.clock()


def _take_fresh(row: _Row) -> list[int]:
    fresh = row.tokens[row.num_written :].tolist()
    row.num_written = len(row.tokens)
    return fresh


def _encode(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of a whole and undamaged line."""
    checksum, text = line[:9], line[9:-1]
    if checksum != b"%08x " % zlib.crc32(text):  # also where a tear took the newline
        return None
    with contextlib.suppress(ValueError):
        record = json.loads(text)
        return record if isinstance(record, dict) else None
    return None


def _read(file: _LockedFile) -> tuple[dict[str, Any], dict[int, _Row]] | None:
    """Header and unfinished rows, up to the first damaged line; None of an empty file."""
    if not file.num_bytes:
        return None
    lines = file.lines()
    header = _decode(next(lines, b""))
    if header is None or _KEY not in header:
        raise InputError(
            f"{file.path} is not a journal that flexpipe can read, and the job needs that name. "
            "Move the file away, name another --output-file, or give --overwrite to replace it "
            "and to start again"
        )
    if header[_KEY] != VERSION:
        raise InputError(
            f"{file.path} has format {header[_KEY]}, but this flexpipe reads format {VERSION}. "
            "Finish the job with the flexpipe that began it, or give --overwrite to start again"
        )
    rows: dict[int, _Row] = {}
    for line in lines:
        record = _decode(line)
        if record is None:
            break
        for index in record.get("done", ()):
            rows.pop(index, None)
        for text, tokens in record.get("tokens", {}).items():
            rows.setdefault(int(text), _Row()).tokens.extend(tokens)
    return header, rows


def _check_same(
    path: Path,
    header: Mapping[str, Any],
    fingerprint: Fingerprint,
    input_digest: Callable[[int], str],
    input_bytes: int,
) -> None:
    """An InputError that names all that differs from the run that began the journal."""
    then: Mapping[str, str] = header["fingerprint"]
    differing = [
        f"{part} was {_shown(then.get(part))}, is {_shown(fingerprint.get(part))}"
        for part in {**then, **fingerprint}
        if then.get(part) != fingerprint.get(part)
    ]
    known = header["input"]["num_bytes"]
    if input_bytes < known:
        differing.append(f"input had {known} bytes, has {input_bytes}")
    elif input_digest(known) != header["input"]["sha256"]:
        differing.append(
            f"input changed within its first {known} bytes (lines may only be added behind them)"
        )
    if differing:
        listed = "\n".join(f"  {line}" for line in differing)
        raise InputError(
            f"cannot resume from {path}, since other tokens would come out now:\n{listed}\n"
            "Run the job as it was begun, name another --output-file, or give --overwrite to "
            "start again"
        )


def _shown(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= _SHOWN else f"{value[:12]}…"


class _LockedFile:
    """A file under a name that this process alone may write."""

    def __init__(self, path: Path, system: SystemCalls) -> None:
        self.path = path
        self.system = system
        self._spare = path.with_name(path.name + ".tmp")
        self._fd = _open_locked(path)
        self.num_bytes = os.fstat(self._fd).st_size

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def lines(self) -> Iterator[bytes]:
        """All lines, the first one cut where no header would still go on."""
        with open(self._fd, "rb", closefd=False) as file:
            yield file.readline(_MAX_HEADER_BYTES)
            yield from file

    def append(self, data: bytes) -> None:
        """Write all of `data` or none of it; one call, unless a disk is filling up."""
        try:
            self._write(self._fd, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.cut(self.num_bytes)
            raise self._failed(error) from error
        self.num_bytes += len(data)

    def rewrite(self, data: bytes) -> None:
        """Put a file of `data` in place of this one, at once and with the lock."""
        try:
            fd = os.open(self._spare, _FLAGS | os.O_TRUNC, 0o666)
            try:
                _lock(fd)  # before it has the name: it is never there unlocked
                self._write(fd, data)
                self.system.sync(fd)
                self.system.replace(self._spare, self.path)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            self._spare.unlink(missing_ok=True)
            raise self._failed(error) from error
        replaced, self._fd = self._fd, fd
        os.close(replaced)
        self.num_bytes = len(data)
        _sync_directory(self.path.absolute().parent)

    def cut(self, num_bytes: int) -> None:
        os.ftruncate(self._fd, num_bytes)
        self.num_bytes = num_bytes

    def discard_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            if os.fstat(self._fd).st_size == 0 and _is_at(self._fd, self.path):
                self.path.unlink()

    def sync(self) -> None:
        try:
            self.system.sync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, fd: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self.system.write(fd, left) :]

    def _failed(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write the journal {self.path}: {error.strerror}; what it held stays usable. "
            "Make room and run the same command again to resume"
        )


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


def _open_locked(path: Path) -> int:
    """The file now under this name, made if need be, with its lock."""
    while True:
        try:
            fd = os.open(path, _FLAGS, 0o666)
        except OSError as error:
            raise InputError(
                f"the journal {path} cannot be written: {error.strerror}; name an --output-file "
                "in a directory where it can"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InputError(f"{path} is not a file; the job's journal needs that name")
            _lock(fd)
            if _is_at(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise InputError(
                f"another process is running this job: it holds {path}. Wait until it has ended, "
                "or name another --output-file"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its owner replaced or removed it before we had the lock


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        log.warning(
            "the journal's file system cannot lock files (%s): take care to run one job at a time",
            error.strerror,
        )


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _sync_directory(directory: Path) -> None:
    """Make a new name last through a power failure, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
