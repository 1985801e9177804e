"""A grid: the values of each varied name, and every combination of them.

Values are written alike on the command line and in a YAML file; `setting` reads them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flexpipe.errors import FlexpipeError, InputError
from flexpipe.sweep.setting import (
    PERCENT,
    Settings,
    read_value,
    read_values,
    setting_name,
    share_kinds,
)

MAX_POINTS = 10_000
POINTS = "points"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Names and their values, of which every combination is a point, and points of their own."""

    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    extra: Sequence[Settings] = ()

    def __post_init__(self) -> None:
        for names in (self.axes, *self.extra):
            _check_together(names)
        if self.num_points > MAX_POINTS:
            raise InputError(
                f"the grid has {self.num_points} points, more than {MAX_POINTS}; vary less"
            )

    @property
    def num_points(self) -> int:
        product = math.prod(map(len, self.axes.values())) if self.axes else 0
        return product + len(self.extra)

    def points(self) -> Iterator[Settings]:
        """Every combination, the last name changing fastest, then the points of their own."""
        if self.axes:
            for values in itertools.product(*self.axes.values()):
                yield dict(zip(self.axes, values, strict=True))
        yield from self.extra

    def updated(self, other: Grid) -> Grid:
        """This grid with the axes of `other` put in, and its points added."""
        return Grid(axes={**self.axes, **other.axes}, extra=(*self.extra, *other.extra))


def _check_together(names: Iterator[str] | Mapping[str, Any]) -> None:
    """Shares may be given whole, by tiers or in `percent`, but not in two of these ways."""
    for kind in share_kinds():
        whole = [name for name in names if name in (kind, PERCENT)]
        parts = [name for name in names if name.startswith(f"{kind}.")]
        if len(given := [*whole, *parts[:1]]) > 1:
            raise InputError(f"{given[0]} and {given[1]} both place {kind}; keep one of them")


def parse_vary(texts: Sequence[str]) -> Grid:
    """`NAME=VALUES` each, like `micro_batch_size=8:64:*2` or `weights.gpu=0,0.25,0.5`."""
    axes: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        written, equals, values = text.partition("=")
        if not equals:
            raise InputError(f"{text!r} is not NAME=VALUES, like micro_batch_size=8,16,32")
        name = setting_name(written)
        if name in axes:
            raise InputError(f"{name} is given twice; put all its values into one list")
        axes[name] = read_values(name, values.split(","))
    return Grid(axes=axes)


def read_grid(path: Path) -> Grid:
    """A YAML file that maps names to a value, a range or a list; `points` lists mappings."""
    try:
        # every scalar as it is written: YAML would read the range 1:8 as a number to base 60
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"cannot read the grid {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a YAML file: {reason}") from error
    try:
        return _grid(content)
    except FlexpipeError as error:
        raise InputError(f"{path}: {error}") from error


def _grid(content: Any) -> Grid:
    if not isinstance(content, dict):
        raise InputError("a grid maps names to values, like micro_batch_size: [8, 16, 32]")
    points = content.pop(POINTS, None) or []
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise InputError("points must be a list of mappings, each one point")
    return Grid(
        axes={name: read_values(name, _texts(item)) for name, item in _named(content)},
        extra=tuple(
            {name: read_value(name, _text(item)) for name, item in _named(point)}
            for point in points
        ),
    )


def _named(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((setting_name(key), item) for key, item in content.items())


def _texts(item: Any) -> list[str]:
    return [_text(some) for some in item] if isinstance(item, list) else _text(item).split(",")


def _text(item: Any) -> str:
    """Shares as a mapping and the six numbers of `percent` as a list, the way the rest is."""
    if isinstance(item, dict):
        return "/".join(f"{key}:{value}" for key, value in item.items())
    return "/".join(map(str, item)) if isinstance(item, list) else str(item)
