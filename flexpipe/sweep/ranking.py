"""The rows of a sweep, best first, as a table, as CSV or as JSON.

Measured and predicted figures never share a column. A row is as good as its measured throughput,
or its predicted one where nothing was measured; rows without figures come last, with the reason.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexpipe.job.bench import FIGURES, Format
from flexpipe.job.table import markdown_table
from flexpipe.plan.spelling import as_options
from flexpipe.sweep.point import Point
from flexpipe.sweep.setting import plain, shown

KEPT = ("measured", "measure_error", "predicted", "predict_error")
_FORECAST = ("generated_tokens_per_s", "latency_s", "total_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is known of a point: bench's report and the forecast as they came, or why they did not.

    Latency is from a request's start to its last token.
    """

    point: Point
    measured: Mapping[str, Any] | None = None
    measure_error: str | None = None
    predicted: Mapping[str, Any] | None = None
    predict_error: str | None = None

    @classmethod
    def of(cls, point: Point, line: Mapping[str, Any]) -> Row:
        """The row that a line of the ledger keeps of `point`."""
        return cls(point=point, **{name: line.get(name) for name in KEPT})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the ledger keeps them."""
        return {
            "settings": {name: plain(value) for name, value in self.point.settings.items()},
            "asked": dict(self.point.asked),
            "refusal": self.point.refusal,
            **{name: getattr(self, name) for name in KEPT},
        }

    @property
    def reason(self) -> str | None:
        """Why figures are missing."""
        return self.point.refusal or self.measure_error or self.predict_error

    @property
    def has_figures(self) -> bool:
        return self.measured is not None or self.predicted is not None

    @property
    def measured_tokens_per_s(self) -> float | None:
        return None if self.measured is None else _rate(self.measured["median"])

    @property
    def spread_tokens_per_s(self) -> float | None:
        return None if self.measured is None else _rate(self.measured["spread"])

    @property
    def predicted_tokens_per_s(self) -> float | None:
        return None if self.predicted is None else _rate(self.predicted)

    @property
    def measured_latency_s(self) -> float | None:
        if self.measured is None:
            return None
        times: Mapping[str, float] = self.measured["median"]
        return times["latency_s"] if "latency_s" in times else times["total_s"]

    @property
    def predicted_latency_s(self) -> float | None:
        return None if self.predicted is None else float(self.predicted["latency_s"])

    @property
    def error(self) -> float | None:
        """How far the predicted throughput lies above the measured one, as a fraction of it."""
        measured, predicted = self.measured_tokens_per_s, self.predicted_tokens_per_s
        return predicted / measured - 1 if measured and predicted else None


def _rate(figures: Mapping[str, Any]) -> float:
    rate: float = figures["generated_tokens_per_s"]
    return rate


def best_first(rows: Iterable[Row]) -> list[Row]:
    """By throughput, the measured one where there is one; what has none keeps its order."""
    return sorted(
        rows, key=lambda row: -(row.measured_tokens_per_s or row.predicted_tokens_per_s or 0.0)
    )


def render(rows: Sequence[Row], format: Format) -> str:
    """The rows as Markdown, as CSV or as one line of JSON, in the order given."""
    return {"md": _markdown, "csv": _csv, "json": _json}[format](rows)


def _json(rows: Sequence[Row]) -> str:
    told = [
        {**row.to_dict(), "key": row.point.key, "error": row.error, "reason": row.reason}
        for row in rows
    ]
    return json.dumps({"rows": told})


def _csv(rows: Sequence[Row]) -> str:
    records = [_record(row) for row in rows]
    head = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().rstrip("\n")


def _record(row: Row) -> dict[str, Any]:
    """A flat row; the policy is the one that ran, or else the one that was predicted."""
    measured, predicted = row.measured or {}, row.predicted or {}
    return {
        **dict.fromkeys(_names([row]), ""),
        **{name: shown(value) for name, value in row.point.settings.items()},
        **{name: row.point.asked[name] for name in ("model", "device")},
        **{name: measured[name] for name in ("device", "compute_dtype") if name in measured},
        **{f"measured_{name}": measured.get("median", {}).get(name) for name in FIGURES},
        "measured_latency_s": row.measured_latency_s,
        "spread_generated_tokens_per_s": row.spread_tokens_per_s,
        **{f"predicted_{name}": predicted.get(name) for name in _FORECAST},
        "error": row.error,
        "reason": row.reason,
        "policy": json.dumps((measured or predicted).get("policy")),
        "key": row.point.key,
    }


_COLUMNS: Mapping[str, tuple[Callable[[Row], float | None], str]] = {
    "measured tokens/s": (lambda row: row.measured_tokens_per_s, ".2f"),
    "spread": (lambda row: row.spread_tokens_per_s, ".2f"),
    "predicted tokens/s": (lambda row: row.predicted_tokens_per_s, ".2f"),
    "error": (lambda row: row.error, "+.1%"),
    "measured latency s": (lambda row: row.measured_latency_s, ".2f"),
    "predicted latency s": (lambda row: row.predicted_latency_s, ".2f"),
}


def _markdown(rows: Sequence[Row]) -> str:
    """A table of the rows with figures, the best one's policy, and the reasons of the others."""
    figured = [row for row in rows if row.has_figures]
    names = _names(figured)
    used = {
        head: (read, form)
        for head, (read, form) in _COLUMNS.items()
        if any(read(row) is not None for row in figured)
    }
    body = [
        [
            str(number),
            *(_setting(row, name) for name in names),
            *(_cell(read(row), form) for read, form in used.values()),
        ]
        for number, row in enumerate(figured, 1)
    ]
    parts = [markdown_table(["", *names, *used], body)]
    policy = (figured[0].measured or figured[0].predicted or {}).get("policy")
    if policy:
        parts.append(f"Best: `{as_options(policy)}`")
    missing = [f"- {row.point.name}: {row.reason}" for row in rows if row.reason]
    if missing:
        parts.append("\n".join(["Without figures, or with fewer than asked for:", "", *missing]))
    return "\n\n".join(parts)


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.point.settings))


def _setting(row: Row, name: str) -> str:
    settings = row.point.settings
    return shown(settings[name]) if name in settings else ""


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
