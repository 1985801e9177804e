"""Claims about direct transfers, their counting, their errors and the offload directory."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexpipe.errors import RunError
from flexpipe.memory import aio, disk
from flexpipe.memory.disk import (
    ALIGN,
    BufferRing,
    DiskCounter,
    DiskFile,
    DiskReader,
    Stopped,
    aligned_buffer,
    physical_bytes_read,
)

MIB = 1 << 20


@pytest.fixture
def fresh_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing starts anew, as in a new process."""
    monkeypatch.setattr(disk, "_mounts", {})
    monkeypatch.setattr(disk, "_told", set())


@pytest.fixture
def no_direct(fresh_mounts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that refuses O_DIRECT, as some network and overlay file systems do."""
    real = os.open

    def refuse(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)


def written(path: Path, num_bytes: int, seed: int = 0) -> bytes:
    data = np.random.default_rng(seed).bytes(num_bytes)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return data


def cached_share(path: Path) -> float:
    """Share of the file that lies in the page cache."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as area:
        pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        first = ctypes.c_char.from_buffer(area)
        done = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        assert done == 0
        del first
    return sum(page & 1 for page in pages) / len(pages)


def on_disk(path: Path) -> bool:
    """Whether the temporary directory is a real disk, where direct transfers reach a device."""
    with DiskFile(path) as file:
        return file.direct and os.major(os.stat(path).st_dev) != 0


@pytest.mark.parametrize("num_bytes", [1, ALIGN, 2 * MIB, 5 * MIB + 3])
def test_buffers_are_aligned_zeroed_and_rounded_up(num_bytes: int) -> None:
    buffer = aligned_buffer(num_bytes)
    assert buffer.nbytes == -(-num_bytes // ALIGN) * ALIGN
    assert disk._address(buffer) % ALIGN == 0
    assert not buffer.any()


def test_big_buffers_lie_in_memory_only_once_touched() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    buffer = aligned_buffer(256 * MIB)
    assert resident() - before < 16 * MIB
    buffer[: 64 * MIB] = 1
    assert 60 * MIB < resident() - before < 96 * MIB


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, ALIGN, 3 * ALIGN + 5, 17 * MIB + 1234])
def test_read_returns_the_files_bytes_and_ends_with_it(
    tmp_path: Path, size: int, direct: bool
) -> None:
    data = written(tmp_path / "f", size)
    buffer = aligned_buffer(size + ALIGN)
    with DiskFile(tmp_path / "f", direct=direct) as file:
        assert file.read(buffer, 0) == size
        assert buffer[:size].tobytes() == data
        assert file.counter.bytes_read == size
        if size > 2 * ALIGN:
            assert file.read(buffer[:ALIGN], ALIGN) == ALIGN
            assert buffer[:ALIGN].tobytes() == data[ALIGN : 2 * ALIGN]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 100), (8, 9 * MIB), (4095, 2), (7777, 3)])
@pytest.mark.parametrize("shift", [0, 8, 4095])
def test_read_into_takes_any_offset_length_and_address(
    tmp_path: Path, offset: int, num_bytes: int, shift: int, direct: bool
) -> None:
    data = written(tmp_path / "f", 10 * MIB + 1)
    out = aligned_buffer(num_bytes + shift + 1)
    with DiskFile(tmp_path / "f", direct=direct) as file:
        file.read_into(out[shift : shift + num_bytes], offset)
    assert out[shift : shift + num_bytes].tobytes() == data[offset : offset + num_bytes]
    assert not out[:shift].any()
    assert not out[shift + num_bytes :].any()


def test_read_spans_fills_scattered_overlapping_and_long_pieces(tmp_path: Path) -> None:
    data = written(tmp_path / "f", 12 * MIB + 77)
    rng = np.random.default_rng(1)
    places = [(int(offset), 200) for offset in rng.integers(0, len(data) - 200, size=500)]
    places += [(3, 6 * MIB), (0, 0), (len(data) - 1, 1), (len(data) - 5, 5), (3, 10)]
    outs = [memoryview(bytearray(num_bytes)) for _, num_bytes in places]
    with DiskFile(tmp_path / "f") as file:
        file.read_spans([(*place, out) for place, out in zip(places, outs, strict=True)])
    for (offset, num_bytes), out in zip(places, outs, strict=True):
        assert out == data[offset : offset + num_bytes]


@pytest.mark.parametrize("last", [0, 1])  # one that ends within the file's last block
def test_small_unaligned_pieces_go_to_the_kernel_together(
    tmp_path: Path, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path / "f", MIB + 77)
    drawn = np.random.default_rng(2).integers(0, MIB - 3000, size=60)
    places = [*map(int, drawn), *[len(data) - 3000] * last]
    outs = [memoryview(bytearray(3000)) for _ in places]
    by_threads: list[object] = []
    drain = disk._drain
    monkeypatch.setattr(disk, "_drain", lambda *how: (by_threads.append(how), drain(*how)))
    with DiskFile(tmp_path / "f") as file:
        if not file.direct or aio.transfer(file._fd, "read", []) is None:
            pytest.skip("no asynchronous direct reads here")
        file.read_spans([(at, 3000, out) for at, out in zip(places, outs, strict=True)])
    assert [bytes(out) for out in outs] == [data[at : at + 3000] for at in places]
    assert len(by_threads) == last  # which the kernel cannot read whole blocks of


def test_neighbouring_spans_are_read_as_one_extent() -> None:
    row = np.zeros(512, dtype=np.uint8)
    rows = [(index * 512, row) for index in (3, 1, 2, 0)]
    extents = disk._coalesce([*rows, (MIB, row)], max_gap=0)
    assert [(extent.offset, extent.num_bytes) for extent in extents] == [(0, ALIGN), (MIB, ALIGN)]


@pytest.mark.parametrize("direct", [True, False])
def test_spans_of_pages_go_straight_between_file_and_memory(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_bounce_ring", lambda: pytest.fail("went through a bounce buffer"))
    source, back = aligned_buffer(4 * MIB), aligned_buffer(4 * MIB)
    source[:] = np.frombuffer(np.random.default_rng(3).bytes(4 * MIB), dtype=np.uint8)
    pages = [slice(start, start + 4 * ALIGN) for start in range(0, 4 * MIB, 4 * ALIGN)]
    order = np.random.default_rng(4).permutation(len(pages) + 8)[: len(pages)]
    places = [int(place) * 4 * ALIGN for place in order]
    with DiskFile(tmp_path / "f", "rw", direct=direct) as file:
        file.write_spans([(at, 4 * ALIGN, source[p]) for at, p in zip(places, pages, strict=True)])
        file.read_spans([(at, 4 * ALIGN, back[p]) for at, p in zip(places, pages, strict=True)])
        assert file.counter.bytes_read == file.counter.bytes_written == 4 * MIB
    assert np.array_equal(source, back)


def test_spans_that_transfer_short_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, writes = os.preadv, os.pwritev
    monkeypatch.setattr(aio, "transfer", lambda fd, kind, spans, check: None)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: reads(fd, views[:1], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: writes(fd, views[:1], at))
    source, back = aligned_buffer(4 * ALIGN), aligned_buffer(4 * ALIGN)
    source[:] = 5
    with DiskFile(tmp_path / "f", "rw") as file:
        spans = [(start, ALIGN, start) for start in range(0, 4 * ALIGN, ALIGN)]
        file.write_spans([(at, size, source[start : start + size]) for at, size, start in spans])
        file.read_spans([(at, size, back[start : start + size]) for at, size, start in spans])
    assert np.array_equal(source, back)


def test_a_file_that_ends_too_early_is_named_with_its_size(tmp_path: Path) -> None:
    written(tmp_path / "f", 5000)
    with DiskFile(tmp_path / "f") as file, pytest.raises(RunError, match=r"f ends at byte 5000"):
        file.read_into(memoryview(bytearray(10)), 4995)


def test_unaligned_reads_are_a_bug_of_the_caller(tmp_path: Path) -> None:
    written(tmp_path / "f", 3 * ALIGN)
    buffer = aligned_buffer(2 * ALIGN)
    with DiskFile(tmp_path / "f") as file:
        for view, offset in ((buffer, 1), (buffer[1:], 0), (buffer[:100], 0)):
            with pytest.raises(AssertionError):
                file.read(view, offset)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(tmp_path / "f", 5 * ALIGN)
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, offset: real(fd, [views[0][: ALIGN + 512]], offset)
    )
    buffer = aligned_buffer(5 * ALIGN)
    with DiskFile(tmp_path / "f", direct=True) as file:
        assert file.read(buffer, 0) == 5 * ALIGN
    assert buffer.tobytes() == data


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, direct: bool) -> None:
    counter = DiskCounter()
    buffer, back = aligned_buffer(17 * MIB), aligned_buffer(17 * MIB)
    buffer[:] = np.frombuffer(np.random.default_rng(2).bytes(17 * MIB), dtype=np.uint8)
    with DiskFile(tmp_path / "f", "rw", counter=counter, direct=direct) as file:
        file.reserve(20 * MIB)
        assert file.size == 20 * MIB
        file.write(buffer, 2 * MIB)
        file.sync()
        assert file.read(back, 2 * MIB) == 17 * MIB
        file.truncate(100)
        assert file.size == 100
    assert np.array_equal(buffer, back)
    assert counter.bytes_written == counter.bytes_read == 17 * MIB
    assert counter.write_s > 0 and counter.read_s > 0


def test_the_page_cache_stays_flat_whichever_way_is_read(tmp_path: Path) -> None:
    written(tmp_path / "f", 64 * MIB)
    if not on_disk(tmp_path / "f"):
        pytest.skip("the temporary directory is in memory")
    buffer = aligned_buffer(16 * MIB)
    for direct in (True, False):
        with DiskFile(tmp_path / "f", direct=direct) as file:
            for offset in range(0, 64 * MIB, 16 * MIB):
                file.read(buffer, offset)
                file.read_into(buffer[: 2 * MIB], offset + 8)
        assert cached_share(tmp_path / "f") < 0.05, f"direct={direct}"


@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_stays_flat_while_writing(tmp_path: Path, direct: bool) -> None:
    buffer = aligned_buffer(16 * MIB)
    buffer[:] = 7
    with DiskFile(tmp_path / "f", "rw", direct=direct) as file:
        for offset in range(0, 64 * MIB, 16 * MIB):
            file.write(buffer, offset)
    if not on_disk(tmp_path / "f"):
        pytest.skip("the temporary directory is in memory")
    assert cached_share(tmp_path / "f") < 0.05


def test_direct_reads_reach_the_device_each_time(tmp_path: Path) -> None:
    written(tmp_path / "f", 32 * MIB)
    if not on_disk(tmp_path / "f") or physical_bytes_read() is None:
        pytest.skip("no device below the temporary directory, or no /proc/self/io")
    buffer = aligned_buffer(32 * MIB)
    before = physical_bytes_read()
    with DiskFile(tmp_path / "f") as file:
        for _ in range(3):
            file.read(buffer, 0)
    after = physical_bytes_read()
    assert before is not None and after is not None
    assert after - before >= 0.9 * 3 * 32 * MIB


def test_a_mount_without_direct_access_is_told_once_and_read_buffered(
    tmp_path: Path, no_direct: None, caplog: pytest.LogCaptureFixture
) -> None:
    data = written(tmp_path / "f", 3 * ALIGN)
    buffer = aligned_buffer(3 * ALIGN)
    with caplog.at_level(logging.INFO, logger="flexpipe"):
        for _ in range(3):
            with DiskFile(tmp_path / "f") as file:
                assert not file.direct
                file.read(buffer, 0)
                assert buffer.tobytes() == data
        with DiskFile(tmp_path / "g", "rw") as file:
            assert not file.direct
    assert len(caplog.records) == 1
    assert str(tmp_path) in caplog.text


def test_a_mount_is_probed_once_with_a_real_transfer(
    tmp_path: Path, fresh_mounts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "f", ALIGN)
    probes: list[Path] = []
    real = disk._probe_read

    def counted(path: Path) -> bool:
        probes.append(path)
        return real(path)

    monkeypatch.setattr(disk, "_probe_read", counted)
    for _ in range(3):
        DiskFile(tmp_path / "f").close()
    assert probes == [tmp_path / "f"]


def test_a_full_disk_is_one_error_with_path_wanted_and_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, views: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with DiskFile(tmp_path / "f", "rw") as file:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(RunError, match=r"f is full: 32.* MiB wanted, .* free"):
            file.write(aligned_buffer(32 * MIB), 0)


def test_a_write_the_device_cuts_short_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: 100)
    with DiskFile(tmp_path / "f", "rw") as file, pytest.raises(RunError, match="is full"):
        file.write(aligned_buffer(ALIGN), 0)


def test_reserving_more_than_is_free_takes_nothing(tmp_path: Path) -> None:
    with DiskFile(tmp_path / "f", "rw") as file:
        with pytest.raises(RunError, match=r"is full: .* wanted, .* free"):
            file.reserve(1 << 60)
        assert file.size == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_reservation_that_fails_midway_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(fd: int, offset: int, num_bytes: int) -> None:
        os.ftruncate(fd, num_bytes // 2)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with DiskFile(tmp_path / "f", "rw") as file:
        with pytest.raises(RunError, match="is full"):
            file.reserve(MIB)
        assert file.size == 0


def test_a_mount_that_cannot_reserve_still_gets_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(fd: int, offset: int, num_bytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with DiskFile(tmp_path / "f", "rw") as file:
        file.reserve(MIB)
        assert file.size == MIB


def test_device_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "f", 32 * MIB)

    def broken(fd: int, views: object, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with DiskFile(tmp_path / "f") as file:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(RunError, match=r"cannot read .*f: Input/output error"):
            file.read(aligned_buffer(32 * MIB), 0)
    with pytest.raises(RunError, match="cannot open"):
        DiskFile(tmp_path / "absent")


def test_a_stop_flag_ends_transfers_between_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "f", 64 * MIB)
    stop = threading.Event()
    chunks: list[int] = []
    real = os.preadv

    def counting(fd: int, views: list[memoryview], offset: int) -> int:
        chunks.append(offset)
        stop.set()
        return real(fd, views, offset)

    with DiskFile(tmp_path / "f", "rw", stop=stop) as file:
        monkeypatch.setattr(os, "preadv", counting)
        with pytest.raises(Stopped):
            file.read(aligned_buffer(64 * MIB), 0)
        assert len(chunks) <= disk.IN_FLIGHT
        with pytest.raises(Stopped):
            file.write(aligned_buffer(ALIGN), 0)


def test_waiting_for_a_buffer_of_a_ring_ends_when_one_is_free_or_the_run_stops() -> None:
    ring, stop = BufferRing(1, ALIGN), threading.Event()
    got = threading.Event()

    def second() -> None:
        with ring.borrow():
            got.set()

    with ring.borrow() as buffer:
        assert buffer.nbytes == ALIGN
        waiter = threading.Thread(target=second)
        waiter.start()
        assert not got.wait(0.05)
        stop.set()
        with pytest.raises(Stopped), ring.borrow(stop):
            pass
    waiter.join(5)
    assert got.is_set()


def test_a_reader_may_keep_more_files_open_than_a_shell_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(1 << 16, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, wanted), hard))
        DiskReader().close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == wanted
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_threads_may_share_one_file(tmp_path: Path) -> None:
    data = written(tmp_path / "f", 24 * MIB)
    wrong: list[int] = []

    def read(file: DiskFile, offset: int) -> None:
        out = memoryview(bytearray(5 * MIB))
        file.read_into(out, offset)
        if out != data[offset : offset + 5 * MIB]:
            wrong.append(offset)

    with DiskReader() as reader:
        file = reader.file(tmp_path / "f")
        assert reader.file(tmp_path / "f") is file
        threads = [threading.Thread(target=read, args=(file, n * MIB + n)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reader.counter.bytes_read >= 12 * 5 * MIB
    assert not wrong


@pytest.fixture(autouse=True)
def _no_leaked_descriptors() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before + 1
