"""Pictures of a run: one row per lane, one bar per op, times from clocks.

JSON for Perfetto (ui.perfetto.dev) and chrome://tracing, in the Trace Event Format; PNG and SVG
through matplotlib. Whoever has spans can draw them: the executor's record and a prediction look
the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from flexpipe.errors import InputError
from flexpipe.plan.plan import Plan
from flexpipe.schedule.op import Kind, Lane, Op

_COLOURS: Mapping[Kind, str] = {
    Kind.READ_WEIGHT: "#8c6bb1",
    Kind.LOAD_WEIGHT: "#6a51a3",
    Kind.READ_EMBED: "#9e9ac8",
    Kind.LOAD_EMBED: "#756bb1",
    Kind.READ_CACHE: "#41ae76",
    Kind.LOAD_CACHE: "#238b45",
    Kind.STORE_CACHE: "#d94801",
    Kind.WRITE_CACHE: "#f16913",
    Kind.READ_HIDDEN: "#7fcdbb",
    Kind.LOAD_HIDDEN: "#41b6c4",
    Kind.STORE_HIDDEN: "#fdae6b",
    Kind.WRITE_HIDDEN: "#fdd0a2",
    Kind.MOVE_QUERY: "#c994c7",
    Kind.ATTEND_CPU: "#ce1256",
    Kind.MOVE_OUTPUT: "#df65b0",
    Kind.COMPUTE: "#2171b5",
    Kind.SAMPLE: "#6baed6",
    Kind.FETCH_TOKENS: "#9ecae1",
    Kind.RECEIVE_HIDDEN: "#fed976",
    Kind.SEND_HIDDEN: "#feb24c",
    Kind.RECEIVE_TOKENS: "#e7cb94",
    Kind.SEND_TOKENS: "#bd9e39",
    Kind.ALL_REDUCE: "#fb9a99",
    Kind.COMMIT: "#737373",
    Kind.BARRIER: "#252525",
}


Event = dict[str, object]


class Timed(Protocol):
    """An op and when it ran, in seconds since the start."""

    @property
    def op(self) -> Op: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...


def write_trace(path: Path, spans: Sequence[Timed], plan: Plan) -> None:
    """Draw the `spans` of one stage into a .json, .png or .svg file."""
    write_traces(path, [spans], [plan])


def write_traces(path: Path, stages: Sequence[Sequence[Timed]], plans: Sequence[Plan]) -> None:
    """The same of all stages: a process each in a trace, one below the other in a picture."""
    if path.suffix == ".json":
        write_events(path, perfetto(stages, plans))
        return
    try:
        _draw(path, stages)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_events(path: Path, events: Sequence[Event]) -> None:
    """A trace as JSON."""
    try:
        content = {"traceEvents": events, "displayTimeUnit": "ms"}
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def perfetto(stages: Sequence[Sequence[Timed]], plans: Sequence[Plan]) -> list[Event]:
    """The Trace Event Format: complete events in microseconds, a process per stage, a thread per
    lane."""
    names = [f"stage {plan.rank}" if len(plans) > 1 else None for plan in plans]
    return [
        event
        for spans, plan, name in zip(stages, plans, names, strict=True)
        for event in stage_events(spans, plan, plan.rank, name)
    ]


def stage_events(spans: Sequence[Timed], plan: Plan, process: int, name: str | None) -> list[Event]:
    """The events of one stage, as process number `process` of that name."""
    used = [lane for lane in Lane if any(span.op.lane == lane for span in spans)]
    process_name = {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    names: list[Event] = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": process,
            "tid": tid,
            "args": {"name": lane.value},
        }
        for tid, lane in enumerate(used)
    ]
    order: list[Event] = [
        {
            "ph": "M",
            "name": "thread_sort_index",
            "pid": process,
            "tid": tid,
            "args": {"sort_index": tid},
        }
        for tid in range(len(used))
    ]
    events: list[Event] = [
        {
            "ph": "X",
            "name": _name(span.op, plan),
            "cat": span.op.kind.value,
            "pid": process,
            "tid": used.index(span.op.lane),
            "ts": round(span.start_s * 1e6, 3),
            "dur": round((span.end_s - span.start_s) * 1e6, 3),
            "args": _args(span.op, plan),
        }
        for span in spans
    ]
    return [*([process_name] if name else []), *names, *order, *events]


def _name(op: Op, plan: Plan) -> str:
    mb = "" if op.mb is None else f" mb {op.mb}"
    part = "" if op.segment is None else f" {op.segment.value} of"
    return f"{op.kind.value}{part} {plan.layers[op.layer].name}{mb}"


def _args(op: Op, plan: Plan) -> dict[str, object]:
    args: dict[str, object] = {"op": op.id, "step": op.step, "layer": plan.layers[op.layer].name}
    if op.batch is not None:
        args |= {"micro_batch": op.batch.index, "new_tokens": op.batch.num_new}
    args["waits_for"] = [f"{wait.op} {wait.why}" for wait in op.waits_for]
    return args


def _draw(path: Path, stages: Sequence[Sequence[Timed]]) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise InputError(
            f"{path} needs matplotlib: pip install 'flexpipe[plot]', or write a .json trace"
        ) from None
    rows = [
        (f"{rank} " * (len(stages) > 1) + lane.value, mine)
        for rank, spans in enumerate(stages)
        for lane in Lane
        if (mine := [span for span in spans if span.op.lane == lane])
    ]
    kinds = [kind for kind in Kind if any(s.op.kind == kind for _, mine in rows for s in mine)]
    figure = Figure(figsize=(14, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (_, mine) in enumerate(rows):
        axes.broken_barh(
            [(span.start_s, span.end_s - span.start_s) for span in mine],
            (row - 0.4, 0.8),
            facecolors=[_COLOURS[span.op.kind] for span in mine],
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    figure.legend(
        handles=[Patch(color=_COLOURS[kind], label=kind.value) for kind in kinds],
        loc="outside upper center",
        ncols=min(len(kinds), 9),
        frameon=False,
        fontsize="small",
    )
    figure.savefig(path, dpi=150)
