"""The embedded model through the engine: right answers, wrong ones from a wrong engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexpipe.cli.demo import MAX_TOKENS, MODEL
from flexpipe.demo.tickets import Ticket, tickets
from flexpipe.job.probes import Probes
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import percent_shares
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.op import Kind, Op
from flexpipe.units import MIB

ASKED = list(tickets("held-out", 500, 0))


def answers(
    tmp_path: Path,
    asked: list[Ticket],
    given: dict[str, Any],
    *,
    device: str = "cpu",
    probes: Probes | None = None,
) -> dict[str, str]:
    """Each ticket's answer by its id."""
    lines = (json.dumps({"id": ticket.id, "prompt": ticket.prompt}) for ticket in asked)
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    spec = JobSpec(
        model=str(MODEL),
        input_path=tmp_path / "in.jsonl",
        output_path=tmp_path / "out.jsonl",
        max_tokens=MAX_TOKENS,
        device=device,
        emulation=Emulation(h2d_bytes_per_s=8e9, memory_bytes=64 * MIB)
        if device == "emulated"
        else None,
        given=given,
        offload_dir=tmp_path / "offload",
        overwrite=True,
        progress=False,
    )
    run_job(spec, probes)
    records = map(json.loads, spec.output_path.read_text(encoding="utf-8").splitlines())
    return {record["id"]: record["text"].strip() for record in records}


def share_right(asked: list[Ticket], got: dict[str, str]) -> float:
    return sum(got[ticket.id] == ticket.answer for ticket in asked) / len(asked)


@pytest.mark.parametrize("number", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_held_out_tickets_are_answered_to_the_letter(tmp_path: Path, number: int) -> None:
    asked = ASKED[:number]
    assert share_right(asked, answers(tmp_path, asked, {"micro_batch_size": 50})) >= 0.95


@pytest.mark.parametrize("percent", [(0, 100, 0, 100, 0, 100), (30, 30, 30, 30, 0, 0)])
def test_placement_changes_no_answer(tmp_path: Path, percent: tuple[float, ...]) -> None:
    asked = ASKED[:24]
    given = {**percent_shares(percent), "micro_batch_size": 8, "num_micro_batches": 2}
    resident = answers(tmp_path, asked, {"micro_batch_size": 24})
    assert answers(tmp_path, asked, given, device="emulated") == resident


def test_a_corrupted_rows_cache_shows_in_its_answer_alone(tmp_path: Path) -> None:
    asked = ASKED[:12]
    right = answers(tmp_path, asked, {"micro_batch_size": 12})
    stages: list[Stage] = []
    victims: list[int] = []

    def corrupt(op: Op) -> None:
        """Two rows trade their caches before the second token: each continues the other."""
        if op.kind == Kind.COMPUTE and op.step == 1 and op.layer == 0 and op.batch is not None:
            stages[0].stores.kv_cache.swap_rows(0, 3, 8)
            victims.extend(row.request - 1 for row in op.batch.rows if row.place in (3, 8))

    spoiled = answers(
        tmp_path,
        asked,
        {"micro_batch_size": 12},
        probes=Probes(before_op=corrupt, on_stage=stages.append),
    )
    assert len(victims) == 2
    changed = {i for i, ticket in enumerate(asked) if spoiled[ticket.id] != right[ticket.id]}
    assert changed == set(victims)
