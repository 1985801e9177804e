"""What does each switch that saves bytes gain, where a link of 2 GB/s is the bound?

A Llama shape in float32 on the emulated accelerator, weights and KV cache in host memory, many
decode steps: every step brings all weights, and the whole KV cache unless it stays. Computing is
real, on this machine's cores, and short beside the link.

    predicted = bytes of a decode step over h2d ÷ 2 GB/s, from the plan alone

is set beside the mean decode step that was measured. Rounds are interleaved; tokens of lossless
settings must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.trial import (
    Sample,
    Trial,
    llama_shape,
    machine,
    markdown,
    run_trial,
    scratch,
    uniform_prompts,
)
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import percent_shares
from flexpipe.plan.tier import Tier

LINK_BYTES_PER_S = 2e9
LAYERS, HIDDEN, FFN, HEADS, VOCAB = 6, 1024, 2816, 16, 2048
ROWS, BLOCK, PROMPT, OUTPUT = 8, 2, 256, 17
BASE: Mapping[str, Any] = {
    **percent_shares([0, 100, 0, 100, 100, 0]),
    "micro_batch_size": ROWS,
    "num_micro_batches": BLOCK,
    "compute_dtype": "float32",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "weights in 8 bits": {"compress_weight": "8"},
    "weights in 4 bits": {"compress_weight": "4"},
    "KV cache in 8 bits": {"compress_cache": "8"},
    "KV cache in 4 bits": {"compress_cache": "4"},
    "attention on the CPU": {"cpu_attention": True},
    "weights in 4 bits, attention on the CPU": {"compress_weight": "4", "cpu_attention": True},
    "all in 4 bits": {"compress_weight": "4", "compress_cache": "4"},
    "all in 4 bits, attention on the CPU": {
        "compress_weight": "4",
        "compress_cache": "4",
        "cpu_attention": True,
    },
}
LOSSLESS = ("nothing", "attention on the CPU")


def predicted_s(plan: Plan) -> float:
    """Seconds that the mean decode step's bytes take on the way to the device."""
    num_bytes = sum(layer.streamed.num_bytes for layer in plan.layers)
    tokens = PROMPT + (OUTPUT - 1) / 2  # behind a row in the middle of its answer
    for mb in plan.micro_batches:
        rows = len(mb.places(Tier.CPU))
        if plan.attends_on_cpu:
            heads = plan.config.num_heads * plan.config.head_dim
            num_bytes += rows * heads * plan.compute_bytes * plan.config.num_layers
        else:
            num_bytes += int(rows * tokens * plan.token_bytes * plan.config.num_layers)
        num_bytes += rows * plan.config.input_size * plan.compute_bytes  # embeddings
    return num_bytes / LINK_BYTES_PER_S


def measure(directory: Path, model: Path, knobs: Mapping[str, Any]) -> Trial:
    return run_trial(
        directory,
        model=model,
        prompts=uniform_prompts(ROWS * BLOCK, PROMPT, VOCAB),
        max_tokens=OUTPUT,
        given={**BASE, **knobs},
        emulation=Emulation(h2d_bytes_per_s=LINK_BYTES_PER_S, d2h_bytes_per_s=LINK_BYTES_PER_S),
    )


def decode_step_s(trial: Trial) -> float:
    return float(trial.report.decode_s) / (OUTPUT - 1)


def run(rounds: int) -> list[dict[str, Any]]:
    steps: dict[str, list[float]] = {name: [] for name in SETTINGS}
    predicted: dict[str, float] = {}
    with scratch() as directory:
        model = llama_shape(
            directory / "model", layers=LAYERS, hidden=HIDDEN, ffn=FFN, heads=HEADS, vocab=VOCAB
        )
        measure(directory, model, SETTINGS["all in 4 bits"])  # writes weights, compresses them
        for _ in range(rounds):
            answers = {}
            for name, knobs in SETTINGS.items():
                trial = measure(directory, model, knobs)
                steps[name].append(decode_step_s(trial))
                predicted[name] = predicted_s(trial.plan)
                answers[name] = json.dumps(sorted(trial.tokens.items()))
            assert len({answers[name] for name in LOSSLESS}) == 1
    first = statistics.median(steps["nothing"])
    return [
        {
            "setting": name,
            "predicted_s": predicted[name],
            "measured_s": Sample(tuple(values)).to_dict(),
            "gain": first / statistics.median(values),
            "predicted_gain": predicted["nothing"] / predicted[name],
        }
        for name, values in steps.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            result["setting"],
            f"{1e3 * result['predicted_s']:.0f}",
            f"{1e3 * result['measured_s']['median']:.0f} "
            f"({1e3 * result['measured_s']['min']:.0f}-{1e3 * result['measured_s']['max']:.0f})",
            f"{result['predicted_gain']:.2f}",
            f"{result['gain']:.2f}",
        ]
        for result in results
    ]
    head = ("setting", "predicted, ms a step", "measured, ms", "predicted gain", "gain")
    return markdown(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    facts = machine()
    results = run(args.rounds)
    print(table(results))
    if args.json is not None:
        text = json.dumps({"machine": facts, "rounds": args.rounds, "results": results}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
