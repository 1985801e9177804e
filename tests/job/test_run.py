"""The whole job against transformers: every family, placement and strategy, to the token."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from flexpipe.errors import InputError, ModelError, PlanError
from flexpipe.job.probes import Probes
from flexpipe.job.report import Report
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import STRATEGIES, percent_shares
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.op import Kind, Op
from flexpipe.units import MIB
from tests.hf import TOLERANCE, VARIANTS, Reference, check_tokens

LENGTHS = (1, 2, 31, 64, 65, 130, 300, 7, 150)
MAX_NEW = 9
EOS = 2  # of the tiny models

# name -> device and knobs; every place a tensor can rest is used by some of them
PLACEMENTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "cpu-resident": ("cpu", {"micro_batch_size": 16}),
    "cpu-disk": (
        "cpu",
        {
            **percent_shares((0, 30, 0, 40, 0, 50)),
            "micro_batch_size": 4,
            "num_micro_batches": 2,
            "max_batch_tokens": 90,
        },
    ),
    "emulated-host": (
        "emulated",
        {**percent_shares((0, 100, 0, 100, 0, 100)), "micro_batch_size": 3, "num_micro_batches": 3},
    ),
    "emulated-cpu-attention": (
        "emulated",
        {
            **percent_shares((20, 40, 30, 50, 50, 50)),
            "micro_batch_size": 5,
            "num_micro_batches": 2,
            "max_batch_tokens": 100,
            "cpu_attention": True,
        },
    ),
    "emulated-disk": (
        "emulated",
        {
            **percent_shares((0, 0, 0, 0, 0, 0)),
            "micro_batch_size": 4,
            "separate_layers": True,
            "prefetch_depth": 2,
        },
    ),
    "emulated-mixed": (
        "emulated",
        {
            **percent_shares((30, 40, 30, 40, 34, 33)),
            "micro_batch_size": 3,
            "num_micro_batches": 3,
            "max_batch_tokens": 128,
            "resident_dtype": "checkpoint",
        },
    ),
}
MATRIX = [
    (variant, placement, strategy)
    for variant in VARIANTS
    for placement in PLACEMENTS
    for strategy in STRATEGIES
]
_shuffled = random.Random(2).sample(MATRIX, len(MATRIX))
ONE_EACH = list({case[0]: case for case in _shuffled}.values())
SAMPLE = [*ONE_EACH, *_shuffled[:4]]


@dataclass
class Logits:
    """Collects what every SAMPLE op sees: (request, step of its answer) -> logits."""

    by_request: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    stage: Stage | None = None

    def on_stage(self, stage: Stage) -> None:
        self.stage = stage

    def before_op(self, op: Op) -> None:
        if op.kind == Kind.SAMPLE:
            assert self.stage is not None
            rows, logits_RV = self.stage.logits(op)
            for row, logits_V in zip(rows, logits_RV.clone(), strict=True):
                self.by_request.setdefault(row.request - 1, []).append(logits_V)


def run(
    model: Path,
    tmp_path: Path,
    prompts: Sequence[Sequence[int]],
    device: str,
    given: Mapping[str, Any],
    *,
    max_tokens: int = MAX_NEW,
    probes: Probes | None = None,
    fail_fast: bool = False,
    **more: Any,
) -> tuple[Report, dict[int, dict[str, Any]]]:
    """Run token-id prompts; the report and each prompt's record."""
    lines = [json.dumps({"id": i, "prompt_token_ids": p}) for i, p in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    spec = JobSpec(
        model=str(model),
        input_path=tmp_path / "in.jsonl",
        output_path=tmp_path / "out.jsonl",
        max_tokens=max_tokens,
        device=device,
        emulation=Emulation(memory_bytes=256 * MIB) if device == "emulated" else None,
        given=given,
        offload_dir=tmp_path / "offload",
        fail_fast=fail_fast,
        progress=False,
        **{"overwrite": True, **more},
    )
    report = run_job(spec, probes)
    records = [json.loads(line) for line in spec.output_path.read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return report, {record["id"]: record for record in records}


def check_records(reference: Reference, records: Mapping[int, Mapping[str, Any]]) -> None:
    """Every answer is the reference's, up to its end token and to ties."""
    assert len(records) == len(reference.prompts)
    for index, record in records.items():
        tokens = record["token_ids"]
        tie = check_tokens(reference, index, tokens)
        if tie is None and record["finish_reason"] == "length":
            assert len(tokens) == MAX_NEW
        elif tie is None:
            assert tokens[-1] == EOS and EOS not in tokens[:-1]
        assert record["usage"]["prompt_tokens"] == len(reference.prompts[index])
        assert record["usage"]["completion_tokens"] == len(tokens)


def check_logits(
    reference: Reference, records: Mapping[int, Mapping[str, Any]], seen: Logits
) -> None:
    """Logits are the reference's as long as the tokens before them are."""
    for index, steps in seen.by_request.items():
        same = len(steps)
        for step, logits_V in enumerate(steps):
            if records[index]["token_ids"][:step] != list(reference.tokens[index][:step]):
                same = step  # after a tie the contexts differ
                break
            torch.testing.assert_close(
                logits_V, reference.logits[index][step], atol=TOLERANCE, rtol=0
            )
        assert same > 0


def check_matrix_case(
    hf_checkpoint: Any, hf_reference: Any, tmp_path: Path, variant: str, place: str, strategy: str
) -> None:
    reference = hf_reference(variant, lengths=LENGTHS, max_new=MAX_NEW)
    device, knobs = PLACEMENTS[place]
    seen = Logits()
    _, records = run(
        hf_checkpoint(variant),
        tmp_path,
        reference.prompts,
        device,
        {**knobs, "strategy": strategy},
        probes=Probes(before_op=seen.before_op, on_stage=seen.on_stage, poison=True),
    )
    check_records(reference, records)
    check_logits(reference, records, seen)
    assert len({token for record in records.values() for token in record["token_ids"]}) >= 20


@pytest.mark.parametrize(("variant", "placement", "strategy"), SAMPLE)
def test_tokens_and_logits_equal_the_reference(
    hf_checkpoint: Any,
    hf_reference: Any,
    tmp_path: Path,
    variant: str,
    placement: str,
    strategy: str,
) -> None:
    check_matrix_case(hf_checkpoint, hf_reference, tmp_path, variant, placement, strategy)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "placement", "strategy"), MATRIX)
def test_every_family_placement_and_strategy_equals_the_reference(
    hf_checkpoint: Any,
    hf_reference: Any,
    tmp_path: Path,
    variant: str,
    placement: str,
    strategy: str,
) -> None:
    check_matrix_case(hf_checkpoint, hf_reference, tmp_path, variant, placement, strategy)


@pytest.mark.parametrize("placement", ["cpu-disk", "emulated-mixed"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_checkpoints_compute_as_their_widened_weights(
    hf_checkpoint: Any, hf_reference: Any, tmp_path: Path, placement: str, dtype: str
) -> None:
    how = {"dtype": dtype, "sharded": True}
    reference = hf_reference("llama3-tied", lengths=LENGTHS, max_new=MAX_NEW, **how)
    device, knobs = PLACEMENTS[placement]
    given = {**knobs, "compute_dtype": "float32"}
    _, records = run(
        hf_checkpoint("llama3-tied", **how), tmp_path, reference.prompts, device, given
    )
    check_records(reference, records)


def test_a_prompt_alone_gets_the_answer_it_gets_in_a_batch(
    hf_checkpoint: Any, hf_reference: Any, tmp_path: Path
) -> None:
    reference = hf_reference("qwen3", lengths=LENGTHS, max_new=MAX_NEW)
    for given in ({"micro_batch_size": 1}, {"micro_batch_size": 2, "max_batch_tokens": 33}):
        _, records = run(hf_checkpoint("qwen3"), tmp_path, reference.prompts, "cpu", given)
        check_records(reference, records)


def test_swapped_kv_rows_show_in_the_answers(
    hf_checkpoint: Any, hf_reference: Any, tmp_path: Path
) -> None:
    reference = hf_reference("llama3", lengths=(40, 40, 40, 40), max_new=MAX_NEW)
    stages: list[Stage] = []

    def swap(op: Op) -> None:
        if op.kind == Kind.COMPUTE and op.step == 3 and op.layer == 0:
            stages[0].stores.kv_cache.swap_rows(0, 0, 1)

    _, records = run(
        hf_checkpoint("llama3"),
        tmp_path,
        reference.prompts,
        "cpu",
        {"micro_batch_size": 4},
        probes=Probes(before_op=swap, on_stage=stages.append),
    )
    right = {
        index
        for index, record in records.items()
        if tuple(record["token_ids"]) == reference.tokens[index][: len(record["token_ids"])]
    }
    assert right == {2, 3}


def test_requests_with_non_finite_logits_fail_alone_and_loudly(
    hf_checkpoint: Any, hf_reference: Any, tmp_path: Path
) -> None:
    reference = hf_reference("llama3", lengths=(5, 40, 20), max_new=MAX_NEW)
    seen = Logits()

    def spoil(op: Op) -> None:
        if op.kind == Kind.SAMPLE and op.step == 2 and seen.stage is not None:
            rows, logits_RV = seen.stage.logits(op)
            logits_RV[[row.request for row in rows].index(2), 7] = float("nan")

    report, records = run(
        hf_checkpoint("llama3"),
        tmp_path,
        reference.prompts,
        "cpu",
        {"micro_batch_size": 4},
        probes=Probes(before_op=spoil, on_stage=seen.on_stage),
    )
    assert (report.num_finished, report.num_failed) == (2, 1)
    assert records[1]["finish_reason"] == "error" and "not finite" in records[1]["error"]
    assert records[1]["token_ids"] == list(reference.tokens[1][:2])
    assert records[0]["token_ids"] == list(reference.tokens[0])


def test_a_plan_that_does_not_fit_is_refused_with_shortfall_and_advice(
    hf_checkpoint: Any, tmp_path: Path
) -> None:
    given = {**percent_shares((100, 0, 100, 0, 100, 0)), "gpu_mem": 1 * MIB}
    with pytest.raises(PlanError, match=r"gpu needs .* more than its budget of 1 MiB"):
        run(hf_checkpoint("llama3"), tmp_path, [[5] * 20], "emulated", given)
    assert not list((tmp_path / "offload/jobs").iterdir())


def test_a_prompt_beyond_the_models_positions_names_its_line(
    hf_checkpoint: Any, tmp_path: Path
) -> None:
    report, records = run(hf_checkpoint("llama3"), tmp_path, [[5], [5] * 510], "cpu", {})
    assert (report.num_finished, report.num_failed) == (1, 1)
    assert records[1]["line"] == 2
    assert "510 prompt tokens" in records[1]["error"] and "512 positions" in records[1]["error"]
    with pytest.raises(InputError, match=r"line 2: .*512 positions"):
        run(hf_checkpoint("llama3"), tmp_path, [[5], [5] * 510], "cpu", {}, fail_fast=True)


def test_a_missing_tensor_is_named_before_anything_runs(hf_checkpoint: Any, tmp_path: Path) -> None:
    source = hf_checkpoint("llama3")
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"model\.layers\.3\."):
        run(model, tmp_path, [[5]], "cpu", {})


def test_the_rule_alone_makes_a_plan_that_runs_under_tight_budgets(
    hf_checkpoint: Any, hf_reference: Any, tmp_path: Path
) -> None:
    reference = hf_reference("opt", lengths=LENGTHS, max_new=MAX_NEW)
    for gpu_mem in (64 * MIB, 6 * MIB, 4 * MIB):
        report, records = run(
            hf_checkpoint("opt"), tmp_path, reference.prompts, "emulated", {"gpu_mem": gpu_mem}
        )
        check_records(reference, records)
        gpu = next(use for use in report.tiers if use.tier == "gpu")
        assert gpu.measured_bytes <= gpu.planned_bytes <= gpu_mem
