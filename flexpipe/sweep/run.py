"""A sweep: every point of a grid predicted, measured, or both, and nothing done twice.

A measured point is `flexpipe bench` in a process of its own, so whatever becomes of it (a crash, a
plan that does not fit, a timeout) is a row with its reason. What the ledger holds under a point's
key is finished. A prediction is in the ledger before its point is measured.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from flexpipe.errors import FlexpipeError, ModelError, RunError
from flexpipe.job.bench import Workload
from flexpipe.job.spec import JobSpec
from flexpipe.sweep.child import Ended, run_flexpipe
from flexpipe.sweep.ledger import Ledger
from flexpipe.sweep.point import Point
from flexpipe.sweep.ranking import Row
from flexpipe.units import format_seconds

# From the knobs of a point and its workload: at least total_s, generated_tokens_per_s, latency_s
# and policy, flat but for the policy. A FlexpipeError says why there can be no such run.
Forecast: TypeAlias = Callable[[Mapping[str, Any], Workload], Mapping[str, Any]]
Measure: TypeAlias = Callable[[Point], Ended]

_ERROR = "flexpipe: error: "
_LONGEST = 1000  # of a reason

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCommand:
    """`flexpipe bench` for the points of one sweep, which share `spec`."""

    spec: JobSpec
    timeout_s: float | None = None

    def __call__(self, point: Point) -> Ended:
        # the knobs go in as a policy file, exactly as they are: JSON is YAML
        policy = dict(point.asked["knobs"])
        if self.spec.made_for is not None:
            policy["made_for"] = asdict(self.spec.made_for)
        return run_flexpipe(
            self.arguments(point), stdin=json.dumps(policy), timeout_s=self.timeout_s
        )

    def arguments(self, point: Point) -> list[str]:
        """The command line, its policy on stdin."""
        assert point.workload is not None
        spec = self.spec
        given = {
            "model": spec.model,
            "revision": spec.revision,
            "load_format": spec.load_format,
            "seed": spec.seed,
            "device": spec.device,
            "emulate": spec.emulation and spec.emulation.spelled,
            "offload_dir": spec.offload_dir,
            "policy": "/dev/stdin",
            **asdict(point.workload),
        }
        options = [
            word
            for name, value in given.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        return ["bench", *options, "--json"]


def run_sweep(
    points: Sequence[Point],
    ledger: Ledger,
    *,
    forecast: Forecast | None,
    measure: Measure | None,
    retry: bool = False,
) -> list[Row]:
    """The row of every point, those without figures included.

    With `retry` what failed is tried again. A ModelError if bench cannot read the model; a RunError
    if no point has figures, with the reason most of them share.
    """
    sweep = _Sweep(points, ledger, retry)
    if forecast is not None:
        sweep.predict(forecast)
    if measure is not None:
        sweep.measure(measure)
    rows = sweep.rows()
    if not any(row.has_figures for row in rows):
        raise _nothing_feasible(rows)
    return rows


def is_finished(row: Row, *, measured: bool, retry: bool) -> bool:
    """Whether nothing is left to measure, or else to predict; with `retry` a failure is."""
    done, failed = (
        (row.measured, row.measure_error) if measured else (row.predicted, row.predict_error)
    )
    return row.point.refusal is not None or done is not None or (failed is not None and not retry)


class _Sweep:
    def __init__(self, points: Sequence[Point], ledger: Ledger, retry: bool) -> None:
        self._points = points
        self._ledger = ledger
        self._retry = retry
        for point in points:
            if point.refusal is not None and point.key not in ledger.lines:
                self._keep(Row(point=point))

    def rows(self) -> list[Row]:
        return [self._row(point) for point in self._points]

    def predict(self, forecast: Forecast) -> None:
        left = self._left(measured=False)
        if left:
            log.info("sweep: predicting %d of %d points", len(left), len(self._points))
        for point in left:
            assert point.workload is not None
            row = self._row(point)
            try:
                told = dict(forecast(point.knobs, point.workload))
                self._keep(replace(row, predicted=told, predict_error=None))
            except FlexpipeError as error:
                self._keep(replace(row, predict_error=str(error)))

    def measure(self, measure: Measure) -> None:
        left = self._left(measured=True)
        if done := len(self._points) - len(left):
            log.info("sweep: nothing to do for %d of %d points", done, len(self._points))
        started = time.monotonic()
        for number, point in enumerate(left):
            name = f"sweep: point {self._points.index(point) + 1} of {len(self._points)}"
            log.info("%s: %s", name, point.name)
            row = replace(self._row(point), **_told(measure(point)))
            self._keep(row)
            each_s = (time.monotonic() - started) / (number + 1)
            log.info("%s: %s%s", name, _summary(row), _to_go(each_s * (len(left) - number - 1)))

    def _left(self, *, measured: bool) -> list[Point]:
        return [
            row.point
            for row in self.rows()
            if not is_finished(row, measured=measured, retry=self._retry)
        ]

    def _row(self, point: Point) -> Row:
        return Row.of(point, self._ledger.lines.get(point.key, {}))

    def _keep(self, row: Row) -> None:
        self._ledger.write(row.point.key, row.to_dict())


def _told(ended: Ended) -> dict[str, Any]:
    """What a bench that ended has to say: its report, or why there is none."""
    reason = _reason(ended)
    if reason is None:
        try:
            return {"measured": json.loads(ended.stdout), "measure_error": None}
        except ValueError:
            reason = "bench ended without its report"
    if ended.exit_code == ModelError.exit_code and not ended.timed_out:
        raise ModelError(reason)  # no point will do better
    return {"measure_error": reason}


def _reason(ended: Ended) -> str | None:
    said = _last_words(ended.stderr)
    if ended.timed_out:
        return f"took longer than --timeout allows; it last said: {said}"
    if ended.exit_code < 0:
        number = -ended.exit_code
        hint = ", as the kernel does when memory runs out" if number == signal.SIGKILL else ""
        name = signal.strsignal(number) or "unknown"
        return f"ended by signal {number} ({name}){hint}; it last said: {said}"
    if ended.exit_code:
        return said if _ERROR in ended.stderr else f"exit code {ended.exit_code}: {said}"
    return None


def _last_words(stderr: str) -> str:
    """The error's text, or else the last line."""
    if _ERROR in stderr:
        stderr = stderr.rpartition(_ERROR)[2]
        return " ".join(stderr.split())[:_LONGEST]
    lines = [line.strip() for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    return lines[-1][:_LONGEST] if lines else "nothing"


def _summary(row: Row) -> str:
    if row.measured is None:
        return f"no figures: {row.reason}"
    text = (
        f"{row.measured_tokens_per_s:.2f} tokens/s (spread {row.spread_tokens_per_s:.2f}), "
        f"latency {row.measured_latency_s:.2f} s"
    )
    return text if row.error is None else f"{text}; predicted {row.error:+.1%}"


def _to_go(seconds: float) -> str:
    return f"; about {format_seconds(seconds)} to go" if seconds else ""


def _nothing_feasible(rows: Sequence[Row]) -> RunError:
    """Reasons that differ in figures only count as one."""
    reasons = [row.reason or "it was not tried" for row in rows]
    kinds = [re.sub(r"[0-9][0-9.]*", "0", reason) for reason in reasons]
    (kind, count), *_ = Counter(kinds).most_common(1)
    return RunError(
        f"none of the sweep's {len(rows)} points could run; the reason of {count}, such as "
        f"{rows[kinds.index(kind)].point.name}: {reasons[kinds.index(kind)]}"
    )
