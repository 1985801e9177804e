"""Is every kind of dependency needed, and would these runs notice if one were missing?

One kind of edge after the other is dropped from the schedule while the ops that come first over it
are slowed down, on a stream by keeping the device busy. Tokens must then differ from the whole
schedule's, or the run must fail. Slots hold rubbish until they are filled.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Bench, Finding
from benchmarks.trial import run_trial
from flexpipe.errors import FlexpipeError
from flexpipe.job.probes import Probes
from flexpipe.plan.policy import percent_shares
from flexpipe.runtime.dispatcher import STREAMS
from flexpipe.schedule.check import without_edges
from flexpipe.schedule.op import LANE_OF, Lane, Op
from tests.hf import build_checkpoint, ragged_prompts

LENGTHS = (5, 9, 30, 33, 64, 70, 17, 40, 3)
DELAY_S = 0.006
SEEDS = range(3)

Delays = Callable[[Op], float]


@dataclass(slots=True)
class _Edges:
    """Edges of one kind: whom they wait for, and whether any joins two lanes."""

    waited_for: set[int] = field(default_factory=set)
    crosses: bool = False


def check(bench: Bench) -> Finding:
    """Drop each kind of edge in turn; what no run notices must be kept by something else."""
    model = build_checkpoint("llama3", bench.directory / "model")
    kinds: dict[str, _Edges] = defaultdict(_Edges)
    whole = _tokens(bench, model, Probes(poison=True, change_ops=lambda ops: _watch(ops, kinds)))
    slowed = _tokens(bench, model, Probes(poison=True, before_op=_slow(bench, random_delays(0))))
    if whole != slowed:
        return Finding(passed=False, summary="delays alone change the tokens")
    dropped = sorted(kinds)[:: 4 if bench.small else 1]  # a dry run drops a few kinds
    verdicts = {
        kind: _noticed_apart(bench, model, kind, kinds[kind].waited_for, whole) for kind in dropped
    }
    unseen = [kind for kind, how in verdicts.items() if how is None]
    # a stream runs its ops in the order of issue, so there such an edge may be kept all the same
    in_order = [kind for kind in unseen if not bench.is_emulated and not kinds[kind].crosses]
    missed = [kind for kind in unseen if kind not in in_order]
    return Finding(
        passed=not missed,
        summary=f"{len(dropped) - len(unseen)} of {len(dropped)} kinds of dependency are noticed "
        "when they are missing"
        + (f", {len(in_order)} are kept by their stream" if in_order else ""),
        figures={"verdicts": {kind: how or "not noticed" for kind, how in verdicts.items()}},
        details=[f"{kind}: not noticed" for kind in missed],
    )


def _watch(ops: Iterable[Op | None], kinds: dict[str, _Edges]) -> Iterator[Op | None]:
    """Note each kind of edge.

    Left out is what no run can show: the strategy's edges, and that a step is not known before the
    tokens it starts from.
    """
    lanes: dict[int, Lane] = {}
    for op in ops:
        if op is not None:
            lanes[op.id] = op.lane
            for wait in op.waits_for:
                if wait.why != "strategy" and not wait.why.startswith("known:"):
                    kinds[wait.why].waited_for.add(wait.op)
                    kinds[wait.why].crosses |= lanes[wait.op] != op.lane
        yield op


def _noticed_apart(bench: Bench, *about: Any) -> str | None:
    """`_noticed`, on a real device in a process of its own: a mutant may lose the device."""
    if bench.is_emulated:
        return _noticed(bench, *about)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(_noticed, bench, *about).result()


def _noticed(
    bench: Bench, model: Path, kind: str, waited_for: set[int], whole: Mapping[str, Any]
) -> str | None:
    """How a run without this kind of edge shows, None if it does not."""
    late: Delays = lambda op: DELAY_S if op.id in waited_for else 0.0  # noqa: E731
    for delays in (late, *(random_delays(seed) for seed in SEEDS)):
        probes = Probes(
            poison=True,
            before_op=_slow(bench, delays),
            change_ops=lambda ops: without_edges(ops, kind),
        )
        try:
            if _tokens(bench, model, probes) != whole:
                return "tokens differ"
        except FlexpipeError as error:
            return f"fails: {str(error)[:80]}"
    return None


def random_delays(seed: int) -> Delays:
    """One lane is slow, the others now and then."""
    rng = random.Random(seed)
    slow = list(dict.fromkeys(LANE_OF.values()))[seed % len(set(LANE_OF.values()))]

    def choose(op: Op) -> float:
        return DELAY_S if op.lane == slow or rng.random() < 0.1 else 0.0

    return choose


def _slow(bench: Bench, delays: Delays) -> Callable[[Op], None]:
    """A hook that delays an op: its stream where it runs on one, else its thread."""
    on_device = {kind for kind, lane in LANE_OF.items() if lane in STREAMS}

    def delay(op: Op) -> None:
        seconds = delays(op)
        if seconds <= 0:
            return
        if not bench.is_emulated and op.kind in on_device:
            torch.cuda._sleep(int(seconds * 1.5e9))  # in cycles, on the current stream
        else:
            time.sleep(seconds)

    return delay


def _tokens(bench: Bench, model: Path, probes: Probes) -> Mapping[str, Any]:
    trial = run_trial(
        bench.directory,
        model=model,
        load_format="auto",
        prompts=ragged_prompts(LENGTHS),
        max_tokens=3,
        device=bench.device,
        emulation=bench.emulation(),
        given={
            **percent_shares((0, 50, 34, 33, 34, 33)),
            "micro_batch_size": 3,
            "num_micro_batches": 3,
            "strategy": "event",
            "compute_dtype": "float32",
        },
        probes=probes,
    )
    return {**trial.tokens, "errors": dict(trial.errors)}
