"""What a search found, in the words that one machine's proposal and a pipeline's share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flexpipe import __version__
from flexpipe.policy.predict import Prediction
from flexpipe.units import format_count, format_seconds


def prediction_line(made: Prediction, more: str = "") -> str:
    """For people: how fast, how long; and whatever else is predicted."""
    return (
        f"predicted: {format_count(made.generated_tokens_per_s)} tokens/s, done in "
        f"{format_seconds(made.total_s)} (load {format_seconds(made.load_s)}, prefill "
        f"{format_seconds(made.prefill_s)}, decode {format_seconds(made.decode_s)}); a request "
        f"takes {format_seconds(made.latency_s)}{more}"
    )


def bottleneck_line(made: Prediction) -> str:
    """For people: what bounds it, and how near it comes to that bound."""
    return (
        f"bottleneck: {made.bottleneck}, which alone needs {format_seconds(made.bound_s)}: "
        f"{made.bound_share:.0%} of that bound is reached"
    )


def because(made: Prediction) -> str:
    """The same in a cell of a table."""
    return f"{made.bottleneck} needs {format_seconds(made.bound_s)}"


def prediction_dict(made: Prediction) -> dict[str, Any]:
    """Plain values; seconds and bytes."""
    figures = asdict(made)
    del figures["spans"], figures["stages"]
    return {
        **figures,
        "total_s": made.total_s,
        "generated_tokens_per_s": made.generated_tokens_per_s,
    }


def opening(what: str, where: str, date: str, num_requests: int, made: Prediction) -> Sequence[str]:
    """A policy file's first lines: what the policy was found for, and what it should come to."""
    return (
        f"Found by flexpipe {__version__} on {date} for {what}: {num_requests} requests,",
        f"{made.prompt_tokens} prompt tokens, {made.generated_tokens} to generate; {where}.",
        f"Predicted: {format_count(made.generated_tokens_per_s)} tokens/s, "
        f"{format_seconds(made.total_s)} in all; {made.bottleneck} is the bottleneck.",
    )
