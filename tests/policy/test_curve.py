"""Rates between measured sizes and beyond them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.policy.curve import Curve, Surface

RATES = st.floats(1.0, 1e12)
POINTS = st.dictionaries(st.floats(1.0, 1e9), RATES, min_size=1, max_size=6)


@given(points=POINTS)
def test_at_a_measured_size_the_rate_is_what_was_measured(points):
    curve = Curve.of(points)
    for size, rate in points.items():
        assert curve.rate(size) == pytest.approx(rate)


@given(points=POINTS, size=st.floats(1e-3, 1e12))
def test_between_sizes_a_rate_lies_between_its_neighbours(points, size):
    curve = Curve.of(points)
    if len(points) > 1 and size < curve.sizes[0]:
        return
    below = [rate for known, rate in points.items() if known <= size][-1:]
    assert min(points.values()) * (1 - 1e-9) <= curve.rate(size) or below
    assert curve.rate(size) <= max(points.values()) * (1 + 1e-9)


def test_between_two_sizes_a_rate_is_straight_on_logarithmic_axes():
    curve = Curve.of({1.0: 10.0, 100.0: 1000.0})
    assert curve.rate(10.0) == pytest.approx(100.0)


def test_work_below_the_first_size_takes_as_long_as_the_first():
    curve = Curve.of({64.0: 640.0, 128.0: 2000.0})
    assert curve.seconds(1.0) == curve.seconds(32.0) == pytest.approx(curve.seconds(64.0)) == 0.1


def test_above_the_last_size_the_rate_stays():
    curve = Curve.of({64.0: 640.0, 128.0: 2000.0})
    assert curve.rate(1e6) == 2000.0


def test_work_in_pieces_goes_at_the_rate_of_a_piece():
    curve = Curve.of({10.0: 100.0, 1000.0: 1000.0})
    assert curve.seconds(1000.0) == 1.0
    assert curve.seconds(1000.0, 10.0) == 10.0


def test_no_work_takes_no_time():
    assert Curve.of({10.0: 100.0, 20.0: 100.0}).seconds(0) == 0.0


@given(first=RATES, second=RATES)
def test_a_surface_has_its_curves_at_its_sizes_and_beyond_its_ends(first, second):
    surface = Surface.of({10.0: Curve.flat(first), 1000.0: Curve.flat(second)})
    assert surface.rate(1.0, 5.0) == surface.rate(10.0, 5.0) == first
    assert surface.rate(1e6, 5.0) == surface.rate(1000.0, 5.0) == second
    assert surface.rate(100.0, 5.0) == pytest.approx((first * second) ** 0.5)


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ({}, "sizes must be positive"),
        ({-1.0: 5.0}, "sizes must be positive"),
        ({0.0: 5.0}, "sizes must be positive"),
        ({1.0: 0.0}, "rates must be positive"),
        ({1.0: float("inf")}, "rates must be positive"),
    ],
)
def test_a_curve_without_sense_is_refused(points, told):
    with pytest.raises(PolicyError, match=told):
        Curve.of(points)
