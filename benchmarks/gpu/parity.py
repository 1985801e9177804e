"""Do all strategies and placements emit the reference's tokens?

Tiny random models in float32, each prompt compared with transformers on the CPU. TF32 is off: it
would change logits by a thousand times the margin that counts as a tie.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Bench, Finding
from benchmarks.trial import run_trial
from flexpipe.plan.codec import Codec
from flexpipe.plan.policy import STRATEGIES, percent_shares
from tests.hf import (
    CODED_TIE,
    TIE,
    Disagreement,
    Reference,
    build_checkpoint,
    check_tokens,
    load_reference_model,
    ragged_prompts,
    reference_generate,
    widened_checkpoint,
)

FAMILIES = ("opt", "llama3", "qwen3", "mistral")
LENGTHS = (1, 5, 9, 30, 33, 70, 64, 17, 120)
PLACEMENTS: Mapping[str, Sequence[float]] = {
    "gpu": (100, 0, 100, 0, 100, 0),
    "cpu": (0, 100, 0, 100, 0, 100),
    "disk": (0, 0, 0, 0, 0, 0),
    "mixed": (20, 40, 34, 33, 34, 33),
    "attention on the CPU": (20, 40, 34, 33, 34, 33),
}
KNOBS: Mapping[str, Mapping[str, Any]] = {"attention on the CPU": {"cpu_attention": True}}
COMPRESSED = dict.fromkeys(("compress_weight", "compress_vocabulary", "compress_cache"), "8")
END = 2


def check(bench: Bench) -> Finding:
    """Compare every run's tokens with the reference's, up to ties."""
    torch.set_float32_matmul_precision("highest")
    max_new = 4 if bench.small else 12
    differ: list[str] = []
    count = 0
    for family in FAMILIES[:1] if bench.small else FAMILIES:
        model = build_checkpoint(family, bench.directory / family)
        reference = reference_generate(
            load_reference_model(model), ragged_prompts(LENGTHS), max_new
        )
        for strategy, placement in _runs(bench):
            count += 1
            tokens = _tokens(bench, model, reference, max_new, _given(strategy, placement))
            differ += [
                f"{family}, {placement}, {strategy}: {text}"
                for text in _differences(reference, tokens, max_new)
            ]
        widened = widened_checkpoint(model, bench.directory / f"{family}-widened", COMPRESSED)
        compressing = reference_generate(
            load_reference_model(widened), ragged_prompts(LENGTHS), max_new, Codec(bits=8)
        )
        for placement in PLACEMENTS:
            count += 1
            given = {**_given("event", placement), **COMPRESSED}
            tokens = _tokens(bench, model, compressing, max_new, given)
            differ += [
                f"{family}, {placement}, in 8 bits: {text}"
                for text in _differences(compressing, tokens, max_new, CODED_TIE)
            ]
    return Finding(
        passed=not differ,
        summary=f"{count} runs of {len(LENGTHS)} prompts, {len(differ)} prompts differ",
        figures={"runs": count, "differences": len(differ)},
        details=differ[:10],
    )


def _tokens(
    bench: Bench, model: Path, reference: Reference, max_new: int, given: Mapping[str, Any]
) -> Mapping[str, Sequence[int]]:
    return run_trial(
        bench.directory,
        model=model,
        load_format="auto",
        prompts=reference.prompts,
        max_tokens=max_new,
        device=bench.device,
        emulation=bench.emulation(),
        given=given,
    ).tokens


def _runs(bench: Bench) -> Sequence[tuple[str, str]]:
    if not bench.small:
        return list(itertools.product(STRATEGIES, PLACEMENTS))
    others = [("event", name) for name in PLACEMENTS if name != "mixed"]
    return [*((name, "mixed") for name in STRATEGIES), *others]


def _given(strategy: str, placement: str) -> dict[str, Any]:
    return {
        **percent_shares(PLACEMENTS[placement]),
        **KNOBS.get(placement, {}),
        "micro_batch_size": 3,
        "num_micro_batches": 3,
        "strategy": strategy,
        "compute_dtype": "float32",
    }


def _differences(
    reference: Reference, tokens: Mapping[str, Sequence[int]], max_new: int, tie: float = TIE
) -> list[str]:
    found = []
    for index in range(len(reference.prompts)):
        mine = tokens[str(index)]
        try:
            if len(mine) < max_new and (not mine or mine[-1] != END):
                raise Disagreement(f"prompt {index} ended after {len(mine)} tokens")
            check_tokens(reference, index, mine, tie)
        except Disagreement as error:
            found.append(str(error))
    return found
