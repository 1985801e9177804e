"""A plan played and not run: what it comes to, and when what would happen.

The figures are of the whole job; the picture shows its first steps, in the form of a run's trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flexpipe.job.outlook import Outlook
from flexpipe.job.stages import stage_dicts, stage_table
from flexpipe.job.table import plain_table
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.plan import Plan
from flexpipe.plan.spelling import as_options
from flexpipe.plan.tier import Tier
from flexpipe.policy.predict import Prediction, first_spans, predict_stages
from flexpipe.schedule.op import Kind, Lane
from flexpipe.schedule.simulate import SimulatedSpan
from flexpipe.schedule.trace import write_traces
from flexpipe.units import format_bytes, format_count, format_seconds


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A prediction, and the ops of the first steps as they would run; none where none are drawn."""

    model: str
    device: str
    num_requests: int
    plans: Sequence[Plan]
    prediction: Prediction
    spans: Sequence[Sequence[SimulatedSpan]] = ()  # by stage

    @property
    def plan(self) -> Plan:
        """Of the first stage."""
        return self.plans[0]

    @property
    def num_drawn_steps(self) -> int:
        first = self.spans[0] if self.spans else ()
        return len({span.op.step for span in first if span.op.kind == Kind.COMMIT})

    def draw(self, path: Path) -> None:
        """A trace or a picture, by the suffix."""
        write_traces(path, self.spans, self.plans)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; seconds and bytes."""
        made = self.prediction
        figures = {item.name: getattr(made, item.name) for item in fields(made)}
        del figures["spans"], figures["stages"]
        return {
            "model": self.model,
            "device": self.device,
            "compute_dtype": self.plan.compute_dtype,
            "num_requests": self.num_requests,
            **figures,
            "run_s": made.run_s,
            "total_s": made.total_s,
            "generated_tokens_per_s": made.generated_tokens_per_s,
            "bound_share": made.bound_share,
            "num_drawn_steps": self.num_drawn_steps,
            "policy": self.plan.policy.to_dict(),
            "stages": stage_dicts(self.plans, made),
        }

    def render(self) -> str:
        """The same for people; every figure is predicted."""
        made, policy = self.prediction, self.plan.policy
        lines = [
            f"{self.model} on {self.device} in {self.plan.compute_dtype}: {self.num_requests} "
            f"requests, {made.prompt_tokens} prompt tokens, {made.generated_tokens} generated "
            f"tokens in {made.num_steps} steps",
            as_options(policy.to_dict()),
            plain_table(("predicted", "time"), self._times()),
            plain_table(("lane", "busy"), self._lanes()),
            plain_table(("link", "moved", "busy"), self._links()),
            plain_table(("tier", "planned", "budget"), self._tiers()),
            stage_table(self.plans, made),
            f"{format_count(made.generated_tokens_per_s)} tokens/s; {made.bottleneck} is the "
            f"bottleneck: it alone needs {format_seconds(made.bound_s)}, {made.bound_share:.0%} of "
            "prefill and decode",
        ]
        return "\n\n".join(part for part in lines if part)

    def _times(self) -> list[tuple[str, str]]:
        made = self.prediction
        return [
            ("load", format_seconds(made.load_s)),
            ("prefill", format_seconds(made.prefill_s)),
            ("decode", format_seconds(made.decode_s)),
            ("total", format_seconds(made.total_s)),
            ("latency of a request", format_seconds(made.latency_s)),
        ]

    def _lanes(self) -> list[tuple[str, str]]:
        return [(lane.value, self._busy(lane.value)) for lane in Lane if self._busy(lane.value)]

    def _links(self) -> list[tuple[str, str, str]]:
        moved = self.prediction.link_bytes.items()
        return [(name, format_bytes(size), self._busy(name)) for name, size in moved if size]

    def _busy(self, name: str) -> str:
        """Share of the run that a lane's or a link's work takes; nothing where it has none."""
        busy_s, run_s = self.prediction.busy_s.get(name, 0.0), self.prediction.run_s
        return f"{busy_s / run_s:.0%}" if busy_s else ""

    def _tiers(self) -> list[tuple[str, str, str]]:
        return [
            (
                name,
                format_bytes(num_bytes),
                format_bytes(sum(plan.budgets.of(Tier(name)) for plan in self.plans)),
            )
            for name, num_bytes in self.prediction.tier_bytes.items()
        ]


def play(
    outlook: Outlook,
    stage_given: Sequence[Mapping[str, Any]],
    arrangement: Arrangement,
    *,
    draws: bool,
    num_steps: int | None = None,
) -> Timeline:
    """The plans that a run with the knobs given for each stage would take, played on machines like
    the outlook's."""
    plans = outlook.choose_stages(stage_given, arrangement)
    stages = outlook.assignments(plans)
    return Timeline(
        model=outlook.shape.name,
        device=outlook.device,
        num_requests=len(outlook.needs),
        plans=plans,
        prediction=predict_stages(stages, outlook.needs),
        spans=first_spans(stages, outlook.needs, num_steps=num_steps) if draws else (),
    )
