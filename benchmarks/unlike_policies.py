"""Jobs under policies as unlike each other as the engine allows, of some ten seconds on two cores.

All tiers, both devices that need no accelerator, every strategy, blocks from 8 rows to 128 and from
one micro-batch to eight, prompts that weigh more than answers and the other way round, equal
lengths and ragged ones, links from a tenth of a memory's rate up. Every knob that matters is given,
so that what is free on the machine decides nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from benchmarks.peers.checkpoint import Shape
from benchmarks.searched_workloads import shuffled
from flexpipe.plan.block import Need
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import STRATEGIES, Policy, percent_shares
from flexpipe.units import parse_rate

SHAPES = {
    "0.25b": Shape(hidden=1024, layers=16, heads=16, kv_heads=4, ffn=2816),
    "0.22b, a KV head per head": Shape(hidden=1024, layers=12, heads=16, kv_heads=16, ffn=2816),
    "0.67b": Shape(hidden=2048, layers=12, heads=32, kv_heads=8, ffn=5632),
}
SMALL, HEADS, WIDE = SHAPES


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job: a shape, a device, requests and knobs. `percent` are shares as --percent has them;
    an `emulate` like that of --emulate makes the device the emulated one."""

    name: str
    shape: str
    requests: Sequence[Need]
    rows: int
    block: int = 1
    percent: Sequence[float]
    emulate: str | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.emulate is None else "emulated"

    @property
    def compresses(self) -> bool:
        return "compress_weight" in self.knobs or "compress_vocabulary" in self.knobs

    @property
    def emulation(self) -> Emulation | None:
        return None if self.emulate is None else Emulation.parse(self.emulate)

    @property
    def given(self) -> dict[str, Any]:
        """Every knob but the budgets, so that nothing is left to the search."""
        asked = {
            **percent_shares(self.percent),
            "micro_batch_size": self.rows,
            "num_micro_batches": self.block,
            "compute_dtype": "bfloat16",
            **self.knobs,
        }
        policy = Policy(**asked)
        knobs = {item.name: getattr(policy, item.name) for item in fields(Policy)}
        return {name: value for name, value in knobs.items() if not name.endswith("_mem")}


def equal(count: int, prompt: int, output: int) -> list[Need]:
    return [Need(prompt, output)] * count


def ragged(count: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> list[Need]:
    """Lengths drawn evenly between two bounds each."""
    draw = random.Random(5)
    return [Need(draw.randint(*prompts), draw.randint(*outputs)) for _ in range(count)]


IN_RAM, OFF_DEVICE = (0, 100, 0, 100, 0, 100), (0, 100, 100, 0, 100, 0)
KNOWN = (
    # the CPU computes
    Case(name="cpu, in RAM", shape=SMALL, requests=equal(64, 32, 48), rows=64, percent=IN_RAM),
    Case(
        name="cpu, in RAM, 8 rows, long answers",
        shape=SMALL, requests=equal(8, 32, 160), rows=8, percent=IN_RAM,
    ),
    Case(
        name="cpu, in RAM, ragged, refilled",
        shape=SMALL, requests=ragged(72, (8, 64), (8, 48)), rows=24, block=2, percent=IN_RAM,
    ),
    Case(
        name="cpu, in RAM, long prompts",
        shape=SMALL, requests=equal(12, 448, 4), rows=4, block=3, percent=IN_RAM,
    ),
    Case(
        name="cpu, in RAM, float32",
        shape=SMALL, requests=equal(32, 32, 40), rows=32, percent=IN_RAM,
        knobs={"compute_dtype": "float32"},
    ),
    Case(
        name="cpu, weights on disk",
        shape=WIDE, requests=equal(32, 16, 20), rows=32, percent=(0, 0, 0, 100, 0, 100),
    ),
    Case(
        name="cpu, half the weights on disk, single",
        shape=WIDE, requests=equal(64, 16, 16), rows=32, block=2, percent=(0, 50, 0, 100, 0, 100),
        knobs={"strategy": "single"},
    ),
    Case(
        name="cpu, weights on disk, no overlap",
        shape=WIDE, requests=equal(16, 16, 18), rows=16, percent=(0, 0, 0, 100, 0, 100),
        knobs={"strategy": "none"},
    ),
    Case(
        name="cpu, KV cache on disk",
        shape=HEADS, requests=equal(48, 96, 24), rows=12, block=4, percent=(0, 100, 0, 0, 0, 100),
    ),
    Case(
        name="cpu, half the KV cache on disk, multi",
        shape=HEADS, requests=equal(32, 64, 40), rows=16, block=2, percent=(0, 100, 0, 50, 0, 100),
        knobs={"strategy": "multi"},
    ),
    Case(
        name="cpu, weights in 4 bits",
        shape=SMALL, requests=equal(64, 32, 24), rows=32, block=2, percent=IN_RAM,
        knobs={"compress_weight": "4"},
    ),
    Case(
        name="cpu, KV cache in 8 bits",
        shape=HEADS, requests=equal(32, 64, 48), rows=32, percent=IN_RAM,
        knobs={"compress_cache": "8"},
    ),
    # the emulated accelerator computes
    Case(
        name="2 GB/s, weights in RAM",
        shape=SMALL, requests=equal(64, 16, 32), rows=64, percent=OFF_DEVICE,
        emulate="h2d=2GB/s,d2h=2GB/s",
    ),
    Case(
        name="4 GB/s, KV cache in RAM",
        shape=HEADS, requests=equal(64, 64, 24), rows=16, block=4,
        percent=(50, 50, 0, 100, 100, 0), emulate="h2d=4GB/s,d2h=2GB/s",
    ),
    Case(
        name="6 GB/s, weights and KV cache in RAM, no overlap",
        shape=HEADS, requests=equal(32, 48, 32), rows=16, block=2,
        percent=(0, 100, 0, 100, 100, 0), emulate="h2d=6GB/s,d2h=6GB/s",
        knobs={"strategy": "none"},
    ),
    Case(
        name="3 GB/s, all in RAM, 4 micro-batches, single",
        shape=SMALL, requests=equal(128, 16, 16), rows=32, block=4,
        percent=(0, 100, 0, 100, 0, 100), emulate="h2d=3GB/s,d2h=3GB/s",
        knobs={"strategy": "single"},
    ),
    Case(
        name="3 GB/s, weights over three tiers, disk of 1 GB/s",
        shape=WIDE, requests=equal(64, 16, 16), rows=32, block=2,
        percent=(20, 40, 100, 0, 100, 0), emulate="h2d=3GB/s,d2h=3GB/s,disk_read=1GB/s",
    ),
    Case(
        name="100 GFLOP/s, half the weights in RAM",
        shape=SMALL, requests=equal(128, 16, 12), rows=64, block=2,
        percent=(50, 50, 100, 0, 100, 0), emulate="h2d=1GB/s,d2h=1GB/s,compute=100GFLOP/s",
    ),
    Case(
        name="1 GB/s, attention on the CPU",
        shape=HEADS, requests=equal(64, 64, 24), rows=32, block=2,
        percent=(80, 20, 0, 100, 100, 0), emulate="h2d=1GB/s,d2h=1GB/s",
        knobs={"cpu_attention": True},
    ),
    Case(
        name="1 GB/s, attention on the CPU, weights in 4 bits",
        shape=SMALL, requests=equal(64, 32, 24), rows=32, block=2,
        percent=(0, 100, 0, 100, 100, 0), emulate="h2d=1GB/s,d2h=1GB/s",
        knobs={"cpu_attention": True, "compress_weight": "4"},
    ),
    Case(
        name="2 GB/s, KV cache on disk in 8 bits",
        shape=HEADS, requests=equal(48, 64, 24), rows=12, block=4,
        percent=(100, 0, 0, 0, 100, 0),
        emulate="h2d=2GB/s,d2h=2GB/s,disk_read=500MB/s,disk_write=500MB/s",
        knobs={"compress_cache": "8"},
    ),
    Case(
        name="4 GB/s, weights on disk, layers apart, 3 ahead",
        shape=WIDE, requests=equal(32, 16, 16), rows=16, block=2,
        percent=(0, 0, 100, 0, 100, 0), emulate="h2d=4GB/s,d2h=4GB/s",
        knobs={"separate_layers": True, "prefetch_depth": 3},
    ),
    Case(
        name="8 GB/s, all on disk, 8 micro-batches, multi",
        shape=SMALL, requests=equal(64, 32, 16), rows=8, block=8,
        percent=(0, 0, 0, 0, 0, 0), emulate="h2d=8GB/s,d2h=8GB/s", knobs={"strategy": "multi"},
    ),
    Case(
        name="5 GB/s, weights in RAM, ragged, refilled",
        shape=SMALL, requests=ragged(64, (16, 96), (4, 32)), rows=16, block=4,
        percent=OFF_DEVICE, emulate="h2d=5GB/s,d2h=5GB/s",
    ),
)  # fmt: skip


# -- jobs that nobody has seen ---------------------------------------------------------------------

HELD_OUT_SEED = 20261128
_NUM_HELD_OUT = len(KNOWN) // 2  # a third of all
_AIM_S = 6.0  # of decoding, by the roughest of guesses
_FLOPS, _MEMORY, _DISK = 250e9, 15e9, 2e9  # per second, to size them
_AXES: Mapping[str, Sequence[Any]] = {
    "shape": tuple(SHAPES),
    "device": ("cpu", "cpu", "1.5GB/s", "3GB/s", "6GB/s"),
    "rows": (8, 16, 24, 48),
    "block": (1, 2, 4),
    "prompt": ((16, 16), (48, 48), (160, 160), (8, 96)),
    "weights": (100, 60, 0),  # percent on the fastest tier
    "rest": ("cpu", "cpu", "disk"),  # where the others are; on a CPU always on disk
    "kv_cache": (100, 100, 50, 0),
    "strategy": ("event", "event", *STRATEGIES),
    "compress": ({}, {}, {}, {"compress_weight": "8"}, {"compress_cache": "4"}),
    "prefetch_depth": (1, 1, 2),
}


def _drawn() -> Iterator[Case]:
    """Each value of each axis about equally often, in combinations that the seed shuffles."""
    draw = random.Random(HELD_OUT_SEED)
    columns = [shuffled(values, _NUM_HELD_OUT, draw) for values in _AXES.values()]
    for index, row in enumerate(zip(*columns, strict=True)):
        yield _case(index, dict(zip(_AXES, row, strict=True)), draw)


def _case(index: int, drawn: Mapping[str, Any], draw: random.Random) -> Case:
    on_cpu, rows, block = drawn["device"] == "cpu", drawn["rows"], drawn["block"]
    fast, kv, prompt = drawn["weights"], drawn["kv_cache"], drawn["prompt"]
    off_disk = 100 - fast if drawn["rest"] == "cpu" else 0
    num_bytes = 2 * sum(math.prod(size) for _, size in SHAPES[drawn["shape"]].tensors())
    while block > 1 and rows * block * prompt[1] * num_bytes > _FLOPS * _AIM_S:
        block //= 2
    link = _DISK if on_cpu or not off_disk else parse_rate(drawn["device"])
    streamed_s = num_bytes * (100 - fast) / 100 / link
    step_s = max(streamed_s, block * num_bytes * (rows / _FLOPS + 1 / _MEMORY))
    output = max(6, min(96, round(_AIM_S / step_s)))
    others = {"strategy": drawn["strategy"], "prefetch_depth": drawn["prefetch_depth"]}
    if not on_cpu and kv < 100 and draw.random() < 0.5:
        others["cpu_attention"] = True
    others |= drawn["compress"]
    percent = (0, fast, 0, kv, 0, 100) if on_cpu else (fast, off_disk, kv, 100 - kv, 100, 0)
    told = ", ".join(f"{name} {value}" for name, value in others.items())
    shares = "/".join(map(str, percent))
    return Case(
        name=f"drawn {index}: {drawn['device']}, {rows} rows x {block}, {shares}, {told}",
        shape=drawn["shape"],
        requests=[Need(draw.randint(*prompt), output) for _ in range(rows * block)],
        rows=rows,
        block=block,
        percent=percent,
        emulate=None if on_cpu else f"h2d={drawn['device']},d2h={drawn['device']}",
        knobs=others,
    )


CASES = (*KNOWN, *_drawn())
HELD_OUT = frozenset(case.name for case in CASES[len(KNOWN) :])
