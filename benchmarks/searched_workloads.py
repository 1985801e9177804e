"""Workloads that a search is judged by, and the policies it has to beat.

Each asks for another trade: nothing moves; weights come from the disk, once per block; the KV cache
of all requests is larger than memory; a link to a small accelerator is the narrow place. Policies
are drawn so that each value of each knob comes equally often, in combinations that a seed shuffles.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.checkpoint import Shape
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import STRATEGIES, Shares
from flexpipe.units import MIB

SEED = 2026
NUM_DRAWN = 40
SEARCHED: Mapping[str, Any] = {}  # no knob at all

CPU, DISK, GPU = Shares(cpu=1.0), Shares(disk=1.0), Shares(gpu=1.0)
# whole plans that people try first; what they leave open is the search's
NAIVE: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cpu": {
        "all resident": {"weights": CPU, "kv_cache": CPU, "hidden": CPU},
        "all weights streamed": {"weights": DISK, "kv_cache": CPU, "hidden": CPU},
        "all on disk": {"weights": DISK, "kv_cache": DISK, "hidden": CPU},
    },
    "emulated": {
        "all resident": {"weights": GPU, "kv_cache": GPU, "hidden": GPU},
        "all weights streamed": {"weights": CPU, "kv_cache": GPU, "hidden": GPU},
        "all on the CPU": {
            "weights": CPU, "kv_cache": CPU, "hidden": CPU, "cpu_attention": True,
        },
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What is asked of a model of this shape, and the values that policies are drawn from."""

    name: str
    shape: Shape
    num_prompts: int
    prompt_len: int
    gen_len: int
    given: Mapping[str, Any] = field(default_factory=dict)
    emulate: str | None = None
    axes: Mapping[str, Sequence[Any]]

    @property
    def device(self) -> str:
        return "cpu" if self.emulate is None else "emulated"

    @property
    def emulation(self) -> Emulation | None:
        return None if self.emulate is None else Emulation.parse(self.emulate)

    @property
    def load(self) -> dict[str, int]:
        """The fields of bench's `Workload`: one run, no warm-up."""
        return {
            "num_prompts": self.num_prompts,
            "prompt_len": self.prompt_len,
            "gen_len": self.gen_len,
            "warmup": 0,
            "repetitions": 1,
        }

    @property
    def told(self) -> str:
        given = ", ".join(f"{name} {value / MIB:.0f} MiB" for name, value in self.given.items())
        emulate = f"--emulate {self.emulate}" if self.emulate else ""
        limits = "; ".join(filter(None, (emulate, given)))
        return (
            f"{self.num_prompts} prompts of {self.prompt_len} tokens, {self.gen_len} to generate "
            f"for each; hidden {self.shape.hidden}, {self.shape.layers} layers, "
            f"{self.shape.kv_heads} KV heads, bfloat16 checkpoint{'; ' if limits else ''}{limits}."
        )

    def settings(self) -> list[Mapping[str, Any]]:
        """Every policy to compare; the searched plan first, so a sweep cut short tells of it."""
        return [SEARCHED, *NAIVE[self.device].values(), *self.drawn()]

    def drawn(self) -> Iterator[dict[str, Any]]:
        draw = random.Random(SEED)
        columns = {name: shuffled(values, NUM_DRAWN, draw) for name, values in self.axes.items()}
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


def shuffled(values: Sequence[Any], count: int, draw: random.Random) -> list[Any]:
    """So many values, each as often as any other, or once more."""
    column = (list(values) * -(-count // len(values)))[:count]
    draw.shuffle(column)
    return column


def parts(tier: str, rest: str, *percents: int) -> list[Shares]:
    """So many percent on `tier` each, what is left on `rest`."""
    return [Shares(**{tier: n / 100, rest: 1 - n / 100}) for n in percents]


SMALL = Shape(hidden=1024, layers=16, heads=16, kv_heads=4, ffn=2816)
HEADS = Shape(hidden=1024, layers=12, heads=16, kv_heads=16, ffn=2816)
WIDE = Shape(hidden=2048, layers=12, heads=32, kv_heads=8, ffn=5632)

COMMON: Mapping[str, Sequence[Any]] = {
    "strategy": STRATEGIES,
    "separate_layers": (False, True),
    "prefetch_depth": (1, 2, 3),
    "compute_dtype": (*["bfloat16"] * 6, "float32"),
    "resident_dtype": ("compute", "checkpoint"),
    "max_batch_tokens": (128, 512, 2048, 8192),
}
ON_CPU = {**COMMON, "hidden": (CPU,)}
OFTEN_OVERLAPPED = (*STRATEGIES, "event", "event")
WORKLOADS = (
    Searched(
        name="weights partly on disk",
        shape=WIDE, num_prompts=48, prompt_len=32, gen_len=10, given={"cpu_mem": 1400 * MIB},
        axes={
            **ON_CPU,
            "micro_batch_size": (12, 16, 24, 48),
            "num_micro_batches": (1, 2, 4),
            "weights": (*parts("cpu", "disk", 10, 20, 30, 40, 50, 60, 70), DISK),
            "kv_cache": (CPU, CPU, CPU, DISK),
        },
    ),
    Searched(
        name="emulated small GPU",
        shape=SMALL, num_prompts=80, prompt_len=32, gen_len=20,
        emulate="h2d=2GB/s,d2h=2GB/s,memory=352MiB",
        axes={
            **COMMON,
            "strategy": OFTEN_OVERLAPPED,
            "cpu_attention": (False, False, True),
            "hidden": (GPU, GPU, CPU),
            "pin_weights": (True, True, False),
            "micro_batch_size": (20, 40, 80, 80),
            "num_micro_batches": (1, 2, 4),
            "weights": (*parts("gpu", "cpu", 10, 20, 30, 40, 40), CPU, DISK),
            "kv_cache": (GPU, GPU, GPU, CPU, *parts("gpu", "cpu", 50), DISK),
        },
    ),
    Searched(
        name="KV cache larger than RAM",
        shape=HEADS, num_prompts=64, prompt_len=64, gen_len=16, given={"cpu_mem": 1024 * MIB},
        axes={
            **ON_CPU,
            "strategy": OFTEN_OVERLAPPED,
            "micro_batch_size": (16, 32, 64),
            "num_micro_batches": (1, 2, 4),
            "weights": (CPU, CPU, CPU, *parts("cpu", "disk", 75, 50), DISK),
            "kv_cache": (CPU, CPU, *parts("cpu", "disk", 75, 50, 25), DISK),
        },
    ),
    Searched(
        name="in RAM",
        shape=SMALL, num_prompts=80, prompt_len=32, gen_len=20,
        axes={
            **ON_CPU,
            "strategy": OFTEN_OVERLAPPED,
            "micro_batch_size": (20, 40, 80, 80),
            "num_micro_batches": (1, 2, 4),
            "weights": (CPU, CPU, CPU, *parts("cpu", "disk", 80), DISK),
            "kv_cache": (CPU, CPU, CPU, *parts("cpu", "disk", 50)),
        },
    ),
)  # fmt: skip
