"""Attention where the KV cache lives: the same tokens, other bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexpipe.job.probes import Probes
from flexpipe.model import batch as batch_module
from flexpipe.plan.policy import percent_shares
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.op import Kind, Op
from tests.runtime.conftest import LENGTHS
from tests.runtime.jobs import Runner, Tokens

LAYERS, HEADS, KV_HEADS, DIM, ITEM = 3, 4, 4, 16, 4
PLACES = {
    "all on the cpu tier": percent_shares([100, 0, 0, 100, 100, 0]),
    "gpu, cpu and disk": percent_shares([0, 100, 34, 33, 0, 100]),
}


class Logits:
    """What every SAMPLE op saw, by request."""

    def __init__(self) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.probes = Probes(before_op=self._look, on_stage=self._keep, poison=True)

    def _keep(self, stage: Stage) -> None:
        self._stage = stage

    def _look(self, op: Op) -> None:
        if op.kind == Kind.SAMPLE:
            rows, logits_RV = self._stage.logits(op)
            for row, logits_V in zip(rows, logits_RV.clone(), strict=True):
                self.seen.setdefault(row.request, []).append(logits_V)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(6, 1), (2, 3)])
def test_logits_are_those_of_attention_on_the_device(
    run: Runner, reference: Tokens, place: str, shape: tuple[int, int]
) -> None:
    """To rounding: rows that attend elsewhere are packed in another order."""
    knobs = {**PLACES[place], "micro_batch_size": shape[0], "num_micro_batches": shape[1]}
    found = []
    for cpu_attention in (False, True):
        logits = Logits()
        outcome = run({**knobs, "cpu_attention": cpu_attention}, probes=logits.probes)
        assert outcome.tokens == reference
        found.append(logits.seen)
    there, here = found
    assert there.keys() == here.keys()
    for request, steps in there.items():
        found_there = torch.stack(steps)
        torch.testing.assert_close(torch.stack(here[request]), found_there, atol=1e-5, rtol=0)


def test_without_the_kernel_the_tokens_are_the_same(
    run: Runner, reference: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "runs_here", lambda device: False)
    knobs = {**PLACES["gpu, cpu and disk"], "cpu_attention": True, "micro_batch_size": 6}
    assert run(knobs).tokens == reference


def test_bytes_over_the_links_are_queries_and_outputs_instead_of_the_cache(
    run: Runner, reference: Tokens
) -> None:
    knobs = {**PLACES["all on the cpu tier"], "micro_batch_size": 6}
    moved = {}
    for cpu_attention in (False, True):
        report = run({**knobs, "cpu_attention": cpu_attention}).report
        moved[cpu_attention] = {link.name: link.bytes for link in report.links}
    steps = [len(tokens) for tokens in reference]
    decoded = sum(steps) - len(steps)  # the first token of each comes from its prompt
    behind = sum(
        length + step for length, num in zip(LENGTHS, steps, strict=True) for step in range(num - 1)
    )
    token = 2 * KV_HEADS * DIM * ITEM
    query, fetched = HEADS * DIM * ITEM, sum(steps) * 9  # a token and whether it is finite
    prompts = sum(LENGTHS) * token
    assert moved[False]["h2d"] == LAYERS * behind * token
    assert moved[True]["h2d"] == LAYERS * decoded * query
    last = LAYERS * (prompts + decoded * token) + fetched - moved[False]["d2h"]
    assert last % token == 0  # nobody waits for the last step's stores: some may be left undone
    assert 0 <= last <= LAYERS * len(steps) * token
    assert moved[True]["d2h"] == LAYERS * (prompts + decoded * (token + query)) + fetched


def test_on_the_cpu_it_is_how_attention_runs_anyway(run: Runner, reference: Tokens) -> None:
    given: dict[str, Any] = {"cpu_attention": True, "micro_batch_size": 6}
    assert run(given, device="cpu").tokens == reference


def test_the_trace_names_the_ops_and_the_segments(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run({**PLACES["gpu, cpu and disk"], "cpu_attention": True, "micro_batch_size": 6}, trace=path)
    text = path.read_text()
    for name in ("move_query decoder", "attend_cpu decoder", "move_output decoder"):
        assert name in text
    for name in ("compute qkv of decoder", "compute attend of decoder", "compute out of decoder"):
        assert name in text
