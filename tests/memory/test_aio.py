"""Claims about transfers that the kernel takes together: bytes, failures, and doing without."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flexpipe.errors import RunError
from flexpipe.memory import aio
from flexpipe.memory.aio import DEPTH, Span
from flexpipe.memory.disk import ALIGN, DiskFile, Stopped, aligned_buffer

NUM_PAGES = 3 * DEPTH + 1


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[DiskFile]:
    """A file of numbered pages on a mount that transfers directly."""
    with DiskFile(tmp_path / "pages", "rw") as file:
        file.write(pages(range(NUM_PAGES)), 0)
        if not file.direct or aio.transfer(file._fd, "read", []) is None:
            pytest.skip("no asynchronous direct transfers here")
        yield file


def pages(numbers: range) -> np.ndarray:
    """Pages that hold their number all over."""
    made = aligned_buffer(len(numbers) * ALIGN)
    made.reshape(-1, ALIGN)[:] = np.array([n % 251 for n in numbers], np.uint8)[:, None]
    return made


def scattered(buffer: np.ndarray, seed: int = 0) -> list[tuple[int, int, np.ndarray]]:
    """Every second page of the file, in some order, each to or from its own place in memory."""
    order = np.random.default_rng(seed).permutation(range(0, NUM_PAGES, 2))
    room = buffer.reshape(-1, ALIGN)
    return [(int(page) * ALIGN, ALIGN, room[page]) for page in order]


def assert_read(back: np.ndarray) -> None:
    """All that `scattered` asks for is there."""
    wanted = pages(range(NUM_PAGES))
    assert np.array_equal(back.reshape(-1, ALIGN)[::2], wanted.reshape(-1, ALIGN)[::2])


def test_every_page_comes_from_its_place_and_goes_back_there(direct: DiskFile) -> None:
    back, new = aligned_buffer(NUM_PAGES * ALIGN), pages(range(7, 7 + NUM_PAGES))
    direct.read_spans(scattered(back))
    assert_read(back)
    direct.write_spans(scattered(new))
    whole = aligned_buffer(NUM_PAGES * ALIGN)
    direct.read(whole, 0)
    expected = pages(range(NUM_PAGES)).reshape(-1, ALIGN).copy()
    expected[::2] = new.reshape(-1, ALIGN)[::2]
    assert np.array_equal(whole.reshape(-1, ALIGN), expected)


def span(page: int, room: np.ndarray) -> Span:
    return Span(page * ALIGN, ALIGN, room.ctypes.data)


def test_neighbours_in_the_file_may_lie_anywhere_in_memory(direct: DiskFile) -> None:
    room = aligned_buffer(6 * ALIGN).reshape(-1, ALIGN)
    assert aio.transfer(direct._fd, "read", [span(4, room[3]), span(0, room[5]), span(1, room[1])])
    assert [int(room[page, 9]) for page in (5, 1, 3)] == [0, 1, 4]


@pytest.mark.parametrize("most", [ALIGN, 3 * ALIGN, 1 << 30])
def test_long_spans_are_cut_and_short_ones_joined_to_one_transfer(
    direct: DiskFile, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(aio, "_MOST_BYTES", most)
    back = aligned_buffer(NUM_PAGES * ALIGN)
    sizes = [1, 7, 2, NUM_PAGES - 10]
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    spans = [
        Span(first * ALIGN, size * ALIGN, back.ctypes.data + first * ALIGN)
        for first, size in zip(firsts, sizes, strict=True)
    ]
    assert aio.transfer(direct._fd, "read", spans)
    assert np.array_equal(back, pages(range(NUM_PAGES)))


@pytest.mark.parametrize("wrong", [Span(ALIGN + 1, ALIGN, 0), Span(NUM_PAGES * ALIGN, ALIGN, 0)])
def test_what_fails_or_ends_early_is_told(direct: DiskFile, wrong: Span) -> None:
    """Crooked, and behind the end of the file."""
    room = aligned_buffer(2 * ALIGN).reshape(-1, ALIGN)
    spans = [span(3, room[0]), wrong._replace(address=room[1].ctypes.data)]
    assert aio.transfer(direct._fd, "read", spans) is False


def test_what_the_kernel_does_not_finish_threads_do(
    direct: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = aio.transfer

    def half(fd: int, kind: str, spans: list[Span], check: object) -> bool:
        assert real(fd, kind, spans[::2])  # type: ignore[arg-type]
        return False

    monkeypatch.setattr(aio, "transfer", half)
    back = aligned_buffer(NUM_PAGES * ALIGN)
    direct.read_spans(scattered(back))
    assert_read(back)


def test_a_device_error_is_told_as_any_other(
    direct: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(aio, "transfer", lambda fd, kind, spans, check: False)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(RunError, match=r"cannot read .*pages: Input/output error"):
        direct.read_spans(scattered(aligned_buffer(NUM_PAGES * ALIGN)))


@pytest.mark.parametrize("refusal", ["architecture", "sandbox"])
def test_without_it_everything_works(
    direct: DiskFile, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    monkeypatch.setattr(aio, "_free", [])
    monkeypatch.setattr(aio, "_refused", False)
    if refusal == "architecture":
        monkeypatch.setattr(aio.platform, "machine", lambda: "riscv64")
    else:
        monkeypatch.setattr(aio, "_call", lambda number, *arguments: -1)
    assert aio.transfer(direct._fd, "read", [span(0, aligned_buffer(ALIGN))]) is None
    back = aligned_buffer(NUM_PAGES * ALIGN)
    direct.read_spans(scattered(back))
    assert np.array_equal(
        back.reshape(-1, ALIGN)[::2], pages(range(NUM_PAGES)).reshape(-1, ALIGN)[::2]
    )


def test_callers_at_once_have_queues_of_their_own(direct: DiskFile) -> None:
    rooms = [aligned_buffer(NUM_PAGES * ALIGN) for _ in range(4)]
    with ThreadPoolExecutor(len(rooms)) as threads:
        for _ in range(5):
            list(
                threads.map(lambda i: direct.read_spans(scattered(rooms[i], i)), range(len(rooms)))
            )
    for room in rooms:
        assert np.array_equal(room, rooms[0])


def test_a_signal_meanwhile_loses_nothing(direct: DiskFile) -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    over = threading.Event()

    def disturb() -> None:
        while not over.wait(1e-4):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for seed in range(50):
            back = aligned_buffer(NUM_PAGES * ALIGN)
            direct.read_spans(scattered(back, seed))
            assert_read(back)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert heard


def test_a_stop_flag_ends_it_between_turns(tmp_path: Path) -> None:
    stop = threading.Event()
    with DiskFile(tmp_path / "f", "rw", stop=stop) as file:
        file.write(pages(range(NUM_PAGES)), 0)
        stop.set()
        with pytest.raises(Stopped):
            file.read_spans(scattered(aligned_buffer(NUM_PAGES * ALIGN)))


def test_a_forked_child_makes_its_own_queue(direct: DiskFile) -> None:
    direct.read_spans(scattered(aligned_buffer(NUM_PAGES * ALIGN)))
    child = os.fork()
    if not child:
        try:
            back = aligned_buffer(NUM_PAGES * ALIGN).reshape(-1, ALIGN)
            whole = aio.transfer(direct._fd, "read", [span(3, back[0])])
            os._exit(0 if whole and back[0, 0] == 3 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
