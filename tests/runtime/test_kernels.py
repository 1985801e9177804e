"""No step waits for a kernel to be compiled: loading has compiled them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from flexpipe.job.probes import Probes
from flexpipe.kernels import attend, codec, team
from flexpipe.plan.policy import percent_shares
from tests.runtime.jobs import EVERYWHERE_ON_CPU, Runner

pytestmark = pytest.mark.skipif(not team.available(), reason="kernels need llvmlite")

BESIDE = {
    **percent_shares([0, 50, 50, 50, 100, 0]),
    "micro_batch_size": 2,
    "num_micro_batches": 3,
    "cpu_attention": True,
}
COMPRESSED = {"compress_weight": "4", "compress_vocabulary": "8", "compress_cache": "8"}


def num_compiled() -> int:
    return attend._kernel.cache_info().misses + codec._kernel.cache_info().misses


@pytest.mark.parametrize(
    ("device", "knobs"),
    [
        ("cpu", EVERYWHERE_ON_CPU),
        ("cpu", {**EVERYWHERE_ON_CPU, **COMPRESSED}),
        ("emulated", BESIDE),
        ("emulated", {**BESIDE, **COMPRESSED}),
    ],
)
def test_a_run_compiles_nothing_after_loading(
    run: Runner, device: str, knobs: Mapping[str, Any]
) -> None:
    attend._kernel.cache_clear()
    codec._kernel.cache_clear()
    counts: list[int] = []
    run(knobs, device=device, probes=Probes(on_stage=lambda stage: counts.append(num_compiled())))
    assert counts == [num_compiled()] and counts[0] > 0
