"""What several machines like the one at hand would come to: a model's stages, one on each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexpipe.errors import PlanError, PolicyError
from flexpipe.job.outlook import Outlook
from flexpipe.job.table import plain_table
from flexpipe.plan.arrangement import Arrangement, Partition
from flexpipe.policy.pipeline import search_pipeline
from flexpipe.policy.predict import Prediction
from flexpipe.policy.search import Limits
from flexpipe.units import format_count

COUNTS = (2, 4, 8)
_CUTS: tuple[Partition, ...] = ("even", "balanced")


def predict_shared(
    outlook: Outlook, given: Mapping[str, Any], limits: Limits, least: int | None
) -> dict[int, Prediction | None]:
    """By the number of stages, of which `least` fit (None: no number does); None where no pipeline
    is found. Numbers beyond the model's layers are left out, and all where the profile does not
    know what a message takes."""
    if "comm" not in outlook.machine.profile.links:
        return {}
    counts = (count for count in COUNTS if count <= outlook.shape.config.num_layers)
    return {
        count: _predicted(outlook, given, limits, count) if least and least <= count else None
        for count in counts
    }


def _predicted(
    outlook: Outlook, given: Mapping[str, Any], limits: Limits, count: int
) -> Prediction | None:
    """Evenly cut, which is quickly told; where that does not fit, as a run would cut it."""
    sites = outlook.sites([given] * count)
    for partition in _CUTS:
        arrangement = Arrangement(num_stages=count, partition=partition)
        try:
            best = search_pipeline(
                outlook.stage_model, sites, arrangement, limits, coarse=True
            ).best
        except (PlanError, PolicyError):
            continue
        if best is not None:
            return best.prediction
    return None


def shared_table(by_count: Mapping[int, Prediction | None]) -> str:
    """For people."""
    rows = [
        (
            str(count),
            "does not fit" if made is None else format_count(made.generated_tokens_per_s),
            "" if made is None else f"{_mean_bubble(made):.0%}",
            "" if made is None else made.bottleneck,
        )
        for count, made in by_count.items()
    ]
    return plain_table(("stages, each on such a machine", "tokens/s", "bubble", "because"), rows)


def shared_line(by_count: Mapping[int, Prediction | None]) -> str:
    """What those that fit would come to, in a sentence; nothing where none does."""
    rates = [
        f"{format_count(made.generated_tokens_per_s)} tokens/s on {count}"
        for count, made in by_count.items()
        if made is not None
    ]
    return f"Predicted: {', '.join(rates)}." if rates else ""


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
