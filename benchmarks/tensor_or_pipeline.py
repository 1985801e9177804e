"""Eight GPUs for a model of 405B: split every layer, or cut the model into stages?

    PYTHONPATH=. python benchmarks/tensor_or_pipeline.py [--json FILE] [--num-prompts N]

Searches a plan for every way to share the model among eight H100s of one server, as
policies/hardware/8xh100.yaml describes them, in bfloat16 and with 8 bits per weight, and plays the
job: documents of 2,000 tokens, answers of 200. The search tries tokens per micro-batch around its
default only; here it is asked again with more of them, and the best answer counts. Nothing is run;
the machine that plays has no part in the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexpipe.errors import PlanError
from flexpipe.job.outlook import Inquiry
from flexpipe.job.table import markdown_table
from flexpipe.job.timeline import Timeline, play
from flexpipe.plan.arrangement import Arrangement
from flexpipe.units import format_seconds

MODEL, HARDWARE = "llama-3-405b", "8xh100"
PROMPT_LEN, GEN_LEN = 2000, 200
WAYS = ((1, 8), (2, 4), (4, 2), (8, 1))  # stages, shards of each
WEIGHTS = ("none", "8")
BATCH_TOKENS = (None, 8192, 16384)  # None: as the search likes


@dataclass(frozen=True, kw_only=True)
class Studied:
    """One way to share the model; seconds and bytes of the job, the latter of all GPUs' links."""

    num_stages: int
    num_shards: int
    compress_weight: str
    run_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    bottleneck: str
    bound_share: float
    bubbles: tuple[float, ...]
    busy: dict[str, float]
    link_bytes: dict[str, int]
    policies: list[dict[str, Any]]
    search_s: float

    @classmethod
    def of(cls, made: Timeline, arrangement: Arrangement, compress: str, took_s: float) -> Studied:
        told = made.prediction
        return cls(
            num_stages=arrangement.num_stages,
            num_shards=arrangement.num_shards,
            compress_weight=compress,
            run_s=told.run_s,
            prefill_s=told.prefill_s,
            decode_s=told.decode_s,
            tokens_per_s=told.generated_tokens_per_s,
            bottleneck=told.bottleneck,
            bound_share=told.bound_share,
            bubbles=tuple(stage.bubble for stage in told.stages),
            busy={name: seconds / told.run_s for name, seconds in told.busy_s.items()},
            link_bytes={n: size * arrangement.num_shards for n, size in told.link_bytes.items()},
            policies=[plan.policy.to_dict() for plan in made.plans],
            search_s=took_s,
        )

    @property
    def row(self) -> tuple[str, ...]:
        first = self.policies[0]
        rows = first["micro_batch_size"] * first["num_micro_batches"]
        return (
            f"PP {self.num_stages} x TP {self.num_shards}",
            "bfloat16" if self.compress_weight == "none" else f"{self.compress_weight} bits",
            f"{self.tokens_per_s:.0f}",
            format_seconds(self.run_s),
            f"{sum(self.bubbles) / len(self.bubbles):.0%}",
            f"{self.busy.get('reduce', 0.0):.0%}",
            f"{self.bottleneck}, {self.bound_share:.0%}",
            f"{rows * self.num_stages}",
            f"{first['max_batch_tokens']}",
        )


HEAD = (
    "ranks", "weights", "tokens/s", "prefill and decode", "bubble", "reduce lane", "bottleneck",
    "rows in flight", "tokens per micro-batch",
)  # fmt: skip


def best_of(num_stages: int, num_shards: int, compress: str, num_prompts: int) -> Studied:
    """The fastest that fits."""
    tried = [
        study(num_stages, num_shards, compress, num_prompts, tokens) for tokens in BATCH_TOKENS
    ]
    return min((one for one in tried if one is not None), key=lambda one: one.run_s)


def study(
    num_stages: int, num_shards: int, compress: str, num_prompts: int, tokens: int | None
) -> Studied | None:
    """None where nothing fits."""
    arrangement = Arrangement(num_stages=num_stages, num_shards=num_shards)
    inquiry = Inquiry(
        model=MODEL,
        num_prompts=num_prompts,
        prompt_len=PROMPT_LEN,
        gen_len=GEN_LEN,
        hardware=HARDWARE,
    )
    given: dict[str, Any] = {"compress_weight": compress}
    if tokens is not None:
        given["max_batch_tokens"] = tokens
    began = time.monotonic()
    outlook = inquiry.outlook(given, num_shards=num_shards)
    try:
        made = play(outlook, [given] * num_stages, arrangement, draws=False)
    except PlanError as error:
        print(f"PP {num_stages} x TP {num_shards}, {compress}, {tokens}: {error}")
        return None
    made_of = Studied.of(made, arrangement, compress, time.monotonic() - began)
    print(" | ".join(made_of.row), f"({made_of.search_s:.0f} s)", flush=True)
    return made_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--num-prompts", type=int, default=40_000)
    options = parser.parse_args()
    found = []
    for compress in WEIGHTS:
        for num_stages, num_shards in WAYS:
            found.append(best_of(num_stages, num_shards, compress, options.num_prompts))
    print(markdown_table(HEAD, [one.row for one in found]))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
