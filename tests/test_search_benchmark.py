"""The search's benchmark without its runs: what it compares, and how it tells who won."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.search import Measured, job_spec, tables, to_dict
from benchmarks.searched_workloads import NAIVE, NUM_DRAWN, SEARCHED, WORKLOADS, Searched
from flexpipe.sweep.point import Point, make_points
from flexpipe.sweep.ranking import Row

IN_RAM = next(one for one in WORKLOADS if one.name == "in RAM")


def measured_rows(points: Sequence[Point], rates: Mapping[str, float]) -> list[Row]:
    """A row for each point: its key's rate measured and predicted, or none."""
    return [
        Row(point=point, measured=(made := report(rates[point.key])), predicted=made["median"])
        if point.key in rates
        else Row(point=point, measure_error="the plan does not fit")
        for point in points
    ]


def report(rate: float) -> dict[str, Any]:
    figures = {"generated_tokens_per_s": rate, "latency_s": 1.0, "total_s": 1.0}
    return {"median": figures, "spread": {"generated_tokens_per_s": 0.0}}


@pytest.fixture
def points(tmp_path: Path) -> list[Point]:
    return make_points(IN_RAM.settings(), job_spec(tmp_path, IN_RAM), IN_RAM.load)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one.name)
def test_every_value_of_a_knob_is_drawn_as_often_as_it_is_listed(workload: Searched) -> None:
    drawn = list(workload.drawn())
    for name, values in workload.axes.items():
        listed, came = Counter(map(str, values)), Counter(str(one[name]) for one in drawn)
        rounds = NUM_DRAWN // len(values)
        assert all(came[value] >= rounds * times for value, times in listed.items())


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one.name)
def test_the_same_policies_are_drawn_every_time(workload: Searched) -> None:
    assert workload.settings() == workload.settings()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one.name)
def test_what_is_drawn_leaves_no_knob_to_the_search(workload: Searched) -> None:
    chosen = {"weights", "kv_cache", "hidden", "micro_batch_size", "num_micro_batches", "strategy"}
    assert all(chosen <= settings.keys() for settings in workload.drawn())


def test_every_workload_compares_forty_policies_the_naive_ones_and_the_searched_one(
    tmp_path: Path,
) -> None:
    for workload in WORKLOADS:
        made = make_points(workload.settings(), job_spec(tmp_path, workload), workload.load)
        assert len(made) == NUM_DRAWN + len(NAIVE[workload.device]) + 1 >= 44
        assert made[0].settings == SEARCHED


def test_the_searched_plan_is_judged_by_medians_of_the_rounds(points: list[Point]) -> None:
    searched, other = points[0], points[-1]
    rows = measured_rows(points, {searched.key: 90.0, other.key: 300.0})
    rates = itertools.zip_longest((90.0, 80.0, 70.0), (100.0, 500.0, 10.0))
    rounds = [
        measured_rows([searched, other], {searched.key: mine, other.key: best})
        for mine, best in rates
    ]
    one = Measured(workload=IN_RAM, rows=rows, rounds=rounds)
    assert one.medians() == {other.key: 100.0, searched.key: 80.0}
    assert one.reached == pytest.approx(0.8)
    assert list(one.medians()) == [other.key, searched.key]


def test_a_policy_that_cannot_run_is_told_with_its_reason(points: list[Point]) -> None:
    searched, other = points[0], points[-1]
    rates = {searched.key: 90.0, other.key: 100.0}
    one = Measured(
        workload=IN_RAM,
        rows=measured_rows(points, rates),
        rounds=[measured_rows([searched, other], rates)],
    )
    reasons = [row["reason"] for row in json.loads(json.dumps(to_dict(one)))["rows"]]
    assert reasons.count("the plan does not fit") == len(points) - 2
    assert "the plan does not fit" in tables([one])  # of a naive plan
