"""What links move, as tasks for the stopwatch: copies between memories, a file on the disk.

Copies go as `Device.copy` sends them: page-locked on accelerators; on a CPU they are what a lane of
the emulated accelerator does, one thread's memcpy between buffers that no cache holds. The disk is
measured through `DiskFile`, on a file in the offload directory.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexpipe.memory.disk import ALIGN, CHUNK_BYTES, DiskFile, aligned_buffer
from flexpipe.memory.tier import TierMemory
from flexpipe.plan.hardware import free_disk
from flexpipe.profiling.effort import Effort
from flexpipe.profiling.stopwatch import Task
from flexpipe.runtime.device import Device
from flexpipe.units import MIB

IN_FLIGHT = (1, 2, 4, 8)
DETAIL_BYTES = (64 * 1024, MIB, CHUNK_BYTES)
_TENSOR_BYTES = 4 * MIB
_SPARED = 4  # a file takes at most this part of the free space
_PAGE, _SCATTERED = 4096, 64  # bytes of the least transfer, and how many of them go together


def copy_tasks(device: Device, effort: Effort, *, pin: bool = True) -> Generator[Task, None, None]:
    """Host to device and back; pageable ones are for people."""
    memory = TierMemory(device.torch_device, pin=pin)
    with contextlib.closing(memory):
        held = max(effort.held_bytes, effort.copies[-1])
        on_host = memory.take_on_host(held, "measuring")
        on_device = memory.take_on_device(held, "measuring")
        for way, target, source in (("h2d", on_device, on_host), ("d2h", on_host, on_device)):
            key = ("links", way) if pin else ("details", f"{way}_pageable")
            for num_bytes in effort.copies:
                targets, sources = target.view(-1, num_bytes), source.view(-1, num_bytes)

                def copy(turn: int, targets: Any = targets, sources: Any = sources) -> None:
                    at = turn % len(sources)
                    device.copy(targets[at], sources[at])

                yield Task(key=(*key, num_bytes), amount=num_bytes, work=copy)


class DiskTasks:
    """The tasks of one file, which lies in `directory` until this is closed."""

    def __init__(self, directory: Path, effort: Effort) -> None:
        room = free_disk(directory) // _SPARED
        self.num_bytes = max(CHUNK_BYTES, min(effort.file_bytes, room) // CHUNK_BYTES * CHUNK_BYTES)
        self.path = directory / "measure.bin"
        self._file = DiskFile(self.path, "rw")
        self._buffer = aligned_buffer(max(CHUNK_BYTES * IN_FLIGHT[-1], effort.transfers[-1]))
        self._buffer[:] = np.resize(
            np.random.default_rng(0).integers(0, 256, MIB + 1, np.uint8), self._buffer.shape
        )  # a disk may be quick to store what repeats

    def empty(self) -> None:
        """Take the file's blocks without a word written to them, as a run takes its own."""
        self._file.truncate(0)
        self._file.reserve(self.num_bytes)

    def fill(self) -> None:
        """Write every block: those never written cost nothing to read."""
        for offset in range(0, self.num_bytes, CHUNK_BYTES):
            self._file.write(self._buffer[:CHUNK_BYTES], offset)
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def moves(self, sizes: Sequence[int]) -> Iterator[Task]:
        """Writes to blocks that were never written, as those of a KV cache are, then reads."""
        sizes = [size for size in sizes if size <= self.num_bytes]
        for num_bytes in sizes:
            self.empty()
            yield self._one("disk_write", self._file.write, num_bytes)
        self.fill()
        for num_bytes in sizes:
            yield self._one("disk_read", self._file.read, num_bytes)

    def _one(self, name: str, move: Any, num_bytes: int) -> Task:
        work = self._anywhere(move, self._buffer, num_bytes)
        return Task(key=("links", name, num_bytes), amount=num_bytes, work=work)

    def loads(self) -> Iterator[Task]:
        """A checkpoint's tensor, which begins anywhere and so goes through a bounce buffer."""

        def read(view: npt.NDArray[np.uint8], offset: int) -> None:
            self._file.read_into(view[:-ALIGN], offset + ALIGN // 2)

        work = self._anywhere(read, self._buffer, _TENSOR_BYTES)
        yield Task(key=("load", "read"), amount=_TENSOR_BYTES - ALIGN, work=work)

    def latencies(self) -> Iterator[Task]:
        """The least that a read or a write can be, alone and as one of many that go together."""
        pages = self._buffer[: _SCATTERED * 2 * _PAGE].reshape(_SCATTERED, -1)[:, :_PAGE]
        places = range(0, self.num_bytes - _PAGE + 1, 2 * _PAGE)  # no two of them are neighbours
        draw = random.Random(0)

        def spans(turn: int, move: Any) -> None:
            move(
                [
                    (at, _PAGE, page)
                    for at, page in zip(draw.sample(places, len(pages)), pages, strict=True)
                ]
            )

        for kind in ("read", "write"):
            alone, together = getattr(self._file, kind), getattr(self._file, f"{kind}_spans")
            work = self._anywhere(alone, self._buffer, _PAGE)
            yield Task(key=("latency", kind), amount=1, work=work)
            work = partial(spans, move=together)
            yield Task(key=("latency", f"{kind}_span"), amount=_SCATTERED, work=work)

    def details(self) -> Iterator[Task]:
        """Direct and buffered, with some in flight at once."""
        for direct in (True, False):
            with DiskFile(self.path, "rw", direct=direct) as file:
                for count in IN_FLIGHT:
                    with ThreadPoolExecutor(count, "flexpipe-measure") as threads:
                        yield from self._in_flight(file, threads, count)

    def _in_flight(self, file: DiskFile, threads: ThreadPoolExecutor, count: int) -> Iterator[Task]:
        way = "direct" if file.direct else "buffered"
        for num_bytes in DETAIL_BYTES:
            buffers = [self._buffer[i * num_bytes :][:num_bytes] for i in range(count)]
            for name, move in (("read", file.read), ("write", file.write)):
                works = [self._anywhere(move, part, num_bytes, i) for i, part in enumerate(buffers)]

                def work(turn: int, works: Any = works) -> None:
                    list(threads.map(lambda one: one(turn), works))

                yield Task(
                    key=("details", f"disk_{name}_{way}_x{count}", num_bytes),
                    amount=num_bytes * count,
                    work=work,
                )

    def _anywhere(
        self, move: Any, buffer: npt.NDArray[np.uint8], num_bytes: int, seed: int = 0
    ) -> partial[None]:
        """`move` at places of the file in an order that no device foresees, from or to one part of
        the buffer after another, as no cache holds the slots of a run."""
        places = list(range(0, self.num_bytes - num_bytes + 1, num_bytes))
        random.Random(seed).shuffle(places)
        parts = buffer[: len(buffer) // num_bytes * num_bytes].reshape(-1, num_bytes)
        return partial(_move, move, parts, places)


def _move(move: Any, parts: npt.NDArray[np.uint8], places: Sequence[int], turn: int) -> None:
    move(parts[turn % len(parts)], places[turn % len(places)])
