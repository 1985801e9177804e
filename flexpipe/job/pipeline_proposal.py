"""`flexpipe plan --pipeline-parallel-size N`: the pipeline that a search finds, stage by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexpipe.errors import PlanError
from flexpipe.job.found import because, bottleneck_line, opening, prediction_dict, prediction_line
from flexpipe.job.outlook import Outlook
from flexpipe.job.stages import stage_dicts, stage_table
from flexpipe.job.table import plain_table
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy_file import MadeFor, render_stages
from flexpipe.plan.spelling import as_options
from flexpipe.policy.pipeline import FoundPipeline, ScoredPipeline, search_pipeline
from flexpipe.policy.predict import Prediction, predict_stages
from flexpipe.policy.search import Limits
from flexpipe.units import format_count

_NUM_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PipelineProposal:
    """What a search came to. `prediction` is of the best plans, thorough; it took `search_s`.
    `least_stages` hold the model, None where stages are given unlike knobs."""

    model: str
    device: str
    date: str
    profile: str
    num_requests: int
    found: FoundPipeline
    plans: Sequence[Plan]
    prediction: Prediction
    search_s: float
    least_stages: int | None

    @property
    def num_stages(self) -> int:
        return len(self.plans)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; seconds and bytes."""
        made, first = self.prediction, self.plans[0]
        return {
            "model": self.model,
            "device": self.device,
            "hardware": self.profile,
            "compute_dtype": first.compute_dtype,
            "num_requests": self.num_requests,
            "num_blocks": first.pipeline.num_blocks,
            "prediction": prediction_dict(made),
            "stages": stage_dicts(self.plans, made),
            "least_stages": self.least_stages,
            "num_choices": self.found.num_choices,
            "search_s": self.search_s,
        }

    def policy_file(self) -> str:
        """The stages' policies, complete, with what they were made for."""
        what, where = f"{self.model} in {self.num_stages} stages", f"machines: {self.profile}"
        lines = opening(what, where, self.date, self.num_requests, self.prediction)
        layers = [[len(chunk) for chunk in p.pipeline.chunks(p.rank)] for p in self.plans]
        policies = [plan.policy for plan in self.plans]
        made_for = MadeFor.of(self.model, self.plans[0].config)
        return render_stages(policies, layers, made_for, lines)

    def render(self) -> str:
        """For people, the plan first; every figure is predicted."""
        made, first, least = self.prediction, self.plans[0], self.least_stages
        parts = [
            f"{self.model} in {self.num_stages} stages, each on a machine like {self.device}, in "
            f"{first.compute_dtype}: {self.num_requests} requests, {made.prompt_tokens} prompt "
            f"tokens, {made.generated_tokens} to generate, {first.pipeline.num_blocks} blocks in "
            "flight",
            "\n".join(self._policies()),
            stage_table(self.plans, made),
            prediction_line(made),
            bottleneck_line(made),
            plain_table(("instead", "tokens/s", "because"), self._others()),
            "" if least is None else f"the least number of such machines that hold it is {least}",
            f"{self.found.num_choices} choices estimated, {1 + len(self.found.others)} played, in "
            f"{self.search_s:.1f} s",
        ]
        return "\n\n".join(part for part in parts if part)

    def _policies(self) -> list[str]:
        """A line per policy, with the stages that have it."""
        ranks = defaultdict[str, list[str]](list)
        for plan in self.plans:
            ranks[as_options(plan.policy.to_dict())].append(str(plan.rank))
        return [f"stage {', '.join(mine)}: {options}" for options, mine in ranks.items()]

    def _others(self) -> list[tuple[str, str, str]]:
        return [_row(one) for one in self.found.others[:_NUM_SHOWN]]


def _row(one: ScoredPipeline) -> tuple[str, str, str]:
    made, policy = one.prediction, one.plans[0].policy
    block = (
        f"{policy.micro_batch_size} rows x {policy.num_micro_batches}, "
        f"{policy.max_batch_tokens} tokens a step"
    )
    return block, format_count(made.generated_tokens_per_s), because(made)


def propose_pipeline(
    outlook: Outlook,
    stage_given: Sequence[Mapping[str, Any]],
    arrangement: Arrangement,
    limits: Limits,
    date: str,
) -> PipelineProposal:
    """Search for a pipeline; a PlanError where none fits, or none that fits keeps the limits."""
    began = time.perf_counter()
    sites = outlook.sites(stage_given)
    try:
        found = search_pipeline(outlook.stage_model, sites, arrangement, limits)
    except PlanError:
        outlook.choose_stages(stage_given, arrangement)  # tells what is missing
        raise
    if found.best is None:
        if found.refused:
            raise PlanError(
                f"no pipeline that fits keeps the limits (of the fastest, {found.refused[0][1]}); "
                "raise --max-latency or --max-disk-writes, or use more stages"
            )
        outlook.choose_stages(stage_given, arrangement)  # tells what is missing
    assert found.best is not None
    plans = found.best.plans
    took_s = time.perf_counter() - began
    return PipelineProposal(
        model=outlook.shape.name,
        device=outlook.device,
        date=date,
        profile=outlook.machine.profile.title,
        num_requests=len(outlook.needs),
        found=found,
        plans=plans,
        prediction=predict_stages(outlook.assignments(plans), outlook.needs),
        search_s=took_s,
        least_stages=outlook.least_stages(stage_given),
    )
