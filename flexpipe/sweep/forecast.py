"""What a sweep is told of a point that it does not run: its plan, predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.job.bench import Workload
from flexpipe.job.outlook import Outlook, Shape
from flexpipe.job.spec import DEFAULT_OFFLOAD_DIR, JobSpec
from flexpipe.policy.predict import predict
from flexpipe.sweep.run import Forecast


def forecaster(spec: JobSpec) -> Forecast:
    """Predicts points of the sweep `spec` on this machine."""
    shape = Shape.open(spec.model, spec.revision)
    if spec.made_for is not None:
        spec.made_for.check(shape.name, shape.config)
    offload_dir = (spec.offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()

    def forecast(knobs: Mapping[str, Any], workload: Workload) -> Mapping[str, Any]:
        needs = workload.needs(shape.config)
        outlook = Outlook.here(shape, needs, spec.device, spec.emulation, offload_dir, knobs)
        plan = outlook.choose(knobs)
        made = predict(plan, needs, outlook.machine.profile, outlook.emulation)
        return {
            "total_s": made.total_s,
            "generated_tokens_per_s": made.generated_tokens_per_s,
            "latency_s": made.latency_s,
            "policy": plan.policy.to_dict(),
        }

    return forecast
