"""What this machine allows at most: GEMM and disk rates, and the token/s that follow from them.

    PYTHONPATH=. python -m benchmarks.peers.bounds --model DIR [--json FILE]

*Compute bound*: generated tokens ÷ Σ (FLOPs of a kind of matrix ÷ its best rate). The FLOPs are
`flexpipe.model.cost`'s: every token but a row's last goes through the decoder, attention over what
came before counts, the head only for tokens that are generated. The rate of each matrix's shape is
the best over all row counts and over the ways in which torch multiplies matrices (`mm`; `mm` of
the transposed product; oneDNN with the weight packed before, as a loader may do), with nothing else
running; attention counts at the best rate of all. fp32 and bf16 are apart: a CPU with bf16
instructions multiplies twice as fast in it, one without them far slower than in fp32. Measured
again while a thread reads the checkpoint past the page cache without a pause, it becomes the bound
beside a disk read.

*Disk bound*: generated tokens ÷ (unavoidable bytes ÷ best direct read rate). Each step of a block
of rows needs all weights once: a prefill step and `gen_len - 1` decode steps for each block of
`block` rows. What fits the cap need not be read again: unavoidable bytes = (weights - cap) × steps
× blocks, where the embedding does not count as weights, since a step needs only some of its rows.
Keys and values are the engine's own cost: none of them is counted.

The *bound* of a setting is the lower of the two; without a cap the compute bound alone. Where the
dtype is not told, the faster one's counts.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import weight_files
from benchmarks.peers.workload import Workload
from benchmarks.trial import machine, markdown

ROWS = (64, 128, 256, 512, 1024, 2048)
MAX_CALL_FLOPS = 60e9  # a quarter of a second: more rows than that tell nothing new
DTYPES = ("float32", "bfloat16")
WAYS = ("mm", "transposed", "packed")
KINDS = tuple(f"{dtype} {way}" for dtype in DTYPES for way in WAYS)
_READ_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Rates of one machine in one run: FLOP/s by kind and matrix, bytes/s.

    A kind is a dtype and a way to multiply ("float32 mm"), or a dtype alone: the best of its ways.
    """

    gemm: Mapping[str, Mapping[str, float]]
    gemm_beside_disk: Mapping[str, Mapping[str, float]]
    disk_bytes_per_s: float
    disk_beside_gemm_bytes_per_s: float
    all_rows: Mapping[str, Any]

    def compute_tokens_per_s(
        self, config: Any, workload: Workload, *, beside_disk: bool = False, kind: str | None = None
    ) -> float:
        if kind is None:
            return max(
                self.compute_tokens_per_s(config, workload, beside_disk=beside_disk, kind=dtype)
                for dtype in DTYPES
            )
        rates = (self.gemm_beside_disk if beside_disk else self.gemm)[kind]
        flops = flops_by_matrix(config, workload)
        top = max(rates.values())
        seconds = sum(count / rates.get(name, top) for name, count in flops.items())
        return workload.gen_len / seconds

    def disk_tokens_per_s(
        self, config: Any, workload: Workload, *, block: int, cap_bytes: int
    ) -> float:
        num_bytes = max(0, streamed_weight_bytes(config) - cap_bytes) * workload.gen_len
        if not num_bytes:
            return float("inf")
        return block * workload.gen_len / (num_bytes / self.disk_bytes_per_s)

    def tokens_per_s(
        self,
        config: Any,
        workload: Workload,
        *,
        block: int,
        cap_bytes: int | None,
        kind: str | None = None,
    ) -> float:
        """The bound: under a cap the GEMMs run beside a disk read."""
        if cap_bytes is None:
            return self.compute_tokens_per_s(config, workload, kind=kind)
        return min(
            self.compute_tokens_per_s(config, workload, beside_disk=True, kind=kind),
            self.disk_tokens_per_s(config, workload, block=block, cap_bytes=cap_bytes),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_model_config(directory: Path) -> Any:
    from flexpipe.model.families import read_config

    return read_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def matrices(config: Any) -> dict[str, tuple[tuple[int, int], int]]:
    """(rows, columns) of each matrix that tokens are multiplied with, and how many there are."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers, hidden, ffn = config.num_layers, config.hidden_size, config.ffn_size
    return {
        "q, o": ((q, hidden), 2 * layers),
        "k, v": ((kv, hidden), 2 * layers),
        "gate, up": ((ffn, hidden), (2 if config.gated_mlp else 1) * layers),
        "down": ((hidden, ffn), layers),
        "head": ((config.vocab_size, hidden), 1),
    }


def flops_by_matrix(config: Any, workload: Workload) -> dict[str, float]:
    """FLOPs of one row from its prompt to its last token."""
    from flexpipe.model import cost

    num_tokens = workload.prompt_len + workload.gen_len - 1
    flops: dict[str, float] = {}
    for name, ((rows, columns), count) in matrices(config).items():
        tokens = workload.gen_len if name == "head" else num_tokens
        flops[name] = 2.0 * tokens * rows * columns * count
    attended = cost.num_attended(0, num_tokens)
    flops["attention"] = float(config.num_layers * cost.attend_flops(config, attended))
    total = config.num_layers * cost.decoder_flops(config, num_tokens, attended)
    total += cost.head_flops(config, workload.gen_len)
    assert round(sum(flops.values())) == total
    return flops


def streamed_weight_bytes(config: Any) -> int:
    """Bytes of all matrices that every step needs, as stored."""
    from flexpipe.model.config import DTYPE_BYTES

    width = DTYPE_BYTES[config.dtype]
    return sum(rows * cols * count * width for (rows, cols), count in matrices(config).values())


# -- measuring ------------------------------------------------------------------------------------


def measure(
    directory: Path, *, threads: int = 2, repetitions: int = 3, rows: Sequence[int] = ROWS
) -> Bounds:
    """Measure all rates, the GEMMs without and with a disk read beside them."""
    import torch

    torch.set_num_threads(threads)
    config = read_model_config(directory)
    reader = _Reader(weight_files(directory))
    disk_rate = max(reader.rate_alone() for _ in range(repetitions))
    with torch.inference_mode():
        gemm = _gemm_rates(config, rows, repetitions)
        with reader:
            beside = _gemm_rates(config, rows, repetitions)
    return Bounds(
        gemm=_best(gemm),
        gemm_beside_disk=_best(beside),
        disk_bytes_per_s=disk_rate,
        disk_beside_gemm_bytes_per_s=reader.rate,
        all_rows={"alone": gemm, "beside_disk": beside},
    )


_Rates = dict[str, dict[str, dict[int, float]]]  # kind, matrix, rows: FLOP/s


def _gemm_rates(config: Any, rows: Sequence[int], repetitions: int) -> _Rates:
    rates: _Rates = {kind: {} for kind in KINDS}
    for name, (shape, _) in matrices(config).items():
        for kind, by_rows in _matrix_rates(shape, rows, repetitions).items():
            rates[kind][name] = by_rows
    return rates


def _matrix_rates(
    shape: tuple[int, int], rows: Sequence[int], repetitions: int
) -> dict[str, dict[int, float]]:
    rates: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for dtype in DTYPES:
        weight = _tensor(dtype, *shape).normal_()
        for count in rows:
            flops = 2.0 * count * shape[0] * shape[1]
            if flops > MAX_CALL_FLOPS and count > min(rows):
                continue
            for way, call in _calls(weight, count).items():
                rates[f"{dtype} {way}"][count] = flops / _least_s(call, flops, repetitions)
    return rates


def _calls(weight: Any, count: int) -> dict[str, Callable[[], Any]]:
    """The ways to multiply `count` rows with the weight."""
    import torch

    dtype = str(weight.dtype).removeprefix("torch.")
    x, out = _tensor(dtype, count, weight.shape[1]).normal_(), _tensor(dtype, count, len(weight))
    turned = _tensor(dtype, len(weight), count)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, count)
    linear = torch.ops.mkldnn._linear_pointwise
    return {
        "mm": lambda: torch.mm(x, weight.t(), out=out),
        "transposed": lambda: torch.mm(weight, x.t(), out=turned),
        "packed": lambda: linear(x, packed, None, "none", [], ""),
    }


def _tensor(dtype: str, rows: int, columns: int) -> Any:
    """On huge pages, as an engine that cares would have it."""
    import torch

    from flexpipe.memory.disk import aligned_buffer

    kind: torch.dtype = getattr(torch, dtype)
    num_bytes = rows * columns * kind.itemsize
    data = torch.from_numpy(aligned_buffer(num_bytes)[:num_bytes])
    return data.view(kind).view(rows, columns)


def _least_s(call: Callable[[], Any], flops: float, repetitions: int) -> float:
    call()
    least = float("inf")
    for _ in range(max(repetitions, min(20, int(repetitions * 5e9 / flops)))):
        start_s = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start_s)
    return least


def _best(rates: _Rates) -> dict[str, dict[str, float]]:
    """Each matrix's best rate over row counts, per kind, and per dtype over its kinds."""
    best = {
        kind: {name: max(by_rows.values()) for name, by_rows in matrices.items()}
        for kind, matrices in rates.items()
    }
    for dtype in DTYPES:
        ways = [best[f"{dtype} {way}"] for way in WAYS]
        best[dtype] = {name: max(way[name] for way in ways) for name in ways[0]}
    return best


class _Reader:
    """Reads the files over and over past the page cache; as a context, in a thread beside us."""

    def __init__(self, files: Sequence[Path]) -> None:
        from flexpipe.memory.disk import aligned_buffer

        self._files = files
        self._buffer = aligned_buffer(_READ_BYTES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.rate = 0.0

    def rate_alone(self, at_most: int = 4 << 30) -> float:
        start_s = time.perf_counter()
        return self._read(at_most) / (time.perf_counter() - start_s)

    def _read(self, at_most: int | None = None) -> int:
        from flexpipe.memory.disk import DiskReader

        done = 0
        with DiskReader() as reader:
            for path in self._files:
                file = reader.file(path)
                for offset in range(0, file.size, _READ_BYTES):
                    if self._stop.is_set() or (at_most is not None and done >= at_most):
                        return done
                    done += file.read(self._buffer, offset)
        return done

    def _loop(self) -> None:
        start_s, done = time.perf_counter(), 0
        while not self._stop.is_set():
            done += self._read()
        self.rate = done / (time.perf_counter() - start_s)

    def __enter__(self) -> _Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def table(bounds: Bounds) -> str:
    """Best GFLOP/s of each matrix, alone and beside a read."""
    rows = []
    for kind in (*KINDS, *DTYPES):
        for where, rates in (("alone", bounds.gemm), ("beside a read", bounds.gemm_beside_disk)):
            cells = (f"{rate / 1e9:.0f}" for rate in rates[kind].values())
            rows.append((f"{kind}, {where}", *cells))
    return markdown(("GFLOP/s", *bounds.gemm[DTYPES[0]]), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cap-bytes", type=float)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--workload", type=Workload.parse, action="append")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bounds = measure(args.model, threads=args.threads)
    config = read_model_config(args.model)
    print(table(bounds))
    print(
        f"\ndisk: {bounds.disk_bytes_per_s / 1e9:.2f} GB/s, beside GEMMs "
        f"{bounds.disk_beside_gemm_bytes_per_s / 1e9:.2f} GB/s\n"
    )
    tokens: dict[str, Any] = {}
    for workload in args.workload or (Workload(128, 32), Workload(32, 96)):
        tokens[str(workload)] = told = {
            f"{kind}{' beside a read' if beside else ''}": bounds.compute_tokens_per_s(
                config, workload, beside_disk=beside, kind=kind
            )
            for beside in (False, True)
            for kind in DTYPES
        }
        if args.cap_bytes:
            told[f"disk, block of {args.block}"] = bounds.disk_tokens_per_s(
                config, workload, block=args.block, cap_bytes=int(args.cap_bytes)
            )
        cells = "; ".join(f"{name} {value:.1f}" for name, value in told.items())
        print(f"{workload}, token/s: {cells}")
    if args.json:
        facts = {"bounds": bounds.to_dict(), "tokens_per_s": tokens, "machine": machine()}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
