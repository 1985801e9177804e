"""Rates that depend on a size: measured at some sizes, known between them.

Between two points a rate is interpolated on logarithmic axes, where measured rates are close to
straight. Below the first point the time stays what it is there (a small piece of work costs as much
as a smaller one), above the last the rate does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from flexpipe.errors import PolicyError


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate, per second, by the size of the work; sizes ascend."""

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] <= 0:
            raise PolicyError(f"a curve's sizes must be positive and ascend, got {self.sizes}")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise PolicyError(f"rates must be positive and finite, got {self.rates}")

    @classmethod
    def of(cls, points: Mapping[float, float]) -> Curve:
        sizes = tuple(sorted(points))
        return cls(sizes, tuple(points[size] for size in sizes))

    @classmethod
    def flat(cls, rate: float) -> Curve:
        return cls((1.0,), (rate,))

    def rate(self, size: float) -> float:
        """Per second, for work of `size`."""
        sizes, rates = self.sizes, self.rates
        if size <= sizes[0]:
            return rates[0] * max(size, 1e-9) / sizes[0] if len(sizes) > 1 else rates[0]
        if size >= sizes[-1]:
            return rates[-1]
        above = bisect_left(sizes, size)
        low, high = sizes[above - 1], sizes[above]
        part = math.log(size / low) / math.log(high / low)
        return float(rates[above - 1] ** (1 - part) * rates[above] ** part)

    def seconds(self, amount: float, size: float | None = None) -> float:
        """For `amount` of work that comes in pieces of `size`, or in one."""
        return amount / self.rate(amount if size is None else size) if amount > 0 else 0.0

    def scaled(self, factor: float) -> Curve:
        return Curve(self.sizes, tuple(rate * factor for rate in self.rates))

    def capped(self, most: float) -> Curve:
        return Curve(self.sizes, tuple(min(rate, most) for rate in self.rates))


@dataclass(frozen=True, slots=True)
class Surface:
    """A rate by two sizes: curves over the second one, at some values of the first."""

    sizes: tuple[float, ...]
    curves: tuple[Curve, ...]

    @classmethod
    def of(cls, curves: Mapping[float, Curve]) -> Surface:
        sizes = tuple(sorted(curves))
        return cls(sizes, tuple(curves[size] for size in sizes))

    def rate(self, first: float, second: float) -> float:
        """Beyond its ends in the first size it stays what it is there."""
        sizes = self.sizes
        if first <= sizes[0] or len(sizes) == 1:
            return self.curves[0].rate(second)
        if first >= sizes[-1]:
            return self.curves[-1].rate(second)
        above = bisect_left(sizes, first)
        low, high = sizes[above - 1], sizes[above]
        part = math.log(first / low) / math.log(high / low)
        rates = self.curves[above - 1].rate(second), self.curves[above].rate(second)
        return float(rates[0] ** (1 - part) * rates[1] ** part)
