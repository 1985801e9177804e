"""A prediction beside what was measured; never one column.

Values and their table, for reports; `flexpipe.job.expectation` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from flexpipe.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from flexpipe.policy.predict import Prediction
    from flexpipe.policy.profile import Profile


# by the last word of a figure's name
_SHOWN: Mapping[str, Callable[[float], str]] = {
    "bytes": format_bytes,
    "s": format_seconds,
    "bubble": "{:.1%}".format,
}


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure, as predicted and as measured; the error is relative to what was measured, None
    where that is nothing."""

    name: str
    predicted: float
    measured: float
    error: float | None = field(init=False)

    def __post_init__(self) -> None:
        error = self.predicted / self.measured - 1 if self.measured else None
        object.__setattr__(self, "error", error)

    def row(self) -> tuple[str, str, str, str]:
        """Cells of a table."""
        shown = _SHOWN[self.name.rpartition("_")[2]]
        name = self.name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")
        error = "" if self.error is None else f"{self.error:+.1%}"
        return name, shown(self.predicted), shown(self.measured), error


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """A prediction beside what it came to.

    `bound_s` is what the `bottleneck`, a lane or a link, needs alone. With `lengths_came` it is for
    the answers as long as they were, not as long as they might have been.
    """

    profile: str
    profile_date: str
    total_s: float
    generated_tokens_per_s: float
    bottleneck: str
    bound_s: float
    lengths_came: bool = False
    figures: Sequence[Compared] = ()

    @classmethod
    def of(
        cls,
        prediction: Prediction,
        profile: Profile,
        measured: Mapping[str, float],
        *,
        lengths_came: bool = False,
    ) -> Predicted:
        """`measured` has figures by the names of `figures_of`; what it lacks was nothing."""
        predicted = figures_of(prediction)
        both = {
            name: (predicted.get(name, 0.0), measured.get(name, 0.0))
            for name in {**predicted, **measured}
        }
        return cls(
            profile=profile.name,
            profile_date=profile.date,
            total_s=prediction.total_s,
            generated_tokens_per_s=prediction.generated_tokens_per_s,
            bottleneck=prediction.bottleneck,
            bound_s=prediction.bound_s,
            lengths_came=lengths_came,
            figures=[Compared(name, *pair) for name, pair in both.items() if any(pair)],
        )

    @classmethod
    def over(cls, runs: Sequence[Predicted]) -> Predicted | None:
        """The last of several runs of one job, with the median of each figure; None of none."""
        if not runs:
            return None
        pairs: dict[str, list[Compared]] = {}
        for figure in (figure for run in runs for figure in run.figures):
            pairs.setdefault(figure.name, []).append(figure)
        figures = [
            Compared(name, median(one.predicted for one in some), median(o.measured for o in some))
            for name, some in pairs.items()
        ]
        return replace(runs[-1], figures=figures)

    def told(self) -> str:
        """What was foreseen and by what, as a clause."""
        return (
            f"{self.generated_tokens_per_s:.1f} tokens/s were predicted with the profile "
            f"{self.profile} of {self.profile_date}, {self.bottleneck} as the bottleneck"
        )


def figures_of(prediction: Prediction) -> dict[str, float]:
    """What can be measured of it, by the names of a report's figures."""
    return {
        "total_s": prediction.total_s,
        "load_s": prediction.load_s,
        "prefill_s": prediction.prefill_s,
        "decode_s": prediction.decode_s,
        "latency_s": prediction.latency_s,
        **{f"{name}_bytes": num_bytes for name, num_bytes in prediction.link_bytes.items()},
        **{f"peak_{tier}_bytes": size for tier, size in prediction.tier_bytes.items()},
        **stage_bubbles([stage.bubble for stage in prediction.stages]),
    }


def stage_bubbles(bubbles: Sequence[float]) -> dict[str, float]:
    """The share of its time in which each stage of a pipeline computes nothing."""
    if len(bubbles) < 2:
        return {}
    return {f"stage_{index}_bubble": bubble for index, bubble in enumerate(bubbles)}
