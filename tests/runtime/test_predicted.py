"""What the cost model says an op moves is what the stage moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from flexpipe.job.probes import Probes
from flexpipe.plan.block import Need
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import percent_shares
from flexpipe.policy.predict import predict
from flexpipe.runtime.stage import Stage
from tests.policy.machine import OVERHEADS, machine
from tests.runtime.conftest import LENGTHS, LIMITS
from tests.runtime.jobs import EVERYWHERE, EVERYWHERE_ON_CPU, FAST, Runner

TWO_ROWS = {"micro_batch_size": 2, "num_micro_batches": 3}  # all six prompts at once
NEEDS = [Need(prompt, output) for prompt, output in zip(LENGTHS, LIMITS, strict=True)]
POLICIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "everywhere": ("emulated", {**EVERYWHERE, **TWO_ROWS}),
    "everywhere, on the cpu": ("cpu", EVERYWHERE_ON_CPU),
    "everywhere, no overlap": ("emulated", {**EVERYWHERE, **TWO_ROWS, "strategy": "none"}),
    "chunks": (
        "emulated",
        {**EVERYWHERE, **TWO_ROWS, "max_batch_tokens": 8, "cpu_attention": False},
    ),
    "layers apart": (
        "emulated",
        {**EVERYWHERE, **TWO_ROWS, "separate_layers": True, "prefetch_depth": 2},
    ),
    "compressed": (
        "emulated",
        {
            **EVERYWHERE,
            **TWO_ROWS,
            "compress_weight": "4",
            "compress_cache": "8",
            "compress_vocabulary": "8",
        },
    ),
    "compressed, on the cpu": ("cpu", {**EVERYWHERE_ON_CPU, "compress_weight": "8"}),
    "all on disk": (
        "emulated",
        {**percent_shares([0] * 6), "micro_batch_size": 2, "num_micro_batches": 2},
    ),
    "weights off the device": (
        "emulated",
        {**percent_shares([0, 100, 100, 0, 100, 0]), "micro_batch_size": 6},
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_moves_the_bytes_that_were_predicted(run: Runner, name: str) -> None:
    device, given = POLICIES[name]
    plans: list[Plan] = []

    def keep(stage: Stage) -> None:
        plans.append(stage.plan)

    report = run(given, device=device, probes=Probes(on_stage=keep)).report
    emulation = FAST if device == "emulated" else None
    predicted = predict(plans[0], NEEDS, machine(overhead_s=OVERHEADS), emulation)
    moved = {link.name: link.bytes for link in report.links}
    told = {link: num_bytes for link, num_bytes in predicted.link_bytes.items() if num_bytes}
    assert told.keys() == moved.keys()
    for link, num_bytes in told.items():
        assert abs(num_bytes - moved[link]) <= _open_bytes(plans[0]).get(link, 0), link
    assert predicted.generated_tokens == report.generated_tokens == sum(LIMITS)
    assert predicted.prompt_tokens == sum(LENGTHS)
    assert {lane.name for lane in report.lanes} <= set(predicted.busy_s)


def _open_bytes(plan: Plan) -> dict[str, int]:
    """What nobody can foretell: which loads for a next step the end of the job still drops, and
    how often prompts repeat a token whose embedding is read once."""
    slots = plan.num_weight_slots
    layers = [layer.streamed for layer in plan.streamed_layers]
    read = sum(sorted((layer.read_bytes for layer in layers), reverse=True)[:slots])
    loaded = sum(sorted((layer.num_bytes for layer in layers), reverse=True)[:slots])
    embedded = (sum(LENGTHS) + sum(LIMITS)) * plan.embedding.row_bytes
    return {"disk_read": read + embedded, "h2d": loaded}
