"""Bytes on disk: explicit reads and writes past the page cache, counted and interruptible.

This module decides how bytes cross the disk link: with O_DIRECT where the mount allows it (probed
once with a real transfer), else buffered, telling the page cache to forget what was used. What is
read when is the schedule's business, where it goes the caller's. Everything waits in system
calls, so the GIL is free meanwhile, and looks at a stop flag between chunks.
Invariants: a call returns only when no thread touches its buffers any more; the page cache does
not grow with the bytes moved; no memory is taken beyond the bounce ring (`BOUNCE_BYTES`).

How much is asked at once was measured on a virtio disk (256 MiB reads, median GB/s of six, taken
in turn, other work on the machine):

    chunk x in flight    1 MiB x 1   8 MiB x 1   64 MiB x 1   8 MiB x 2   4 MiB x 4   bounced
    4 KiB pages             1.23        1.28        1.31         1.33        1.34       2.1
    huge pages              2.45        2.88        2.95         2.89        2.95       2.1

Two chunks of 8 MiB come within 3 % of the best, and stay stoppable. The kind of page under the
buffer matters most: hence the huge pages of `aligned_buffer`. Scattered pieces want many in flight:
the kernel takes them together where it can (`flexpipe.memory.aio`), else eight threads do.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import mmap
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from flexpipe.closing import Closing
from flexpipe.errors import RunError
from flexpipe.memory import aio
from flexpipe.memory.offload import OffloadDirectory as OffloadDirectory
from flexpipe.plan.hardware import DISK_QUEUE_BYTES
from flexpipe.units import format_bytes

ALIGN = 4096
IN_FLIGHT = 2
CHUNK_BYTES = DISK_QUEUE_BYTES // IN_FLIGHT
BOUNCE_CHUNK_BYTES = 2 << 20
SCATTERED_IN_FLIGHT = 8
BOUNCE_BYTES = BOUNCE_CHUNK_BYTES * SCATTERED_IN_FLIGHT  # what a process holds for unaligned reads
SPAN_GAP_BYTES = 16 << 10  # reading over a smaller gap is cheaper than another request
_WORTH_A_QUEUE = 2  # pieces; a single one is as fast by itself
_HUGE = 2 << 20
_MANY_FILES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT)

Buffer: TypeAlias = memoryview | npt.NDArray[np.uint8]
_Bytes: TypeAlias = npt.NDArray[np.uint8]
_T = TypeVar("_T")

log = logging.getLogger("flexpipe")


class StopFlag(Protocol):
    """Set by whoever wants the transfers to end; a `threading.Event` is one."""

    def is_set(self) -> bool: ...


class Stopped(RunError):
    """A transfer ended early because the stop flag was set; not a failure of its own."""


def round_up(num_bytes: int, align: int = ALIGN) -> int:
    """Smallest multiple of `align` that holds `num_bytes`."""
    return -(-num_bytes // align) * align


def aligned_buffer(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes for direct transfers: resident only once touched, in huge pages where possible.

    The length is rounded up to a multiple of `ALIGN`. The memory goes back with the last view.
    """
    size = max(round_up(num_bytes), ALIGN)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory would not get huge pages
    area = mmap.mmap(-1, size if size < _HUGE else size + _HUGE, flags=flags)
    whole = np.frombuffer(area, dtype=np.uint8)
    start = -_address(whole) % _HUGE if size >= _HUGE else 0
    if size >= _HUGE:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            area.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE * _HUGE)
    return whole[start : start + size]


def physical_bytes_read() -> int | None:
    """Bytes this process has had read from devices, page cache hits left out; None if untold."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


class DiskCounter:
    """What crossed the disk link, in bytes and in seconds spent inside calls; shared by files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.read_s = 0.0
        self.bytes_written = 0
        self.write_s = 0.0

    def add_read(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self.bytes_read += num_bytes
            self.read_s += seconds

    def add_write(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self.bytes_written += num_bytes
            self.write_s += seconds


class BufferRing:
    """A fixed number of aligned buffers; whoever finds none free waits for one."""

    def __init__(self, num_buffers: int, num_bytes: int) -> None:
        self._free = [aligned_buffer(num_bytes) for _ in range(num_buffers)]
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def borrow(self, stop: StopFlag | None = None) -> Iterator[npt.NDArray[np.uint8]]:
        """One buffer of the ring, given back when the block ends."""
        with self._freed:
            while not self._free:
                _check(stop)
                self._freed.wait(timeout=0.1)
            buffer = self._free.pop()
        try:
            yield buffer
        finally:
            with self._freed:
                self._free.append(buffer)
                self._freed.notify()


@dataclass(frozen=True, slots=True)
class _Extent:
    """An aligned range of a file and the pieces of it that somebody wants."""

    offset: int
    num_bytes: int
    pieces: tuple[tuple[int, _Bytes], ...]  # (offset in the file, bytes in memory)

    @property
    def is_aligned(self) -> bool:
        """Whether the pieces lie end to end in the file and can all be transferred directly."""
        end = self.offset
        for offset, view in self.pieces:
            if offset != end or not _is_aligned(view, offset):
                return False
            end += view.nbytes
        return end == self.offset + self.num_bytes

    def hand_out(self, source: _Bytes) -> None:
        """Copy to every piece its part of the extent's bytes."""
        for offset, destination in self.pieces:
            start = offset - self.offset
            np.copyto(destination, source[start : start + destination.nbytes])


class DiskFile(Closing):
    """One file on the disk tier; reads and writes may come from several threads at once."""

    def __init__(
        self,
        path: str | Path,
        mode: Literal["r", "rw"] = "r",
        *,
        counter: DiskCounter | None = None,
        stop: StopFlag | None = None,
        direct: bool | None = None,
    ) -> None:
        """Open `path`; "rw" creates it. `direct` overrides what probing the mount would choose."""
        self.path = Path(path)
        self.counter = counter or DiskCounter()
        self._stop = stop
        flags = os.O_RDONLY if mode == "r" else os.O_RDWR | os.O_CREAT
        with _explained(self.path, "open"):
            self._fd, self.direct = _open(self.path, flags, direct)

    @property
    def size(self) -> int:
        """Length of the file now."""
        return os.fstat(self._fd).st_size

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the device that the file takes now."""
        return os.fstat(self._fd).st_blocks * 512

    def read(self, buffer: Buffer, offset: int, *, needed: int = 0) -> int:
        """Fill `buffer` from `offset`; fewer bytes come back only where the file ends.

        Offset, length and address must be multiples of `ALIGN`. That fewer than `needed` bytes are
        there is an error.
        """
        view = _as_bytes(buffer)
        assert _is_aligned(view, offset)
        self._check_range(offset, needed)
        wanted = min(view.nbytes, max(0, self.size - offset))
        start_s = time.perf_counter()
        with _explained(self.path, "read"):
            _drain(
                lambda start: self._read_exactly(
                    view[start : start + CHUNK_BYTES],
                    offset + start,
                    min(CHUNK_BYTES, wanted - start),
                ),
                range(0, wanted, CHUNK_BYTES),
                min(IN_FLIGHT, -(-wanted // CHUNK_BYTES)),
                self._stop,
            )
        self.counter.add_read(wanted, time.perf_counter() - start_s)
        return wanted

    def read_into(self, out: Buffer, offset: int) -> None:
        """Fill `out` from any offset, aligned or not; a file that ends before is an error.

        The part that lies as aligned in memory as in the file goes straight into `out`, the rest
        through the bounce ring.
        """
        view = _as_bytes(out)
        head = -offset % ALIGN
        body = max(0, view.nbytes - head) // ALIGN * ALIGN
        if body == 0 or (_address(view) + head) % ALIGN:
            self.read_spans([(offset, view.nbytes, view)])
            return
        self._check_range(offset, view.nbytes)
        edges = [(offset, head, view[:head])] if head else []
        if tail := view.nbytes - head - body:
            edges.append((offset + head + body, tail, view[head + body :]))
        if edges:
            self.read_spans(edges)
        self.read(view[head : head + body], offset + head)

    def read_spans(self, spans: Sequence[tuple[int, int, Buffer]]) -> None:
        """Read scattered (offset, num_bytes, destination) pieces of any size and alignment.

        Neighbours are read as one extent, without a bounce buffer where all of them are aligned.
        """
        pieces = _pieces(spans)
        self._check_range(*max(((at, view.nbytes) for at, view in pieces), key=sum, default=(0, 0)))
        aligned = all(_is_aligned(view, offset) for offset, view in pieces)
        num_bytes, start_s = sum(view.nbytes for _, view in pieces), time.perf_counter()
        with _explained(self.path, "read"):
            if not (aligned and self._together("read", pieces)):
                extents = _coalesce(pieces, max_gap=0 if aligned else SPAN_GAP_BYTES)
                num_bytes = sum(extent.num_bytes for extent in extents)
                if aligned or not self._bounce_together(extents):
                    in_flight = min(SCATTERED_IN_FLIGHT, len(extents))
                    _drain(self._read_extent, extents, in_flight, self._stop)
        self.counter.add_read(num_bytes, time.perf_counter() - start_s)

    def write(self, buffer: Buffer, offset: int) -> None:
        """Write all of `buffer`; offset, length and address must be multiples of `ALIGN`."""
        view = _as_bytes(buffer)
        assert _is_aligned(view, offset)
        start_s = time.perf_counter()
        with _explained(self.path, "write to", view.nbytes):
            _drain(
                lambda start: self._write_exactly(
                    view[start : start + CHUNK_BYTES], offset + start
                ),
                range(0, view.nbytes, CHUNK_BYTES),
                min(IN_FLIGHT, -(-view.nbytes // CHUNK_BYTES)),
                self._stop,
            )
        self.counter.add_write(view.nbytes, time.perf_counter() - start_s)

    def write_spans(self, spans: Sequence[tuple[int, int, Buffer]]) -> None:
        """Write scattered (offset, num_bytes, source) pieces, each aligned as `write` asks.

        Neighbours are written as one extent.
        """
        pieces = _pieces(spans)
        assert all(_is_aligned(view, offset) for offset, view in pieces)
        num_bytes, start_s = sum(view.nbytes for _, view in pieces), time.perf_counter()
        with _explained(self.path, "write to", num_bytes):
            if not self._together("write", pieces):
                extents = _coalesce(pieces, max_gap=0)
                in_flight = min(SCATTERED_IN_FLIGHT, len(extents))
                _drain(self._write_extent, extents, in_flight, self._stop)
        self.counter.add_write(num_bytes, time.perf_counter() - start_s)

    def reserve(self, num_bytes: int) -> None:
        """Make the file `num_bytes` long with its space taken, so that later writes find room."""
        missing = num_bytes - self.allocated_bytes
        check_free_bytes(self.path, missing)
        size = self.size
        with _explained(self.path, "reserve space in", num_bytes):
            try:
                os.posix_fallocate(self._fd, 0, max(num_bytes, 1))
            except OSError as error:
                if error.errno in _FULL:
                    os.ftruncate(self._fd, size)
                    raise
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(self._fd, max(size, num_bytes))  # this mount cannot reserve

    def truncate(self, num_bytes: int) -> None:
        """Cut or extend the file to `num_bytes`."""
        with _explained(self.path, "resize", num_bytes):
            os.ftruncate(self._fd, num_bytes)

    def sync(self) -> None:
        """Return when what was written would survive a power cut."""
        with _explained(self.path, "write to"):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _check_range(self, offset: int, num_bytes: int) -> None:
        if offset + num_bytes > self.size:
            raise RunError(
                f"{self.path} ends at byte {self.size}, but {num_bytes} bytes at {offset} are "
                "needed. It was changed or cut since it was opened; fetch it again."
            )

    def _together(
        self, kind: Literal["read", "write"], pieces: Sequence[tuple[int, _Bytes]]
    ) -> bool:
        """Hand aligned pieces to the kernel, many at a time; False if threads are to do it, or to
        do it again: they know what to do with a failure."""
        if not self.direct or len(pieces) < _WORTH_A_QUEUE:
            return False
        spans = [aio.Span(offset, view.nbytes, _address(view)) for offset, view in pieces]
        return bool(aio.transfer(self._fd, kind, spans, lambda: _check(self._stop)))

    def _bounce_together(self, extents: Sequence[_Extent]) -> bool:
        """The same for small extents of which only parts are wanted."""
        ends = [*accumulate(extent.num_bytes for extent in extents)]
        if not self.direct or not ends or ends[-1] > BOUNCE_CHUNK_BYTES:
            return False
        with _bounce_ring().borrow(self._stop) as buffer:
            parts = np.split(buffer[: ends[-1]], ends[:-1])
            offsets = [extent.offset for extent in extents]
            if not self._together("read", [*zip(offsets, parts, strict=True)]):
                return False
            for extent, part in zip(extents, parts, strict=True):
                extent.hand_out(part)
        return True

    def _read_extent(self, extent: _Extent) -> None:
        if extent.is_aligned:
            views = [view.data for _, view in extent.pieces]
            if os.preadv(self._fd, views, extent.offset) == extent.num_bytes:
                self._used(extent.offset, extent.num_bytes)
                return
        with _bounce_ring().borrow(self._stop) as buffer:
            wanted = min(extent.num_bytes, self.size - extent.offset)
            self._read_exactly(buffer[: round_up(wanted)], extent.offset, wanted)
            extent.hand_out(buffer)

    def _read_exactly(self, view: _Bytes, offset: int, wanted: int) -> None:
        """Fill the first `wanted` bytes; `view` is longer where the last block is short."""
        done = 0
        while done < wanted:
            _check(self._stop)
            num_bytes = os.preadv(self._fd, [view[done:].data], offset + done)
            if done + num_bytes < wanted:
                num_bytes = num_bytes // ALIGN * ALIGN  # a direct read goes on at a whole block
                if num_bytes == 0:
                    self._check_range(offset + done, wanted - done)
                    raise OSError(errno.EIO, "the device returned no bytes")
            done += num_bytes
        self._used(offset, wanted)

    def _write_exactly(self, view: _Bytes, offset: int) -> None:
        done = 0
        while done < view.nbytes:
            _check(self._stop)
            num_bytes = os.pwritev(self._fd, [view[done:].data], offset + done)
            if done + num_bytes < view.nbytes:  # mostly a full disk: the next try says so
                num_bytes = num_bytes // ALIGN * ALIGN
                if num_bytes == 0:
                    raise OSError(errno.ENOSPC, "the device took fewer bytes than given")
            done += num_bytes
        self._used(offset, view.nbytes, dirty=True)

    def _write_extent(self, extent: _Extent) -> None:
        assert extent.is_aligned, "spans to write must not overlap"
        views = [view.data for _, view in extent.pieces]
        if os.pwritev(self._fd, views, extent.offset) == extent.num_bytes:
            self._used(extent.offset, extent.num_bytes, dirty=True)
            return
        for offset, view in extent.pieces:
            self._write_exactly(view, offset)

    def _used(self, offset: int, num_bytes: int, *, dirty: bool = False) -> None:
        """Drop a range from the page cache, where it went through that."""
        if self.direct:
            return
        if dirty:
            os.fdatasync(self._fd)  # dirty pages cannot be dropped
        first = offset // _HUGE * _HUGE  # a page of any size is dropped whole or not at all
        last = round_up(offset + num_bytes, _HUGE)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, first, last - first, os.POSIX_FADV_DONTNEED)


class DiskReader(Closing):
    """The files of a checkpoint, opened as they are needed, under one counter and stop flag."""

    def __init__(self, *, counter: DiskCounter | None = None, stop: StopFlag | None = None) -> None:
        self.counter = counter or DiskCounter()
        self._stop = stop
        self._files: dict[Path, DiskFile] = {}
        self._lock = threading.Lock()
        _allow_files()

    def file(self, path: Path) -> DiskFile:
        """The open file at `path`."""
        with self._lock:
            if path not in self._files:
                self._files[path] = DiskFile(path, counter=self.counter, stop=self._stop)
            return self._files[path]

    def close(self) -> None:
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()


def _allow_files() -> None:
    """Every shard, and every compressed matrix, is a file that stays open; a shell's usual limit
    is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(_MANY_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_free_bytes(path: Path, num_bytes: int) -> None:
    """Raise RunError unless the mount of `path` has `num_bytes` to spare."""
    free = _free_bytes(path)
    if num_bytes > free:
        raise _full(path, num_bytes, free)


def _drain(
    work: Callable[[_T], None], pieces: Iterable[_T], in_flight: int, stop: StopFlag | None
) -> None:
    """Do `work` for every piece, `in_flight` at a time, this thread among them.

    Helpers only speed things up: if all are busy, this thread does everything. The first failure
    ends the rest, and nobody is still at work when this returns.
    """
    waiting = iter(pieces)
    turn = threading.Lock()
    failed = threading.Event()

    def serve() -> None:
        while not failed.is_set():
            with turn:
                piece = next(waiting, _END)
            if isinstance(piece, _End):
                return
            try:
                _check(stop)
                work(piece)
            except BaseException:
                failed.set()
                raise

    if in_flight <= 1:
        serve()
        return
    helpers = [_helpers().submit(serve) for _ in range(in_flight - 1)]
    try:
        serve()
    finally:
        errors = [helper.exception() for helper in helpers if not helper.cancel()]
    for error in errors:
        if error is not None:
            raise error


class _End:
    """What `next` returns when no piece is left."""


_END = _End()


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(SCATTERED_IN_FLIGHT + IN_FLIGHT, thread_name_prefix="disk")


@functools.cache
def _bounce_ring() -> BufferRing:
    return BufferRing(SCATTERED_IN_FLIGHT, BOUNCE_CHUNK_BYTES)


def _pieces(spans: Iterable[tuple[int, int, Buffer]]) -> list[tuple[int, _Bytes]]:
    """The spans that have bytes, as (offset in the file, bytes in memory)."""
    pieces = [(offset, num_bytes, _as_bytes(buffer)) for offset, num_bytes, buffer in spans]
    assert all(view.nbytes == num_bytes for _, num_bytes, view in pieces), "a span of other length"
    return [(offset, view) for offset, num_bytes, view in pieces if num_bytes]


def _coalesce(pieces: Iterable[tuple[int, _Bytes]], max_gap: int = SPAN_GAP_BYTES) -> list[_Extent]:
    """Aligned extents, none longer than a bounce buffer, that cover all pieces in file order."""
    extents: list[_Extent] = []
    gathered: list[tuple[int, _Bytes]] = []
    start = end = 0

    def finish() -> None:
        if gathered:
            extents.append(_Extent(start, end - start, tuple(gathered)))
            gathered.clear()

    for offset, view in sorted(_cut(pieces), key=lambda piece: piece[0]):
        low, high = offset // ALIGN * ALIGN, round_up(offset + view.nbytes)
        if not gathered or low > end + max_gap or high > start + BOUNCE_CHUNK_BYTES:
            finish()
            start, end = low, high
        gathered.append((offset, view))
        end = max(end, high)
    finish()
    return extents


def _cut(pieces: Iterable[tuple[int, _Bytes]]) -> Iterator[tuple[int, _Bytes]]:
    """The same pieces, cut where a bounce buffer ends."""
    for offset, view in pieces:
        done = 0
        while done < view.nbytes:
            room = BOUNCE_CHUNK_BYTES - (offset + done) % ALIGN
            yield offset + done, view[done : done + room]
            done += room


def _as_bytes(buffer: Buffer) -> _Bytes:
    if isinstance(buffer, np.ndarray):
        assert buffer.flags.c_contiguous and buffer.dtype == np.uint8
        return buffer.reshape(-1)
    return np.frombuffer(buffer, dtype=np.uint8)


def _is_aligned(view: _Bytes, offset: int) -> bool:
    return not (offset % ALIGN or view.nbytes % ALIGN or _address(view) % ALIGN)


def _address(view: _Bytes) -> int:
    address: int = view.__array_interface__["data"][0]
    return address


def _check(stop: StopFlag | None) -> None:
    if stop is not None and stop.is_set():
        raise Stopped("the transfer was stopped before it was complete")


# -- direct or buffered ---------------------------------------------------------------------------

_mounts: dict[tuple[int, bool], bool] = {}  # (device number, for writing) -> direct works there
_told: set[int] = set()
_mounts_lock = threading.Lock()


def _open(path: Path, flags: int, direct: bool | None) -> tuple[int, bool]:
    """File descriptor of `path` and whether it transfers directly."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    if direct is None:
        direct = _direct_works(path, os.fstat(fd).st_dev, writing=bool(flags & os.O_RDWR))
    if direct:
        try:
            os.close(fd)
            return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT), True
        except OSError:
            fd = os.open(path, flags | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # pages read ahead would outlive their use
    return fd, False


def _direct_works(path: Path, device: int, *, writing: bool) -> bool:
    with _mounts_lock:
        key = (device, writing)
        if key not in _mounts:
            _mounts[key] = writes_directly(path.parent) if writing else _probe_read(path)
        if not _mounts[key] and device not in _told:
            _told.add(device)
            log.warning(
                "no direct disk access on the file system of %s: transfers are buffered and their "
                "pages dropped after use, which is slower",
                path.parent,
            )
        return _mounts[key]


def writes_directly(folder: Path) -> bool:
    """Whether a block written directly into `folder` can be read back directly."""
    block, back = aligned_buffer(ALIGN), aligned_buffer(ALIGN)
    block[:] = np.arange(ALIGN) % 251
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".direct-probe-") as file:
            fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            try:
                written = os.pwritev(fd, [block.data], 0)
                return written == os.preadv(fd, [back.data], 0) and np.array_equal(block, back)
            finally:
                os.close(fd)
    except OSError:
        return False


def _probe_read(path: Path) -> bool:
    """Whether the first block of `path` reads the same directly and buffered."""
    block = aligned_buffer(ALIGN)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            num_bytes = os.preadv(fd, [block.data], 0)
        finally:
            os.close(fd)
        with path.open("rb") as file:
            return num_bytes > 0 and file.read(ALIGN) == block[:num_bytes].tobytes()
    except OSError:
        return False


# -- what went wrong ------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(path: Path, doing: str, wanted: int = 0) -> Iterator[None]:
    """Turn the system's errors into ones that name the file, and the bytes when space ran out."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, wanted, _free_bytes(path)) from error
        raise RunError(f"cannot {doing} {path}: {error.strerror or error}") from error


def _full(path: Path, wanted: int, free: int) -> RunError:
    return RunError(
        f"the disk of {path} is full: {format_bytes(wanted)} wanted, {format_bytes(free)} free. "
        "Free some space, choose another directory, or lower the shares on disk."
    )


def _free_bytes(path: Path) -> int:
    folder = path if path.is_dir() else path.parent
    try:
        stat = os.statvfs(folder)
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize
