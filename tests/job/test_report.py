"""A report says the same as data and as a table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flexpipe.job.report import LaneUse, LinkUse, Report, ShareUse, TierUse
from flexpipe.schedule.places import StepCount, tail
from flexpipe.units import GIB

REPORT = Report(
    model="demo",
    device="emulated",
    compute_dtype="float32",
    strategy="event",
    num_requests=4,
    num_finished=3,
    num_failed=1,
    load_s=1.5,
    prefill_s=2.0,
    decode_s=4.0,
    total_s=8.0,
    prompt_tokens=100,
    generated_tokens=43,
    decode_step_tokens=40,
    links=[
        LinkUse(name="h2d", bytes=3 * GIB, busy_s=1.5, bytes_per_s=2.1e9),
        LinkUse(name="d2h", bytes=0, busy_s=0.0, bytes_per_s=0.0),
    ],
    lanes=[LaneUse(name="compute", num_ops=12, busy_s=5.0, busy_share=0.83)],
    tiers=[
        TierUse(tier="gpu", asked_bytes=GIB, planned_bytes=GIB // 2, measured_bytes=GIB // 4),
        TierUse(tier="cpu", planned_bytes=2 * GIB, measured_bytes=GIB),
    ],
    shares=[ShareUse(kind="weights", tier="gpu", asked=0.5, achieved=0.493, bytes=GIB)],
    policy={"strategy": "event"},
    notes=["direct I/O is not possible on this mount"],
)


def test_prefill_and_decode_have_throughputs_of_their_own() -> None:
    assert REPORT.prefill_tokens_per_s == pytest.approx(50.0)
    assert REPORT.decode_tokens_per_s == pytest.approx(10.0)
    assert REPORT.generated_tokens_per_s == pytest.approx(43 / 6)


def test_data_is_json_and_holds_every_figure() -> None:
    data = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert data["links"][0]["bytes"] == 3 * GIB
    assert data["tiers"][1]["asked_bytes"] is None
    assert data["prefill_tokens_per_s"] == pytest.approx(50.0)
    assert data["shares"][0]["achieved"] == 0.493


def test_table_shows_asked_planned_and_measured_side_by_side() -> None:
    lines = REPORT.render().splitlines()
    assert (
        lines[0] == "demo on emulated in float32, overlap event: 3 of 4 requests finished, 1 failed"
    )
    row = {line.split()[0]: line.split() for line in lines if line}
    assert row["gpu"] == ["gpu", "1", "GiB", "512", "MiB", "256", "MiB"]
    assert "what is free" in " ".join(row["cpu"])
    assert row["h2d"] == ["h2d", "3", "GiB", "1.50", "2.1", "GB/s"]
    assert row["compute"][-1] == "83%"
    assert row["prefill"] == ["prefill", "2.00", "100", "50.0"]
    assert lines[-1].startswith("note: direct I/O")


def test_the_tail_stands_beside_its_bound() -> None:
    """Steps end at 1, 2 and 4 s, then two in the drain take 1 and 3 s: at best 2 x 1 s."""
    counts = [
        StepCount(rows=1, end_s=end, is_tail=drains)
        for end, drains in ((1.0, False), (2.0, False), (4.0, False), (5.0, True), (8.0, True))
    ]
    assert tail(counts) == (4.0, 2, 2.0)
    assert tail(counts[:3]) == tail(counts[3:]) == tail([]) == (0.0, 0, 0.0)
    report = replace(REPORT, tail_s=4.0, tail_steps=2, tail_bound_s=2.0, bottleneck="lane x")
    lines = [line.split() for line in report.render().splitlines()]
    assert ["tail", "of", "2", "steps", "4.00"] in lines and ["its", "bound", "2.00"] in lines


def test_columns_line_up() -> None:
    table = [line for line in REPORT.render().splitlines() if "B/s" in line]
    assert len({len(line) for line in table}) == 1


def test_a_run_without_time_has_no_rate() -> None:
    empty = Report(
        model="m",
        device="cpu",
        compute_dtype="float32",
        strategy="none",
        num_requests=0,
        num_finished=0,
        num_failed=0,
        load_s=0.0,
        prefill_s=0.0,
        decode_s=0.0,
        total_s=0.0,
        prompt_tokens=0,
        generated_tokens=0,
        decode_step_tokens=0,
    )
    assert empty.generated_tokens_per_s == 0.0
    assert "link" not in empty.render()
