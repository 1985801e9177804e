"""A prediction stands beside what was measured, figure by figure."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from flexpipe.job.predicted import Compared, Predicted
from flexpipe.units import MIB

PREDICTED = Predicted(
    profile="t4",
    profile_date="2026-11-21",
    total_s=11.0,
    generated_tokens_per_s=12.5,
    bottleneck="h2d",
    bound_s=9.0,
    figures=[Compared("total_s", 11.0, 10.0), Compared("h2d_bytes", 3 * MIB, 4 * MIB)],
)


def test_the_error_is_relative_to_what_was_measured() -> None:
    assert Compared("total_s", 11.0, 10.0).error == pytest.approx(0.1)
    assert Compared("total_s", 9.0, 10.0).error == pytest.approx(-0.1)
    assert Compared("d2h_bytes", 5.0, 0.0).error is None


def test_a_row_shows_both_in_their_unit() -> None:
    rows = [figure.row() for figure in PREDICTED.figures]
    assert rows[0] == ("total", "11 s", "10 s", "+10.0%")
    assert rows[1] == ("h2d", "3 MiB", "4 MiB", "-25.0%")
    assert Compared("peak_gpu_bytes", MIB, MIB).row() == ("peak gpu", "1 MiB", "1 MiB", "+0.0%")


def test_data_holds_the_error() -> None:
    data = json.loads(json.dumps(asdict(PREDICTED), allow_nan=False))
    assert data["figures"][0] == {
        "name": "total_s",
        "predicted": 11.0,
        "measured": 10.0,
        "error": pytest.approx(0.1),
    }


def test_several_runs_are_told_by_their_medians() -> None:
    runs = [
        replace(PREDICTED, figures=[Compared("total_s", 11.0, measured)])
        for measured in (10.0, 30.0, 12.0)
    ]
    over = Predicted.over(runs)
    assert over is not None
    assert list(over.figures) == [Compared("total_s", 11.0, 12.0)]
    assert Predicted.over([]) is None
