"""What several machines like the one at hand would come to: a model's stages, one on each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.errors import PolicyError
from flexpipe.job.outlook import Outlook
from flexpipe.job.table import plain_table
from flexpipe.plan.arrangement import Arrangement
from flexpipe.policy.pipeline import search_pipeline
from flexpipe.policy.predict import Prediction
from flexpipe.policy.search import Limits
from flexpipe.units import format_count

COUNTS = (2, 4, 8)


def predict_shared(
    outlook: Outlook, given: Mapping[str, Any], limits: Limits
) -> dict[int, Prediction | None]:
    """By the number of stages, evenly cut; None where no such pipeline fits. Numbers beyond the
    model's layers are left out, and all where the profile does not know what a message takes."""
    if "comm" not in outlook.machine.profile.links:
        return {}
    most = outlook.shape.config.num_layers
    return {count: _predicted(outlook, given, limits, count) for count in COUNTS if count <= most}


def _predicted(
    outlook: Outlook, given: Mapping[str, Any], limits: Limits, count: int
) -> Prediction | None:
    sites = outlook.sites([given] * count)
    even = Arrangement(num_stages=count, partition="even")
    try:
        best = search_pipeline(outlook.stage_model, sites, even, limits, coarse=True).best
    except PolicyError:
        return None
    return None if best is None else best.prediction


def shared_table(by_count: Mapping[int, Prediction | None]) -> str:
    """For people, with the smallest number that fits."""
    rows = [
        (
            str(count),
            "does not fit" if made is None else format_count(made.generated_tokens_per_s),
            "" if made is None else f"{_mean_bubble(made):.0%}",
            "" if made is None else made.bottleneck,
        )
        for count, made in by_count.items()
    ]
    table = plain_table(("stages, each on such a machine", "tokens/s", "bubble", "because"), rows)
    least = next((count for count, made in by_count.items() if made is not None), None)
    return table if least in (None, 1) else f"{table}\n  {least} is the least of these that fits"


def shared_dict(by_count: Mapping[int, Prediction | None]) -> dict[str, dict[str, Any] | None]:
    """Plain values."""
    return {
        str(count): None if made is None else _figures(made) for count, made in by_count.items()
    }


def _figures(made: Prediction) -> dict[str, Any]:
    return {
        "generated_tokens_per_s": made.generated_tokens_per_s,
        "run_s": made.run_s,
        "bottleneck": made.bottleneck,
        "bubble": _mean_bubble(made),
    }


def _mean_bubble(made: Prediction) -> float:
    return sum(stage.bubble for stage in made.stages) / len(made.stages)
