"""Pictures of a run: one row per lane, ops by name, times from clocks."""

from __future__ import annotations

import builtins
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from flexpipe.errors import InputError
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import percent_shares
from flexpipe.schedule.op import Kind, Op
from flexpipe.schedule.trace import perfetto, write_trace
from tests.schedule.plans import ops_of, step_of, tiny_plan


@dataclass(frozen=True)
class Span:
    op: Op
    start_s: float
    end_s: float


@pytest.fixture
def plan() -> Plan:
    shares = percent_shares([20, 40, 30, 30, 30, 30])
    return tiny_plan(shares, micro_batch_size=2, num_micro_batches=4)


@pytest.fixture
def spans(plan: Plan) -> list[Span]:
    ops = ops_of(plan, [step_of(plan)] * 2)
    return [Span(op, 0.001 * i, 0.001 * i + 0.0005) for i, op in enumerate(ops)]


def test_a_lane_is_a_named_row_in_a_fixed_order(plan, spans):
    events = perfetto([spans], [plan])
    rows = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert list(rows) == list(range(len(rows)))
    assert set(rows.values()) == {span.op.lane.value for span in spans}
    assert rows[0] == "compute"
    order = [event for event in events if event["name"] == "thread_sort_index"]
    assert [event["args"]["sort_index"] for event in order] == list(range(len(rows)))


def test_an_op_is_a_complete_event_in_microseconds_on_its_lane(plan, spans):
    events = [event for event in perfetto([spans], [plan]) if event["ph"] == "X"]
    rows = {
        event["tid"]: event["args"]["name"]
        for event in perfetto([spans], [plan])
        if event["name"] == "thread_name"
    }
    assert len(events) == len(spans)
    for event, span in zip(events, spans, strict=True):
        assert event["ts"] == pytest.approx(span.start_s * 1e6)
        assert event["dur"] == pytest.approx(500)
        assert event["cat"] == span.op.kind.value
        assert rows[event["tid"]] == span.op.lane.value
        assert event["args"]["op"] == span.op.id


def test_ops_are_named_by_what_they_do_their_layer_and_micro_batch(plan, spans):
    names = {event["name"] for event in perfetto([spans], [plan])}
    assert {"compute decoder 0 mb 1", "load_weight decoder 2", "commit head [0:320] mb 0"} <= {
        name.replace(f"[{name.split('[')[-1]}", "[0:320] mb 0") if "commit head" in name else name
        for name in names
    }


def test_a_json_trace_is_what_perfetto_reads(plan, spans, tmp_path):
    path = tmp_path / "run.json"
    write_trace(path, spans, plan)
    content = json.loads(path.read_text())
    assert content["displayTimeUnit"] == "ms"
    assert {event["ph"] for event in content["traceEvents"]} == {"M", "X"}
    for event in content["traceEvents"]:
        assert {"name", "pid", "tid"} <= set(event)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_picture_is_written(plan, spans, tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"run{suffix}"
    write_trace(path, spans, plan)
    assert path.read_bytes().startswith(start)
    assert path.stat().st_size > 5000


def test_a_picture_names_its_lanes_and_kinds_of_ops(plan, spans, tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib

    path = tmp_path / "run.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_trace(path, spans, plan)
    text = path.read_text()
    for span in spans:
        assert span.op.lane.value in text
        assert span.op.kind.value in text
    assert "seconds" in text


def test_without_matplotlib_the_error_says_what_to_install(plan, spans, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name: str, *rest: object, **more: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"needs matplotlib: pip install 'flexpipe\[plot\]'.*json"):
        write_trace(tmp_path / "run.png", spans, plan)


def test_a_trace_that_cannot_be_written_is_told(plan, spans, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*run\.json: No such file"):
        write_trace(tmp_path / "no" / "run.json", spans, plan)


def test_an_empty_run_makes_an_empty_trace(plan, tmp_path: Path):
    write_trace(tmp_path / "none.json", [], plan)
    written = json.loads((tmp_path / "none.json").read_text())
    assert written == {"traceEvents": [], "displayTimeUnit": "ms"}


def test_every_kind_of_op_has_a_colour_of_its_own():
    from flexpipe.schedule.trace import _COLOURS

    assert set(_COLOURS) == set(Kind)
    assert len(set(_COLOURS.values())) == len(Kind)
