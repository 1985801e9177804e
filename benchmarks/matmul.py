"""Which kernel multiplies by a weight fastest, and what does conversion on the way cost?

Rates of a product [rows, I] x [O, I]^T in GFLOP/s, by number of rows. In float32: torch.mm (MKL),
oneDNN on the weight as it lies, oneDNN on a weight packed before, and a bfloat16 weight converted
slice by slice. In bfloat16: torch.mm, and a packed weight. Weights are taken in turn from a set
larger than the caches, as layers do.

    PYTHONPATH=. python benchmarks/matmul.py [--json FILE] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.trial import machine, markdown
from flexpipe.memory.disk import aligned_buffer
from flexpipe.model import matmul
from flexpipe.model.workspace import Workspace

SHAPES = {"up 5632 x 2048": (5632, 2048), "down 2048 x 5632": (2048, 5632)}
ROWS = (1, 8, 32, 64, 128, 256, 512, 2048)
SET_BYTES = 400 * 10**6


def kernels(shape: tuple[int, int]) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """name -> one product into a given result; each call takes the next weight."""
    plain = [torch.randn(shape) for _ in range(SET_BYTES // (4 * shape[0] * shape[1]))]
    narrow = [weight.bfloat16() for weight in plain]
    buffer = torch.empty(matmul.PACK_BYTES, dtype=torch.uint8)
    packed = [_packed(weight, buffer) for weight in plain]
    ws = Workspace(torch.from_numpy(aligned_buffer(64 * 2**20)))

    def ours(weights: Iterator[Any]) -> Callable[[Tensor, Tensor], object]:
        return lambda x, out: matmul.multiply(x, next(weights), None, out, ws)

    turn = cycle(plain)
    packed_narrow = [_packed(weight, buffer) for weight in narrow]
    return {
        "torch.mm": lambda x, out: torch.mm(x, next(turn).t(), out=out),
        "oneDNN": ours(cycle(plain)),
        "packed": ours(cycle(packed)),
        "from bfloat16": ours(cycle(narrow)),
        "bfloat16": ours(cycle(narrow)),
        "bfloat16 packed": ours(cycle(packed_narrow)),
    }


def _packed(weight: Tensor, buffer: Tensor) -> matmul.PackedWeight:
    num_out, num_in = weight.shape
    return matmul.PackedWeight.make(
        (num_out, num_in), weight.dtype, buffer, lambda rows, room: room.copy_(weight[rows])
    )


def measure(shape: tuple[int, int], rounds: int) -> Iterator[dict[str, Any]]:
    made = kernels(shape)
    for rows in ROWS:
        wide = torch.randn(rows, shape[1]), torch.empty(rows, shape[0])
        narrow = wide[0].bfloat16(), wide[1].bfloat16()
        times: dict[str, list[float]] = {name: [] for name in made}
        for number in range(rounds + 1):
            for name, run in made.items():
                x, out = narrow if name.startswith("bfloat16") else wide
                start = time.perf_counter()
                run(x, out)
                if number:  # the first makes kernels for this shape
                    times[name].append(time.perf_counter() - start)
        flops = 2 * rows * shape[0] * shape[1]
        rates = {name: flops / statistics.median(t) / 1e9 for name, t in times.items()}
        yield {"rows": rows, **{name: round(rate, 1) for name, rate in rates.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts: dict[str, Any] = {"machine": machine(), "rates_gflop_per_s": {}}
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            lines = list(measure(shape, args.rounds))
            facts["rates_gflop_per_s"][name] = lines
            head = (name, *(str(line["rows"]) for line in lines))
            kinds = [kind for kind in lines[0] if kind != "rows"]
            print(markdown(head, [(kind, *(f"{ln[kind]:.0f}" for ln in lines)) for kind in kinds]))
            print()
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
