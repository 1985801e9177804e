"""What does the engine itself cost, in µs per op?

*Empty*: the real schedule, dispatcher and lanes run ops whose work is left out; only tokens are
committed, so that the job goes on. *Whole*: the same job with its work, where the overhead is the
wall time that the compute lane did not spend computing. *Builder*: the schedule alone, with nobody
to run it. The compute lane has one thread.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
from flexpipe.job.probes import Probes
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import percent_shares
from flexpipe.runtime.stage import SampledToken, Stage
from flexpipe.schedule.build import schedule
from flexpipe.schedule.op import Kind, Op
from flexpipe.schedule.step import MicroBatch, Row

AIM_US = 60
LAYERS, VOCAB, ROWS, BLOCK = 8, 256, 2, 4
FAST = Emulation(h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12)

# name -> device, --percent
CASES: dict[str, tuple[str, tuple[float, ...]]] = {
    "cpu, all in memory": ("cpu", (0, 100, 0, 100, 0, 100)),
    "cpu, weights on disk": ("cpu", (0, 0, 0, 100, 0, 100)),
    "emulated, weights and KV cache on cpu": ("emulated", (0, 100, 0, 100, 100, 0)),
    "emulated, everything on every tier": ("emulated", (34, 33, 34, 33, 34, 33)),
}


def leave_out_work(stage: Stage) -> None:
    """Make every op of `stage` do nothing, except that a COMMIT commits a token per row."""
    done = stage._commit_rows

    def perform(op: Op) -> None:
        if op.kind == Kind.COMMIT:
            assert op.batch is not None
            done(op.batch, [SampledToken(row, 3, True) for row in op.batch.rows if row.sampled])

    stage.perform = perform  # type: ignore[method-assign]


def measure(directory: Path, model: Path, case: str, tokens: int, probes: Probes) -> Trial:
    device, percent = CASES[case]
    shares: dict[str, Any] = percent_shares(percent)
    return run_trial(
        directory,
        model=model,
        prompts=uniform_prompts(ROWS * BLOCK, 4, VOCAB),
        max_tokens=tokens,
        device=device,
        emulation=FAST if device == "emulated" else None,
        given={**shares, "micro_batch_size": ROWS, "num_micro_batches": BLOCK},
        probes=probes,
    )


def empty_us(directory: Path, model: Path, case: str, tokens: int) -> tuple[float, int]:
    trial = measure(directory, model, case, tokens, Probes(on_stage=leave_out_work))
    return 1e6 * trial.wall_s / trial.num_ops, trial.num_ops


def whole_us(directory: Path, model: Path, case: str, tokens: int) -> float:
    trial = measure(directory, model, case, tokens, Probes())
    busy = trial.recorder.busy_s
    computing_s = sum(busy[kind] for kind in (Kind.COMPUTE, Kind.SAMPLE, Kind.FETCH_TOKENS))
    return float(1e6 * (trial.wall_s - computing_s) / trial.num_ops)


def builder_us(directory: Path, model: Path, case: str, tokens: int) -> float:
    """µs per op of the schedule alone: steps in, ops out, nothing runs."""
    plans: list[Any] = []
    measure(directory, model, case, 1, Probes(on_stage=lambda stage: plans.append(stage.plan)))
    (plan,) = plans
    steps = _decode_steps(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in schedule(plan, steps))
    return 1e6 * (time.perf_counter() - start) / count


def _decode_steps(num_steps: int) -> Callable[[int], list[MicroBatch] | None]:
    def steps(index: int) -> list[MicroBatch] | None:
        if index == num_steps:
            return None
        return [
            MicroBatch(mb, tuple(Row(0, place, 4 + index, (3,), True) for place in range(ROWS)))
            for mb in range(BLOCK)
        ]

    return steps


def run_case(directory: Path, model: Path, case: str, tokens: int, rounds: int) -> dict[str, Any]:
    empty = [empty_us(directory, model, case, tokens) for _ in range(rounds)]
    return {
        "case": case,
        "ops": empty[0][1],
        "empty_us": Sample(tuple(value for value, _ in empty)).to_dict(),
        "builder_us": Sample(
            tuple(builder_us(directory, model, case, tokens) for _ in range(rounds))
        ).to_dict(),
        "whole_us": Sample(
            tuple(whole_us(directory, model, case, tokens) for _ in range(rounds))
        ).to_dict(),
    }


def table(results: list[dict[str, Any]]) -> str:
    def shown(sample: dict[str, Any]) -> str:
        return f"{sample['median']:.0f} ({sample['min']:.0f}-{sample['max']:.0f})"

    rows = [
        [r["case"], r["ops"], *(shown(r[key]) for key in ("builder_us", "empty_us", "whole_us"))]
        for r in results
    ]
    head = ("policy", "ops", "builder alone, µs", "empty ops, µs", "whole job, µs")
    return markdown(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", metavar="CASE", help="profile its main thread")
    args = parser.parse_args()
    tokens, rounds = (6, 1) if args.quick else (40, args.rounds)
    facts = machine()
    torch.set_num_threads(1)
    with scratch() as directory:
        model = llama_shape(
            directory / "model", layers=LAYERS, hidden=64, ffn=96, heads=4, vocab=VOCAB
        )
        measure(directory, model, next(iter(CASES)), 2, Probes())  # imports, dummy weights
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(empty_us, directory, model, args.profile, tokens)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            return 0
        results = [run_case(directory, model, case, tokens, rounds) for case in CASES]
    print(table(results))
    missed = [r["case"] for r in results if r["empty_us"]["median"] > AIM_US]
    print(f"\nat most {AIM_US} µs per empty op" + (f" except: {missed}" if missed else ""))
    if args.json is not None:
        text = json.dumps({"machine": facts, "rounds": rounds, "results": results}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
