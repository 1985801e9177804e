"""Products of a device, as tasks for the stopwatch: weights plain, packed, converted, compressed.

Weights are met as in a run. Those that stay come from memory: many are rotated over. On a CPU plain
ones have been brought to a slot by another lane, a layer at a time, so that caches hold what came
last, and those of another core; resident ones are packed there, if they are of any size.

Shapes as in `flexpipe.model.matmul`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from flexpipe.memory.tier import torch_dtype
from flexpipe.model.config import DTYPE_BYTES
from flexpipe.model.cost import CONVERT_ELEMENTS
from flexpipe.model.matmul import (
    PACK_BYTES,
    CompressedWeight,
    PackedWeight,
    Weight,
    convert,
    multiply,
    packs,
)
from flexpipe.model.workspace import Workspace
from flexpipe.profiling.effort import Effort
from flexpipe.profiling.numbers import CODECS, ROTATED_BYTES, Numbers
from flexpipe.profiling.stopwatch import Key, Task, TaskSource
from flexpipe.units import MIB

PAIR_ROWS = {"compute": 64, "compute_few": 8}  # of products whose pace beside others is measured
_SLICE = (CONVERT_ELEMENTS // 4096, 4096)  # of a weight, as `multiply` converts it
_HOME = (4096, 4096)  # what is loaded
_NUM_BETWEEN = 4  # weights that are met between small pieces of work
_SCRATCH_BYTES = CONVERT_ELEMENTS * 4  # a slice in the widest dtype
_LAYER_BYTES = 32 * MIB  # of weights that come to a slot together, or two of them
_NEW, _NUM_NEW = (1088, 576), 16  # a weight that nothing else has, and numbers of rows
_FOREIGN_BYTES = ROTATED_BYTES // 2  # the caches hold what is made of them as well
_AWAKE = (64, 256, 256)  # rows, in and out features of a product that keeps a team awake


class ProductTasks:
    """The tasks of one device; what a source holds, it takes when it starts."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self._effort = effort
        self._memory = Numbers(device)
        self._between: dict[str, list[Tensor]] = {}

    def sources(self, dtype: str) -> list[TaskSource]:
        """All there is to know of products in a compute dtype."""
        return [
            *(partial(self._products, dtype, shape) for shape in self._effort.weights),
            partial(self._converted, dtype),
            partial(self._loads, dtype),
        ]

    def least(self, dtype: str) -> TaskSource:
        """Products with the smallest weight."""
        return partial(self._products, dtype, self._effort.weights[0])

    def between(self, dtype: str) -> Callable[[int], object] | None:
        """What a run does between two small pieces of work; nothing on an accelerator, whose
        launches hide what is in its caches."""
        if self._memory.device.type != "cpu":
            return None
        shape = self._effort.weights[1]
        if dtype not in self._between:
            self._between[dtype] = [self._memory.drawn(shape, dtype) for _ in range(_NUM_BETWEEN)]
        x_TI, out_TO = (self._memory.drawn((PAIR_ROWS["compute"], n), dtype) for n in shape[::-1])
        return partial(_multiply_by, self._between[dtype], x_TI, out_TO, self._memory.workspace(0))

    def first_s(self, dtype: str) -> float:
        """What a CPU's product takes longer when it meets a number of rows for the first time."""
        weight_OI = self._memory.drawn(_NEW, dtype)
        room, longer = self._memory.workspace(0), []
        for rows in range(1, 2 * _NUM_NEW, 2):
            x_TI, out_TO = (self._memory.drawn((rows, n), dtype) for n in _NEW[::-1])
            took = []
            for turn in range(2):
                start = time.perf_counter()
                _multiply_by([weight_OI], x_TI, out_TO, room, turn)
                took.append(time.perf_counter() - start)
            longer.append(max(0.0, took[0] - took[1]))
        return statistics.fmean(longer[1:])  # the first one wakes the team, too

    def pair(self, dtype: str, rows: int) -> Task:
        """A product of a millisecond at most."""
        tasks = self._products(dtype, self._effort.weights[1])
        *_, task = (task for task in tasks if task.key[-1] == rows)
        return task

    def _products(self, dtype: str, shape: tuple[int, int]) -> Iterator[Task]:
        plain = [self._memory.drawn(shape, dtype) for _ in range(_count(shape, dtype))]
        elements = math.prod(shape)
        key: Key = ("matmul", dtype, elements)
        if self._memory.device.type == "cpu":
            yield from self._brought(key, plain)
        else:
            yield from self._multiplied(key, plain)
        if packs(shape, torch_dtype(dtype), self._memory.device):
            buffer = torch.empty(PACK_BYTES, dtype=torch.uint8)
            packed = [_packed(weight, buffer) for weight in plain]
            del plain
            yield from self._multiplied(("packed", dtype, elements), packed)

    def _brought(self, key: Key, homes: Sequence[Tensor]) -> Iterator[Task]:
        """Another thread copies as many weights to slots as a layer may have, before products with
        them, untimed; that the computing team may have gone to sleep meanwhile is a matter of its
        own. One weight at a time would still be in the caches: up to a third faster."""
        slots = [homes[0].clone() for _ in range(max(2, _LAYER_BYTES // homes[0].nbytes))]
        dtype = str(key[1])
        x_TI, small = (self._memory.drawn(shape, dtype) for shape in (_AWAKE[:2], _AWAKE[1:]))
        awake = torch.mm(x_TI, small)

        def bring(turn: int) -> None:
            if turn % len(slots) == 0:
                lane.submit(copy, turn).result()
            torch.mm(x_TI, small, out=awake)

        @torch.inference_mode()
        def copy(turn: int) -> None:
            for index, slot in enumerate(slots, turn):
                slot.copy_(homes[index % len(homes)])

        with ThreadPoolExecutor(1, initializer=partial(torch.set_num_threads, 1)) as lane:
            yield from self._multiplied(key, slots, before=bring)

    def _multiplied(
        self,
        key: Key,
        weights: Sequence[Weight],
        rows: Sequence[int] | None = None,
        before: Callable[[int], object] | None = None,
        room_bytes: int = 0,
    ) -> Iterator[Task]:
        """With some rows after others, as far as effort allows."""
        num_out, num_in = weights[0].shape
        dtype, room = str(key[1]).split(">")[-1], self._memory.workspace(room_bytes)
        for num_rows in rows or self._effort.rows:
            flops = 2 * num_rows * num_out * num_in
            if flops > self._effort.most_flops:
                return
            x_TI = self._memory.drawn((num_rows, num_in), dtype)
            out_TO = self._memory.drawn((num_rows, num_out), dtype)
            yield Task(
                key=(*key, num_rows),
                amount=flops,
                work=partial(_multiply_by, weights, x_TI, out_TO, room),
                before=before,
            )

    def _converted(self, dtype: str) -> Iterator[Task]:
        """Products whose weights are converted on the way: a slice is multiplied right after it was
        converted, so that the caches hold it, though those of the core that converted it. And
        conversion alone, a slice at a time into the scratch that a product would read."""
        scratch = self._memory.drawn(_SLICE, dtype)
        for source, shape, weights in self._foreign(dtype, (_SLICE, *self._effort.converted)):
            what = f"{source}>{dtype}"
            if shape == _SLICE:
                yield _conversion(
                    "widen" if source in CODECS else "convert", what, weights, scratch
                )
            else:
                key = ("converted", what, math.prod(shape))
                yield from self._multiplied(
                    key, weights, self._effort.converted_rows, room_bytes=_SCRATCH_BYTES
                )

    def _foreign(
        self, dtype: str, shapes: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[str, tuple[int, int], Sequence[Tensor] | Sequence[CompressedWeight]]]:
        """Weights of every dtype but that of computing, and compressed ones, by what they are."""
        for source in sorted(DTYPE_BYTES.keys() - {dtype}):
            numbers = self._memory.drawn_bytes(_FOREIGN_BYTES, source)
            for shape in shapes:
                whole = numbers.numel() // math.prod(shape) * math.prod(shape)
                yield source, shape, [*numbers[:whole].view(-1, *shape)]
        for bits, codec in CODECS.items():
            for shape in shapes:
                num_out, num_in = shape
                count = -(-_FOREIGN_BYTES // (num_out * codec.row_bytes(num_in)))
                rows = self._memory.compressed_rows(count * num_out, num_in, codec)
                weights = [CompressedWeight(some, codec, num_in) for some in rows.chunk(count)]
                yield bits, shape, weights

    def _loads(self, dtype: str) -> Iterator[Task]:
        """From a checkpoint's 16 bits, that are in memory already, to a weight at home."""
        stored = dtype if DTYPE_BYTES[dtype] == 2 else "bfloat16"
        chunks = [torch.empty(_HOME, dtype=torch_dtype(stored)).fill_(0.01) for _ in range(3)]
        home = self._memory.taken(_HOME, dtype)
        buffer = torch.empty(PACK_BYTES, dtype=torch.uint8)
        packed = packs(_HOME, torch_dtype(dtype), self._memory.device)

        def load(turn: int) -> None:
            chunk = chunks[turn % len(chunks)]
            if packed:
                _packed(chunk, buffer, torch_dtype(dtype))
            else:
                home.copy_(chunk)

        yield Task(key=("load", dtype), amount=math.prod(_HOME), work=load)


def _count(shape: tuple[int, int], dtype: str) -> int:
    """Weights to rotate over."""
    return -(-ROTATED_BYTES // (math.prod(shape) * DTYPE_BYTES[dtype]))


def _packed(weight: Tensor, buffer: Tensor, dtype: torch.dtype | None = None) -> PackedWeight:
    num_out, num_in = weight.shape
    return PackedWeight.make(
        (num_out, num_in),
        dtype or weight.dtype,
        buffer,
        lambda rows, plain: plain.copy_(weight[rows]),
    )


def _conversion(
    field: str, what: str, slices: Sequence[Tensor | CompressedWeight], out: Tensor
) -> Task:
    return Task(
        key=(field, what),
        amount=out.numel(),
        work=lambda turn: convert(slices[turn % len(slices)], out),
    )


def _multiply_by(
    weights: Sequence[Weight], x_TI: Tensor, out_TO: Tensor, room: Workspace, turn: int
) -> None:
    multiply(x_TI, weights[turn % len(weights)], None, out_TO, room)
