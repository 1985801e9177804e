"""How fast do compressed weights widen, in which lane, and below which disk do they pay?

First the rate of widening alone, in GB/s of numbers written: our kernel into a slice that stays in
the caches and into a whole matrix; torch's shift, mask and scale in place into buffers that last; a
look-up by index_select. Then a product whose weight is widened slice by slice in front of
it (one lane) against a whole matrix widened by a second thread while the one before is multiplied
(a lane of its own); both have the same cores. From that the break-even: a matrix read from disk at
D bytes/s while the one before is computed takes the larger of both times, so compression gains as
long as D < (bytes uncompressed) / (seconds of widening and product).

    PYTHONPATH=. python benchmarks/decompress.py [--json FILE] [--rounds 7] [--set-mb 400]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.trial import machine, markdown
from flexpipe.kernels.codec import compress, widen
from flexpipe.memory.disk import aligned_buffer
from flexpipe.model.cost import CONVERT_ELEMENTS
from flexpipe.model.matmul import CompressedWeight, Weight, multiply
from flexpipe.model.workspace import Workspace
from flexpipe.plan.codec import Codec

SHAPE = 5632, 2048  # of one matrix, out x in
ROWS = 32, 128, 256
DTYPES = torch.float32, torch.bfloat16
CODECS = Codec(bits=4), Codec(bits=8)

Run = Callable[[], object]


def compressed_set(codec: Codec, set_bytes: int) -> list[CompressedWeight]:
    """Weights that together are larger than the caches."""
    num_out, num_in = SHAPE
    count = max(2, set_bytes // (num_out * codec.row_bytes(num_in)))
    rows = torch.empty(num_out, codec.row_bytes(num_in), dtype=torch.uint8)
    compress(torch.randn(SHAPE) / num_in**0.5, codec, rows)
    return [CompressedWeight(rows.clone(), codec, num_in) for _ in range(count)]


def plain_set(dtype: torch.dtype, set_bytes: int) -> list[Tensor]:
    weight = (torch.randn(SHAPE) / SHAPE[1] ** 0.5).to(dtype)
    return [weight.clone() for _ in range(max(2, set_bytes // weight.nbytes))]


def seconds(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """The median of each, taken in turn; the first round makes kernels."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


# -- widening alone -------------------------------------------------------------------------------


def wideners(weights: list[CompressedWeight], dtype: torch.dtype) -> dict[str, Run]:
    """name -> widen the next whole weight."""
    turn = cycle(weights)
    num_out, num_in = SHAPE
    step = CONVERT_ELEMENTS // num_in
    slice_OI = torch.empty(step, num_in, dtype=dtype)
    whole_OI = torch.empty(SHAPE, dtype=dtype)

    def in_slices() -> None:
        weight = next(turn)
        for first in range(0, num_out, step):
            rows = weight.rows_OB[first : first + step]
            widen(rows, weight.codec, slice_OI[: len(rows)])

    def whole() -> None:
        weight = next(turn)
        widen(weight.rows_OB, weight.codec, whole_OI)

    torch_whole = _TorchOperations(weights[0].codec, dtype)
    by_table = _LookUp(weights[0].codec, dtype)
    return {
        "kernel, slices": in_slices,
        "kernel, whole": whole,
        "torch in place": lambda: torch_whole(next(turn).rows_OB, whole_OI),
        "look-up": lambda: by_table(next(turn).rows_OB, whole_OI),
    }


class _TorchOperations:
    """Shift and mask into one buffer of bytes, scale and shift into the target."""

    def __init__(self, codec: Codec, dtype: torch.dtype) -> None:
        num_out, num_in = SHAPE
        self._codec, self._groups = codec, num_in // codec.group_size
        self._codes = torch.empty(num_out, self._groups, codec.group_size, dtype=torch.uint8)
        self._dtype = dtype

    def __call__(self, rows_OB: Tensor, out_OI: Tensor) -> None:
        codes, out = self._codes, out_OI.view_as(self._codes)
        out.copy_(self.split(rows_OB, codes))
        step, smallest = self.params(rows_OB)
        out.mul_(step).add_(smallest)

    def split(self, rows_OB: Tensor, codes: Tensor) -> Tensor:
        size = self._codec.code_bytes(SHAPE[1])
        packed = rows_OB[:, :size].view(len(rows_OB), self._groups, -1)
        if self._codec.bits == 8:
            return packed
        half = codes.shape[2] // 2
        torch.bitwise_and(packed, 15, out=codes[..., :half])
        torch.bitwise_right_shift(packed, 4, out=codes[..., half:])
        return codes

    def params(self, rows_OB: Tensor) -> tuple[Tensor, Tensor]:
        size = self._codec.code_bytes(SHAPE[1])
        params = rows_OB[:, size:].contiguous().view(torch.float16).to(self._dtype)
        params = params.view(len(rows_OB), self._groups, 1, 2)
        return params[..., 0], params[..., 1]


class _LookUp(_TorchOperations):
    """A byte's numbers (two where it holds two codes) from a table, then scaled."""

    def __init__(self, codec: Codec, dtype: torch.dtype) -> None:
        super().__init__(codec, dtype)
        byte = torch.arange(256)
        columns = [byte & 15, byte >> 4] if codec.bits == 4 else [byte]
        self._table = torch.stack(columns, 1).to(dtype)
        self._index = torch.empty(SHAPE[0], codec.code_bytes(SHAPE[1]), dtype=torch.int32)
        self._found = torch.empty(self._index.numel(), len(columns), dtype=dtype)

    def __call__(self, rows_OB: Tensor, out_OI: Tensor) -> None:
        self._index.copy_(rows_OB[:, : self._index.shape[1]])
        torch.index_select(self._table, 0, self._index.view(-1), out=self._found)
        num_codes = self._table.shape[1]
        out = out_OI.view(SHAPE[0], self._groups, num_codes, -1)
        found = self._found.view(SHAPE[0], self._groups, -1, num_codes)
        step, smallest = self.params(rows_OB)
        out.copy_(found.transpose(2, 3))
        out.mul_(step.unsqueeze(3)).add_(smallest.unsqueeze(3))


def check(runs: Mapping[str, Run], weights: list[CompressedWeight], dtype: torch.dtype) -> None:
    """All formulations give the same numbers, within the dtype's rounding."""
    expected, made = torch.empty(SHAPE), torch.empty(SHAPE, dtype=dtype)
    widen(weights[0].rows_OB, weights[0].codec, expected)
    for other in (_TorchOperations, _LookUp):
        other(weights[0].codec, dtype)(weights[0].rows_OB, made)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(made.float(), expected, rtol=0, atol=tolerance)


def widening(rounds: int, set_bytes: int) -> Iterator[dict[str, Any]]:
    for codec in CODECS:
        weights = compressed_set(codec, set_bytes)
        for dtype in DTYPES:
            runs = wideners(weights, dtype)
            check(runs, weights, dtype)
            num_bytes = SHAPE[0] * SHAPE[1] * dtype.itemsize
            taken = seconds(runs, rounds)
            rates = {name: round(num_bytes / s / 1e9, 1) for name, s in taken.items()}
            yield {"bits": codec.bits, "to": _name(dtype), **rates}


# -- beside the product ---------------------------------------------------------------------------


def products(rounds: int, set_bytes: int) -> Iterator[dict[str, Any]]:
    """Seconds per matrix: the product alone, and with widening in the same lane or beside it."""
    ws = Workspace(torch.from_numpy(aligned_buffer(64 * 2**20)))
    with ThreadPoolExecutor(1, "widen") as beside:
        for dtype in DTYPES:
            plain = cycle(plain_set(dtype, set_bytes))
            for codec in CODECS:
                weights = compressed_set(codec, set_bytes)
                for rows in ROWS:
                    x = torch.randn(rows, SHAPE[1]).to(dtype)
                    out = torch.empty(rows, SHAPE[0], dtype=dtype)
                    taken = seconds(
                        {
                            "product": _one_lane(plain, x, out, ws),
                            "one lane": _one_lane(cycle(weights), x, out, ws),
                            "two lanes": _two_lanes(cycle(weights), x, out, ws, beside),
                        },
                        rounds,
                    )
                    yield {
                        "compute": _name(dtype),
                        "bits": codec.bits,
                        "rows": rows,
                        **{name: round(s * 1e3, 3) for name, s in taken.items()},
                        **_break_even(taken, dtype, codec),
                    }


def _one_lane(weights: Iterator[Weight], x: Tensor, out: Tensor, ws: Workspace) -> Run:
    return lambda: multiply(x, next(weights), None, out, ws)


def _two_lanes(
    weights: Iterator[CompressedWeight],
    x: Tensor,
    out: Tensor,
    ws: Workspace,
    beside: ThreadPoolExecutor,
) -> Run:
    """Widens the next weight while this one is multiplied; each takes half of the threads."""
    rooms = cycle([torch.empty(SHAPE, dtype=x.dtype) for _ in range(2)])
    num_threads = max(1, torch.get_num_threads() // 2)

    def ahead() -> Tensor:
        torch.set_num_threads(num_threads)  # of this thread's own team
        weight, room = next(weights), next(rooms)
        widen(weight.rows_OB, weight.codec, room)
        return room

    ready = [_start(beside, ahead)]

    def run() -> None:
        widened = ready.pop().result()
        ready.append(_start(beside, ahead))
        whole = torch.get_num_threads()
        torch.set_num_threads(max(1, whole - num_threads))
        try:
            multiply(x, widened, None, out, ws)
        finally:
            torch.set_num_threads(whole)

    return run


def _start(beside: ThreadPoolExecutor, work: Callable[[], Tensor]) -> Any:
    """Start widening; as anywhere, inference mode is a thread's own."""

    def infer() -> Tensor:
        with torch.inference_mode():
            return work()

    return beside.submit(infer)


def _break_even(taken: Mapping[str, float], dtype: torch.dtype, codec: Codec) -> dict[str, float]:
    """Disk rates in GB/s below which the compressed form is faster, by the dtype on disk.

    Reading and computing overlap, so a matrix takes the larger of both. Uncompressed that is
    max(plain / D, product), compressed max(small / D, widening and product): the second is less as
    long as plain / D exceeds the widening and product.
    """
    best = min(taken["one lane"], taken["two lanes"])
    num_elements = SHAPE[0] * SHAPE[1]
    small = SHAPE[0] * codec.row_bytes(SHAPE[1])
    rates = {"small MB": round(small / 1e6, 2)}
    for name, width in (("from bf16 GB/s", 2), ("from fp32 GB/s", 4)):
        rates[name] = round(num_elements * width / best / 1e9, 2)
    return rates


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(lines: list[dict[str, Any]]) -> str:
    return markdown(tuple(lines[0]), [tuple(str(v) for v in line.values()) for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--set-mb", type=int, default=400, help="bytes of weights taken in turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_bytes = args.set_mb * 10**6
    with torch.inference_mode():
        facts = {
            "machine": machine(),
            "shape": SHAPE,
            "threads": torch.get_num_threads(),
            "widening_gb_per_s": list(widening(args.rounds, set_bytes)),
            "products_ms": list(products(args.rounds, set_bytes)),
        }
    print(table(facts["widening_gb_per_s"]))
    print()
    print(table(facts["products_ms"]))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
