"""How fast do decoding rows attend to their KV cache in RAM, beside what the memory can give?

One query token per row over ragged lengths, uniform between a quarter and the whole of a row's
region, at several shapes and numbers of rows; layers take turns, so that every cache comes from
memory. Beside our kernel (`flexpipe.kernels.attend`) for every kind of cache stand torch's ways,
each computing the same to rounding, which is checked. Bytes count once and only where a row has
tokens; rates are GB/s of them, and tokens attended per second. The bounds are measured in the same
rounds: reading memory, and widening bfloat16 that lies in the caches. Caches lie in memory as the
engine takes it.

    PYTHONPATH=. OMP_NUM_THREADS=2 python benchmarks/decode_attention.py [--json FILE] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.trial import Sample, machine, markdown
from flexpipe.kernels import codec, team
from flexpipe.kernels.attend import KvRows, attend_rows
from flexpipe.kernels.emit import BYTE, Emitter
from flexpipe.memory.disk import aligned_buffer
from flexpipe.plan.codec import Codec

SHAPES = ((4, 8, 64), (8, 4, 128), (32, 1, 128))  # KV heads, query heads to each, head_dim
POINTS = {  # rows and tokens
    (4, 8, 64): ((32, 512), (256, 512), (64, 2048), (256, 4096)),
    (8, 4, 128): ((32, 512), (128, 1024), (64, 4096)),
    (32, 1, 128): ((128, 512), (32, 2048)),
}
SET_BYTES = 10**9  # of float32 cache, at least: far more than any processor's own
SAMPLE_BYTES = 250 * 10**6  # that one measurement reads, at least
DISTINCT = 512  # tokens that differ; they repeat along a region
ROWS_TOGETHER = 8  # that a padded call takes, sorted by length as they are
CODECS = {"8-bit": Codec(bits=8), "4-bit": Codec(bits=4)}
READ, WIDEN = "memory read", "bfloat16 widened in cache"
Run = Callable[[int], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One question: this shape, so many rows of at most so many tokens."""

    num_kv: int
    group: int
    dim: int
    rows: int
    tokens: int

    @property
    def token_numbers(self) -> int:
        return 2 * self.num_kv * self.dim

    @property
    def layers(self) -> int:
        return max(1, SET_BYTES // (4 * self.rows * self.tokens * self.token_numbers))

    def counts(self) -> list[int]:
        """Tokens of each row, the longest first."""
        generator = torch.Generator().manual_seed(0)
        shares = torch.rand(self.rows, generator=generator) * 0.75 + 0.25
        return sorted((max(1, round(float(s) * self.tokens)) for s in shares), reverse=True)

    def __str__(self) -> str:
        shape = f"{self.num_kv} x {self.group} x {self.dim}"
        return f"{shape}, {self.rows} rows, {self.tokens} tokens"


class Caches:
    """The same KV cache of every layer in each form: [layers, R, L, 2, K, D] or compressed."""

    def __init__(self, point: Point) -> None:
        self.point = point
        generator = torch.Generator().manual_seed(1)
        heads = (2, point.num_kv, point.dim)
        wide = torch.randn(DISTINCT, *heads, generator=generator)
        self.tokens = {"float32": self._repeated(wide), "bfloat16": self._repeated(wide.bfloat16())}
        for name, kind in CODECS.items():
            narrow = torch.empty(*wide.shape[:-1], kind.row_bytes(point.dim), dtype=torch.uint8)
            codec.compress(wide.flatten(0, 2), kind, narrow.flatten(0, 2))
            self.tokens[name] = self._repeated(narrow)
        by_head = wide.permute(1, 2, 0, 3).unsqueeze(1)  # [2, 1, K, L, D]
        shape = (point.layers, 2, point.rows, point.num_kv, point.tokens, point.dim)
        self.head_major = _slab(shape, torch.float32)
        for start in range(0, point.tokens, DISTINCT):
            self.head_major[..., start : start + DISTINCT, :] = by_head

    def _repeated(self, base: Tensor) -> Tensor:
        point = self.point
        lengths = (point.layers, point.rows, point.tokens // DISTINCT)
        whole = _slab((*lengths, *base.shape), base.dtype).copy_(base)
        return whole.view(*lengths[:2], point.tokens, *base.shape[1:])


def _slab(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory as the engine takes it for a tier: in huge pages, where the system has them."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(aligned_buffer(size)[:size]).view(dtype).view(shape)


@dataclass(frozen=True)
class Way:
    """One way to attend: `run` takes a layer; `bytes` are what it must read of it."""

    name: str
    bytes: int
    run: Run


def ways(point: Point, caches: Caches, q_RND: Tensor) -> Iterator[Way]:
    counts = point.counts()
    for name, kv in caches.tokens.items():
        yield Way(name, sum(counts) * kv[0, 0, 0].nbytes, _ours(point, kv, q_RND, name))
    wide, useful = caches.tokens["float32"], 4 * point.token_numbers * sum(counts)
    q_RKGD = q_RND.view(point.rows, point.num_kv, point.group, point.dim)
    lengths = torch.tensor(counts)[:, None, None, None]
    seen = torch.arange(point.tokens) < lengths  # [R, 1, 1, L]
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    pieces = [(slice(r, r + ROWS_TOGETHER), counts[r]) for r in range(0, point.rows, ROWS_TOGETHER)]

    def padded(layer: int) -> Tensor:
        k, v = wide[layer].permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q_RND.unsqueeze(2), k, v, mask, enable_gqa=True)
        return out.view(q_RND.shape)

    def group_as_queries(layer: int) -> Tensor:
        out = torch.empty_like(q_RKGD)
        for rows, longest in pieces:
            k, v = wide[layer, rows, :longest].permute(2, 0, 3, 1, 4)
            part = F.scaled_dot_product_attention(q_RKGD[rows], k, v, mask[rows, ..., :longest])
            out[rows] = part
        return out.view(q_RND.shape)

    def row_by_row(layer: int) -> Tensor:
        out = torch.empty_like(q_RKGD)
        for row, count in enumerate(counts):
            k, v = wide[layer, row, :count].permute(1, 2, 0, 3)
            out[row] = F.scaled_dot_product_attention(q_RKGD[row], k, v)
        return out.view(q_RND.shape)

    def token_major(layer: int) -> Tensor:
        out = torch.empty_like(q_RKGD)
        for rows, longest in pieces:
            for head in range(point.num_kv):
                k, v = wide[layer, rows, :longest, :, head].unbind(2)
                out[rows, head] = _products(q_RKGD[rows, head], k, v, mask[rows, 0, :, :longest])
        return out.view(q_RND.shape)

    def head_major(layer: int) -> Tensor:
        out = torch.empty_like(q_RKGD)
        for rows, longest in pieces:
            q = q_RKGD[rows].flatten(0, 1)
            k, v = caches.head_major[layer, :, rows]
            k, v = (x.flatten(0, 1)[:, :longest] for x in (k, v))
            seen = mask[rows, ..., :longest].expand(-1, point.num_kv, -1, -1).flatten(0, 1)
            out[rows] = _products(q, k, v, seen).view(-1, *q_RKGD.shape[1:])
        return out.view(q_RND.shape)

    yield Way("SDPA, padded to the region", useful, padded)
    yield Way("SDPA, group as queries", useful, group_as_queries)
    yield Way("SDPA, row by row", useful, row_by_row)
    yield Way("matmul, token-major", useful, token_major)
    yield Way("matmul, head-major", useful, head_major)


def _ours(point: Point, kv: Tensor, q_RND: Tensor, name: str) -> Run:
    count_R = torch.tensor(point.counts())
    rows = KvRows(torch.zeros_like(count_R), count_R, torch.arange(point.rows))

    def run(layer: int) -> Tensor:
        out = q_RND.clone()
        attend_rows(out, kv[layer], rows, CODECS.get(name))
        return out

    return run


def _products(q_BGD: Tensor, k_BLD: Tensor, v_BLD: Tensor, mask_B1L: Tensor) -> Tensor:
    scores = torch.baddbmm(mask_B1L, q_BGD, k_BLD.transpose(1, 2), alpha=q_BGD.shape[2] ** -0.5)
    return torch.bmm(torch.softmax(scores, 2), v_BLD)


def readers(memory: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read a large float32 tensor once; the fastest one tells what the memory gives."""
    total = torch.zeros(_LANES * _LINES)
    kernel = team.Kernel("read", _reader_text())

    def sweep() -> None:
        counter = torch.zeros(1, dtype=torch.int64)
        num_items = memory.nbytes // _CHUNK
        kernel.run([memory.data_ptr(), counter.data_ptr(), num_items, total.data_ptr()])

    return {"torch sum": memory.sum, "torch amax": memory.amax, "prefetched sum": sweep}


_LANES, _LINES, _CHUNK, _AHEAD = 16, 8, 2**18, 2**13


def _reader_text() -> str:
    """Sums of a chunk's lines, every fourth prefetched; all are stored, so none is left out."""
    e = Emitter("read", _LANES)
    memory, counter, num_items, total = e.fields(4)
    with e.shared_items(e.pointer(counter), num_items) as item:
        sums = [e.room(e.vector) for _ in range(_LINES)]
        for room in sums:
            e.store(e.constant(0.0), room)
        start = e.at(e.pointer(memory), e.linear((item, _CHUNK)), BYTE)
        with e.loop(e.number(0), e.number(_CHUNK), 4 * _LANES * _LINES) as offset:
            place = e.at(start, offset, BYTE)
            for index, room in enumerate(sums):
                line = e.at(place, 4 * _LANES * index, BYTE)
                if index % 4 == 0:
                    e.prefetch(e.at(line, _AHEAD, BYTE))
                added = e.builder.fadd(e.load(room, e.vector), e.load(line, e.vector))
                e.store(added, room)
        for index, room in enumerate(sums):
            e.store(e.load(room, e.vector), e.at(e.pointer(total), index, e.vector))
    return e.text()


def wideners() -> dict[str, tuple[int, Callable[[], object]]]:
    """Conversions within the caches, of several sizes: bytes read, and the conversion."""
    made: dict[str, tuple[int, Callable[[], object]]] = {}
    for size in (2**16, 2**17, 2**18, 2**19):
        narrow, wide = torch.randn(size).bfloat16(), torch.empty(size)
        made[f"{size} numbers"] = narrow.nbytes, lambda n=narrow, w=wide: w.copy_(n)
    return made


def bounds(memory: Tensor) -> Iterator[tuple[str, float]]:
    """One measurement of each bound, GB/s."""
    yield READ, max(memory.nbytes / _seconds(run) / 1e9 for run in readers(memory).values())
    rates = []
    for size, run in wideners().values():
        run()
        times = 2**27 // size
        rates.append(times * size / _seconds(run, times) / 1e9)
    yield WIDEN, max(rates)


def _seconds(run: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def measure(point: Point, rounds: int, only: Sequence[str] = ()) -> dict[str, Any]:
    caches = Caches(point)
    generator = torch.Generator().manual_seed(2)
    q_RND = torch.randn(point.rows, point.num_kv * point.group, point.dim, generator=generator)
    made = [way for way in ways(point, caches, q_RND) if not only or way.name in only]
    errors = _errors(made)
    memory = caches.tokens["float32"].flatten()
    rates: dict[str, list[float]] = {}
    turn = cycle(range(point.layers))
    for _ in range(rounds):
        for name, rate in bounds(memory):
            rates.setdefault(name, []).append(rate)
        for way in made:
            times = -(-SAMPLE_BYTES // way.bytes)
            seconds = _seconds(lambda way=way: way.run(next(turn)), times) / times
            rates.setdefault(way.name, []).append(way.bytes / seconds / 1e9)
    return {
        "point": str(point),
        "layers": point.layers,
        "tokens_attended": sum(point.counts()),
        "bytes": {way.name: way.bytes for way in made},
        "gb_per_s": {name: Sample(tuple(values)).to_dict() for name, values in rates.items()},
        "largest_difference": errors,
    }


def _errors(made: Sequence[Way]) -> dict[str, float]:
    """How far each way's first result is from our kernel's in float32; also the warm-up."""
    expected = made[0].run(0)
    assert expected is not None
    found = {}
    for way in made:
        got = way.run(0)
        assert got is not None
        found[way.name] = float((got - expected).abs().max())
        if way.name not in CODECS:
            assert found[way.name] < (2e-2 if way.name == "bfloat16" else 1e-4), (way.name, found)
    return found


def table(facts: Mapping[str, Any]) -> str:
    """Median and best GB/s, the median's share of its bound, and tokens of all rows per second.

    The bound of a float32 cache is reading memory, that of a bfloat16 one widening in the caches.
    """
    rates = {name: Sample(tuple(rate["values"])) for name, rate in facts["gb_per_s"].items()}
    rows: list[tuple[str, ...]] = []
    for name, rate in rates.items():
        size = facts["bytes"].get(name)
        bound = {"bfloat16": WIDEN}.get(name, READ)
        share = f"{rate.median / rates[bound].median:.0%}" if size and name not in CODECS else ""
        tokens = f"{rate.median * 1e3 / size * facts['tokens_attended']:.1f}" if size else ""
        rows.append((name, f"{rate.median:.1f}", f"{max(rate.values):.1f}", share, tokens))
    return markdown((facts["point"], "GB/s", "best", "of its bound", "million tokens/s"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", type=int, help="only this one of the shapes")
    parser.add_argument("--only", nargs="*", default=(), help="ways to measure, by name")
    args = parser.parse_args()
    facts: dict[str, Any] = {"machine": machine(), "points": []}
    shapes = SHAPES if args.shape is None else SHAPES[args.shape : args.shape + 1]
    with torch.inference_mode():
        for num_kv, group, dim in shapes:
            for rows, tokens in POINTS[num_kv, group, dim]:
                point = Point(num_kv=num_kv, group=group, dim=dim, rows=rows, tokens=tokens)
                facts["points"].append(measure(point, args.rounds, args.only))
                print(table(facts["points"][-1]), end="\n\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
