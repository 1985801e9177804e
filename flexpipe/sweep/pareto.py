"""A picture of a sweep: latency over throughput, and the points that nothing beats at both.

Measured and predicted points have frontiers of their own. Points on one are numbered, and the key
below the axes says what they set, so that labels cannot cover each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexpipe.errors import InputError
from flexpipe.sweep.ranking import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
_WIDE = 20.0  # values that lie further apart than this factor are drawn on a logarithmic axis
_KEY_LINES = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """Where a row lies in the picture."""

    name: str
    tokens_per_s: float
    latency_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """How one kind of figures is read and drawn."""

    name: str
    marker: str
    colour: str
    filled: bool
    tokens_per_s: Callable[[Row], float | None]
    latency_s: Callable[[Row], float | None]

    def spots(self, rows: Sequence[Row]) -> list[Spot]:
        read = [(row, self.tokens_per_s(row), self.latency_s(row)) for row in rows]
        return [
            Spot(name=row.point.name, tokens_per_s=rate, latency_s=seconds)
            for row, rate, seconds in read
            if rate is not None and seconds is not None
        ]


_KINDS = (
    _Kind(
        name="measured",
        marker="o",
        colour="#2171b5",
        filled=True,
        tokens_per_s=lambda row: row.measured_tokens_per_s,
        latency_s=lambda row: row.measured_latency_s,
    ),
    _Kind(
        name="predicted",
        marker="^",
        colour="#d94801",
        filled=False,
        tokens_per_s=lambda row: row.predicted_tokens_per_s,
        latency_s=lambda row: row.predicted_latency_s,
    ),
)


def frontier(spots: Sequence[Spot]) -> list[Spot]:
    """The spots that no other beats at throughput without being later, slowest first."""
    best: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (spot.latency_s, -spot.tokens_per_s)):
        if not best or spot.tokens_per_s > best[-1].tokens_per_s:
            best.append(spot)
    return best


def check_plot(path: Path) -> None:
    """Refuse, before anything runs, a picture that could not be drawn."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plot {path} must end in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no directory {path.absolute().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            f"--plot {path} needs matplotlib: pip install 'flexpipe[plot]', or leave --plot out"
        ) from None


def draw_pareto(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the rows that have figures into a .svg or .png file."""
    from matplotlib.figure import Figure

    drawn = [(kind, spots) for kind in _KINDS if (spots := kind.spots(rows))]
    names = list(dict.fromkeys(s.name for _, spots in drawn for s in frontier(spots)))
    key = _key(names)
    figure = Figure(figsize=(9, 5.5 + 0.17 * (key.count("\n") + 1)), layout="constrained")
    axes = figure.subplots()
    for kind, spots in drawn:
        _draw(axes, kind, spots, names)
    _scale(axes, [spot for _, spots in drawn for spot in spots])
    axes.set_title(title)
    axes.set_xlabel("throughput (generated tokens/s)")
    axes.set_ylabel("latency (s)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="best")
    figure.supxlabel(key, x=0.02, ha="left", fontsize=8, family="monospace")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"cannot write --plot {path}: {error.strerror}") from error


def _key(names: Sequence[str]) -> str:
    lines = [f"{number:>3}  {name}" for number, name in enumerate(names, 1)]
    more = len(lines) - _KEY_LINES
    return "\n".join(lines if more <= 0 else [*lines[:_KEY_LINES], f"     and {more} more"])


def _draw(axes: Axes, kind: _Kind, spots: Sequence[Spot], names: Sequence[str]) -> None:
    from matplotlib.patheffects import withStroke

    axes.scatter(
        [spot.tokens_per_s for spot in spots],
        [spot.latency_s for spot in spots],
        marker=kind.marker,
        s=36,
        edgecolors=kind.colour,
        facecolors=kind.colour if kind.filled else "none",
        label=kind.name,
    )
    best = frontier(spots)
    axes.plot(
        [spot.tokens_per_s for spot in best],
        [spot.latency_s for spot in best],
        drawstyle="steps-pre",
        color=kind.colour,
        linewidth=1,
        linestyle="-" if kind.filled else "--",
        label=f"{kind.name} frontier",
    )
    for spot in best:
        axes.annotate(
            str(names.index(spot.name) + 1),
            (spot.tokens_per_s, spot.latency_s),
            xytext=(-4, 4) if kind.filled else (4, -4),
            textcoords="offset points",
            ha="right" if kind.filled else "left",
            va="bottom" if kind.filled else "top",
            fontsize=9,
            fontweight="bold",
            color=kind.colour,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _scale(axes: Axes, spots: Sequence[Spot]) -> None:
    from matplotlib.ticker import LogFormatter

    rates = [spot.tokens_per_s for spot in spots]
    times = [spot.latency_s for spot in spots]
    for values, scale, axis in (
        (rates, axes.set_xscale, axes.xaxis),
        (times, axes.set_yscale, axes.yaxis),
    ):
        if 0 < _WIDE * min(values) < max(values):
            scale("log")
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(LogFormatter())  # fewer labels the wider the range
