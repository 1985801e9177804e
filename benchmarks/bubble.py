"""How much of its time does a stage of a pipeline idle, and what would fill it?

*Formula*: (N - 1) / (N - 1 + M) for N equal stages and M blocks in flight, whose rounds drain.
*Predicted*: the simulator, playing every rank's ops of the whole job. The stages are emulated
accelerators with a compute rate, so that they are equal but for what they do beside their layers.
The decode bubble leaves out prefill and one fill and drain.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from benchmarks.trial import llama_shape, markdown, scratch
from flexpipe.job.outlook import Shape
from flexpipe.memory.paper import paper_forms
from flexpipe.plan.block import Need
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Budgets
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.predict import Assignment, Effort, Prediction, predict_stages
from flexpipe.policy.profile import read_profile
from flexpipe.preset import hardware_file

LAYERS, HIDDEN, VOCAB = 16, 1024, 256
ROWS, PROMPT, OUTPUT = 8, 32, 17
RATE = 2e9  # FLOP/s of an emulated stage: a layer of a decoding micro-batch takes 100 ms
ROOMY = Budgets(gpu=2**40, cpu=2**40, disk=2**40)
WHOLE = Effort(exact_ops=10**9)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pipeline: its shape, and the share of its time in which stages idle."""

    num_stages: int
    num_blocks: int
    num_chunks: int
    strategy: str
    formula: float
    predicted: float  # mean over the stages
    predicted_stages: Sequence[float]
    predicted_decode: float
    tokens_per_s: float


@cache
def model() -> Shape:
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "ffn": 4 * HIDDEN, "heads": 8, "vocab": VOCAB}
    with scratch() as directory:
        return Shape.open(str(llama_shape(directory, **sizes)))


def predicted(
    num_stages: int, num_blocks: int, num_chunks: int, strategy: str, output: int = OUTPUT
) -> Prediction:
    shape = model()
    count = num_stages * num_chunks
    pipeline = Pipeline(
        layers=(LAYERS // count,) * count, num_stages=num_stages, num_blocks=num_blocks
    )
    gpu = Shares(gpu=1.0)
    policy = Policy(weights=gpu, kv_cache=gpu, hidden=gpu, micro_batch_size=ROWS, strategy=strategy)
    needs = [Need(PROMPT, output)] * (ROWS * num_blocks)
    profile, emulation = read_profile(hardware_file("cpu-2core")), Emulation(flops_per_s=RATE)
    stages = [
        Assignment(
            plan=Planner(
                shape.config,
                needs,
                shape.stored,
                ROOMY,
                device_tier=Tier.GPU,
                compute_dtype="float32",
                form_of=paper_forms(shape.config),
                pipeline=pipeline,
                rank=rank,
            )(policy),
            profile=profile,
            emulation=emulation,
        )
        for rank in range(num_stages)
    ]
    return predict_stages(stages, needs, effort=WHOLE)


def row(num_stages: int, num_blocks: int, num_chunks: int, strategy: str) -> Row:
    shape = num_stages, num_blocks, num_chunks, strategy
    made = predicted(*shape)
    bubbles = [stage.bubble for stage in made.stages]
    return Row(
        num_stages=num_stages,
        num_blocks=num_blocks,
        num_chunks=num_chunks,
        strategy=strategy,
        formula=(num_stages - 1) / (num_stages - 1 + num_blocks),
        predicted=sum(bubbles) / len(bubbles),
        predicted_stages=bubbles,
        predicted_decode=_decode_bubble(made, predicted(*shape, output=2 * OUTPUT)),
        tokens_per_s=made.generated_tokens_per_s,
    )


def _decode_bubble(short: Prediction, long: Prediction) -> float:
    """Of the steps that a job with longer answers has more, which neither fill nor drain."""
    more_s = long.run_s - short.run_s
    shares = [
        1 - ((1 - late.bubble) * long.run_s - (1 - early.bubble) * short.run_s) / more_s
        for early, late in zip(short.stages, long.stages, strict=True)
    ]
    return sum(shares) / len(shares)


def rows(num_stages: Sequence[int]) -> Iterator[Row]:
    for count, times, strategy in itertools.product(num_stages, (1, 2, 4), ("multi", "event")):
        yield row(count, count * times, 1, strategy)
    for count, strategy in itertools.product(num_stages, ("multi", "event")):
        yield row(count, count, 2, strategy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = list(rows(asked.stages))
    head = ("stages", "blocks", "chunks", "strategy", "formula", "predicted", "in decode alone")
    table = [
        (
            str(one.num_stages),
            str(one.num_blocks),
            str(one.num_chunks),
            one.strategy,
            "" if one.strategy == "event" else f"{one.formula:.1%}",
            f"{one.predicted:.1%}",
            f"{one.predicted_decode:.1%}",
        )
        for one in found
    ]
    print(markdown(head, table))
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
