"""What do ragged answers cost, when a finished row's place is taken at once?

400 prompts, all asking for up to 256 tokens; their true lengths are log-normal (median 24, sigma
1), hidden from the scheduler and forced by a hook. Against them the same number of prompts and of
output tokens in equal lengths. The drain tail (steps after the last prompt took its place) is told
apart.

    PYTHONPATH=. python benchmarks/refill.py [--json FILE] [--prompts 400] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.trial import Trial, llama_shape, machine, markdown, run_trial, scratch

MAX_TOKENS = 256
PROMPT_LENGTH = 32
SHAPE = {"layers": 8, "hidden": 768, "ffn": 2048, "heads": 12, "vocab": 8000}


class StopAfter:
    """Ends an answer after so many tokens, which nobody knows before."""

    def __init__(self, num_tokens: int) -> None:
        self._left = num_tokens

    def push(self, token: int) -> bool:
        self._left -= 1
        return self._left <= 0


def lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal output lengths, median 24, sigma 1, cut at 256."""
    draw = random.Random(seed)
    drawn = (round(draw.lognormvariate(math.log(24), 1)) for _ in range(count))
    return [min(MAX_TOKENS, max(1, length)) for length in drawn]


def equal(ragged: Sequence[int]) -> list[int]:
    """As many numbers with the same sum, as equal as whole numbers can be."""
    total, count = sum(ragged), len(ragged)
    return [total // count + (i < total % count) for i in range(count)]


def run(folder: Path, model: Path, outputs: Sequence[int], given: dict[str, Any]) -> Trial:
    from flexpipe.job.batcher import Admitted
    from flexpipe.job.probes import Probes

    def on_admit(request: Admitted) -> Admitted:
        stop = StopAfter(outputs[request.entry.index - 1])
        return replace(request, stop=stop, eos_token_ids=frozenset())

    draw = random.Random(1)
    prompts = [[draw.randrange(3, SHAPE["vocab"]) for _ in range(PROMPT_LENGTH)] for _ in outputs]
    return run_trial(
        folder,
        model=model,
        prompts=prompts,
        max_tokens=MAX_TOKENS,
        given=given,
        device="cpu",
        probes=Probes(on_admit=on_admit),
    )


def settings() -> dict[str, dict[str, Any]]:
    from flexpipe.plan.policy import Shares

    block = {"micro_batch_size": 64, "num_micro_batches": 1}
    return {
        "in RAM": block,
        "weights streamed from disk": {**block, "weights": Shares(disk=1.0)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ragged = lengths(args.prompts)
    rows = []
    with scratch() as folder:
        model = llama_shape(folder / "model", **SHAPE)
        for setting, given in settings().items():
            times: dict[str, list[Trial]] = {"ragged": [], "equal": []}
            for _ in range(args.rounds):
                times["ragged"].append(run(folder, model, ragged, given))
                times["equal"].append(run(folder, model, equal(ragged), given))
            rows.append(_row(setting, times))
            print(rows[-1], flush=True)
    print("\n" + _table(rows))
    if args.json:
        facts = {"rows": rows, "output_tokens": sum(ragged), "machine": machine()}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _row(setting: str, times: dict[str, list[Trial]]) -> dict[str, Any]:
    ragged = [trial.wall_s for trial in times["ragged"]]
    equal_s = [trial.wall_s for trial in times["equal"]]
    tail = [trial.report.tail_s for trial in times["ragged"]]
    ratios = [a / b for a, b in zip(ragged, equal_s, strict=True)]
    steady = [
        (a - t) / (b - e.report.tail_s)
        for a, t, b, e in zip(ragged, tail, equal_s, times["equal"], strict=True)
    ]
    return {
        "setting": setting,
        "equal_s": statistics.median(equal_s),
        "ragged_s": statistics.median(ragged),
        "tail_s": statistics.median(tail),
        "tail_steps": times["ragged"][0].report.tail_steps,
        "tail_bound_s": statistics.median(t.report.tail_bound_s for t in times["ragged"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "steady_ratio": statistics.median(steady),
        "useful_rows": times["ragged"][0].report.useful_rows,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        *("setting", "equal, s", "ragged, s", "ratio", "spread", "before tail", "tail, s"),
        *("its steps", "its bound, s", "rows"),
    )
    return markdown(
        head,
        [
            (
                row["setting"],
                f"{row['equal_s']:.2f}",
                f"{row['ragged_s']:.2f}",
                f"**{row['ratio']:.2f}**",
                f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
                f"{row['steady_ratio']:.2f}",
                f"{row['tail_s']:.2f}",
                row["tail_steps"],
                f"{row['tail_bound_s']:.2f}",
                f"{row['useful_rows']:.0%}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
