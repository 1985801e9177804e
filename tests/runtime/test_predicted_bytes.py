"""What the cost model says an op moves is what it moves, on every link, under any policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from flexpipe.errors import PlanError, PolicyError
from flexpipe.job.probes import Probes
from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import COMPRESSIONS, percent_shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.predict import predict
from flexpipe.policy.profile import read_profile
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.op import Kind, Op
from tests.conftest import REPO
from tests.runtime.conftest import LIMITS
from tests.runtime.jobs import FAST, Outcome, Runner
from tests.runtime.test_policies import jobs

PROFILE = read_profile(REPO / "tests" / "profile.yaml")


class Watched:
    """Keeps a run's plan and the ops it performed."""

    def __init__(self) -> None:
        self.stage: Stage | None = None
        self.recorder: Recorder | None = None

    def probes(self) -> Probes:
        def on_stage(stage: Stage) -> None:
            self.stage = stage

        def on_recorder(recorder: Recorder) -> None:
            self.recorder = recorder

        return Probes(on_stage=on_stage, on_recorder=on_recorder, keep_spans=True)

    @property
    def plan(self) -> Plan:
        assert self.stage is not None
        return self.stage.plan

    @property
    def ops(self) -> list[Op]:
        assert self.recorder is not None
        return [span.op for span in self.recorder.spans]


def priced_bytes(plan: Plan, ops: Iterable[Op]) -> dict[str, int]:
    """Bytes per link as the cost model prices these ops."""
    cost_of, priced = CostModel(plan, PROFILE, FAST), Counter[str]()
    for op in ops:
        cost = cost_of(op)
        priced[cost.link] += cost.num_bytes - _repeated_bytes(plan, op)
    return {link: num_bytes for link, num_bytes in priced.items() if num_bytes}


def _repeated_bytes(plan: Plan, op: Op) -> int:
    """Of embedding rows on disk, which a micro-batch reads once for equal tokens."""
    if op.kind != Kind.READ_EMBED or plan.embed_home != Tier.DISK:
        return 0
    assert op.batch is not None
    tokens = [token for row in op.batch.rows for token in row.tokens]
    return (len(tokens) - len(set(tokens))) * plan.embedding.row_bytes


def predicted_ops(plan: Plan, run: Runner, outcome: Outcome) -> list[Op]:
    """What a prediction plays, for answers as long as those that came."""
    limits = [Need(len(prompt), limit) for prompt, limit in zip(run.prompts, LIMITS, strict=True)]
    answers = zip(limits, outcome.tokens, strict=True)
    came = [Need(need.prompt, len(tokens)) for need, tokens in answers]
    order = longest_first(limits)
    made = predict(plan, came, PROFILE, FAST, order=order, keep_spans=True)
    return [span.op for span in made.spans[0]]


def needed(ops: Sequence[Op]) -> Counter[tuple[object, ...]]:
    """The ops that a COMMIT waits for in the end; others may be dropped when the last one is done,
    whenever that is."""
    by_id = {op.id: op for op in ops}
    found = set[int]()
    left = [op.id for op in ops if op.kind == Kind.COMMIT]
    while left:
        id = left.pop()
        if id not in found:
            found.add(id)
            left += [wait.op for wait in by_id[id].waits_for]
    return Counter(_name(by_id[id]) for id in found)


def _name(op: Op) -> tuple[object, ...]:
    rows = op.batch and tuple((row.place, row.num_context, row.num_new) for row in op.batch.rows)
    return op.kind, op.segment, op.step, op.layer, op.mb, rows


ANY = {
    "job": jobs(),
    "weight": st.sampled_from(COMPRESSIONS),
    "vocabulary": st.sampled_from(COMPRESSIONS),
    "cache": st.sampled_from(COMPRESSIONS),
}


@settings(max_examples=20)
@given(**ANY)
def test_the_ops_of_a_run_are_predicted_and_priced_at_the_bytes_they_move(run, **case):
    check_prediction(run, **case)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=400)
@given(**ANY)
def test_the_ops_of_many_runs_are_predicted_and_priced_at_the_bytes_they_move(run, **case):
    check_prediction(run, **case)


def check_prediction(
    run: Runner, job: tuple[str, dict[str, Any]], weight: str, vocabulary: str, cache: str
) -> None:
    device, asked = job
    knobs = {
        "compress_weight": weight,
        "compress_vocabulary": vocabulary,
        "compress_cache": cache,
        "compress_group": 32,
        **{name: value for name, value in asked.items() if name != "percent"},
    }
    watched = Watched()
    try:
        knobs |= percent_shares(asked["percent"]) if "percent" in asked else {}
        outcome = run(knobs, device=device, probes=watched.probes())
    except (PolicyError, PlanError):
        event("refused")
        return
    moved = {use.name: use.bytes for use in outcome.report.links}
    event(f"{len(moved)} links on {device}")
    assert priced_bytes(watched.plan, watched.ops) == moved
    assert needed(predicted_ops(watched.plan, run, outcome)) == needed(watched.ops)
