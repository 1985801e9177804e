"""Fuzzed lines through a whole job: no traceback, and each bad line costs itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from tests.job.test_request import LINES

DEMO = Path(__file__).parents[2] / "flexpipe/demo/model"


def fuzzed_lines(number: int) -> list[bytes]:
    drawn: list[bytes] = []

    @settings(
        max_examples=number // 10,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(lines=st.lists(LINES, min_size=20, max_size=40))
    def draw(lines: list[bytes]) -> None:
        drawn.extend(lines)

    draw()
    assert len(drawn) >= number
    return drawn[:number]


@pytest.mark.parametrize("num_lines", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_fuzzed_lines_end_in_one_record_each(tmp_path: Path, num_lines: int) -> None:
    neighbour = b'{"id": "neighbour %d", "prompt": "Hello support,", "max_tokens": 3}'
    woven = [neighbour % 0]
    for number, line in enumerate(fuzzed_lines(num_lines), start=1):
        woven += [line, neighbour % number]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(woven) + b"\n")
    spec = JobSpec(
        model=str(DEMO),
        input_path=tmp_path / "in.jsonl",
        output_path=tmp_path / "out.jsonl",
        max_tokens=2,
        device="cpu",
        offload_dir=tmp_path / "offload",
        progress=False,
    )
    report = run_job(spec)
    records = [json.loads(line) for line in spec.output_path.read_text("utf-8").splitlines()]
    lines_with_something = sum(bool(line.strip()) for line in woven)
    assert len(records) == report.num_requests == lines_with_something
    assert report.num_failed == sum("error" in record for record in records) > num_lines / 4
    assert report.num_finished + report.num_failed == report.num_requests
    assert report.num_finished > num_lines
    neighbours = {r["id"]: r for r in records if str(r["id"]).startswith("neighbour ")}
    assert len(neighbours) == num_lines + 1
    assert {tuple(record["token_ids"]) for record in neighbours.values()} == {
        tuple(neighbours["neighbour 0"]["token_ids"])
    }
