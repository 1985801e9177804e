"""Is the plan that the search finds as fast as the best of a sweep?

Four workloads (`searched_workloads.py`). Each has a sweep of policies drawn by a seed, which span
every discrete choice, the naive plans (all of a kind in one place, and of everything else what the
search thinks best), and the search's own plan: what a user gets who gives no knob at all. All are
predicted, then measured once, each by `flexpipe bench` in a process of its own. The five best and
the searched plan then run again, interleaved, and the medians decide.

The machine is profiled first; predictions are written before the runs they are about. What is
finished stays in the directory given, so the same command goes on where it ended. With --finals-of
the sweep is that of an earlier run's figures, and only the final is run.

    OMP_NUM_THREADS=2 PYTHONPATH=. taskset -c 0,1 python benchmarks/search.py DIR [--json FILE]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from benchmarks.searched_workloads import NAIVE, SEARCHED, WORKLOADS, Searched
from benchmarks.trial import machine, markdown
from flexpipe.job.spec import JobSpec
from flexpipe.policy.profile import PROFILE_VARIABLE
from flexpipe.sweep.child import Ended, run_flexpipe
from flexpipe.sweep.forecast import forecaster
from flexpipe.sweep.ledger import Ledger
from flexpipe.sweep.point import Point, make_points
from flexpipe.sweep.ranking import Row
from flexpipe.sweep.run import BenchCommand, run_sweep

ROUNDS = 3
FINALISTS = 5
TURN_S = 240.0  # that others wait for the lock
AIM = 0.93  # of the best policy's throughput


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One workload's rows: the sweep's, and those of every round of the final."""

    workload: Searched
    rows: Sequence[Row]
    rounds: Sequence[Sequence[Row]]

    @property
    def searched(self) -> Row:
        return next(row for row in self.rows if row.point.settings == SEARCHED)

    @property
    def naive(self) -> dict[str, Row]:
        homes = NAIVE[self.workload.device]
        return {
            name: row
            for name, settings in homes.items()
            for row in self.rows
            if row.point.settings == settings
        }

    @property
    def drawn(self) -> list[Row]:
        others = [SEARCHED, *NAIVE[self.workload.device].values()]
        return [row for row in self.rows if row.point.settings not in others]

    def medians(self) -> dict[str, float]:
        """Generated tokens/s of the finalists, by key, best first."""
        rates: dict[str, list[float]] = {}
        for row in (row for some in self.rounds for row in some):
            if row.measured_tokens_per_s is not None:
                rates.setdefault(row.point.key, []).append(row.measured_tokens_per_s)
        medians = {key: statistics.median(some) for key, some in rates.items()}
        return dict(sorted(medians.items(), key=lambda item: -item[1]))

    @property
    def reached(self) -> float:
        """The searched plan's median over the best one's."""
        medians = self.medians()
        return medians[self.searched.point.key] / max(medians.values())

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of predicted and measured throughput over all policies that ran in a sweep
        of this run."""
        pairs = [
            (row.predicted_tokens_per_s, row.measured_tokens_per_s)
            for row in self.rows
            if row.measured is not None and row.predicted is not None
        ]
        return float(spearmanr(*zip(*pairs, strict=True)).statistic) if pairs else None

    def row(self, key: str) -> Row:
        return next(row for row in self.rows if row.point.key == key)

    def name(self, row: Row) -> str:
        """`searched`, a naive plan's name, or the settings."""
        if row.point.settings == SEARCHED:
            return "searched"
        names = {id(one): name for name, one in self.naive.items()}
        return names.get(id(row), f"`{row.point.name}`")


# -- measuring -------------------------------------------------------------------------------------


def measure(
    directory: Path,
    workload: Searched,
    turns: Turns,
    timeout_s: float,
    swept: Sequence[float | None] | None = None,
) -> Measured:
    """The sweep, then the rounds of the final; or the final of a sweep whose policies generated so
    many tokens/s."""
    spec = job_spec(directory, workload)
    points = make_points(workload.settings(), spec, workload.load)
    if swept is not None:
        points = _best(points, swept)
    command = BenchCommand(spec=spec, timeout_s=timeout_s)

    def alone(point: Point) -> Ended:
        with turns:
            return command(point)

    folder = directory / workload.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with Ledger(folder / "sweep.jsonl") as ledger:
        with turns:
            _warm(folder, workload, command, points[0])
            rows = run_sweep(points, ledger, forecast=forecaster(spec), measure=None)
        if swept is None:
            rows = run_sweep(points, ledger, forecast=None, measure=alone)
            points = _best(points, [row.measured_tokens_per_s for row in rows])
    rounds = []
    for index in range(ROUNDS):
        with Ledger(folder / f"round-{index + 1}.jsonl") as ledger:
            turned = [*points[index:], *points[:index]]  # nobody always follows the same
            rounds.append(run_sweep(turned, ledger, forecast=None, measure=alone))
    return Measured(workload=workload, rows=rows, rounds=rounds)


def _best(points: Sequence[Point], rates: Sequence[float | None]) -> list[Point]:
    """The searched plan, which is the first point, and the best of those others that ran."""
    searched, *others = zip(points, rates, strict=True)
    ran = [(point, rate) for point, rate in others if rate is not None]
    ran.sort(key=lambda one: -one[1])
    return [searched[0], *(point for point, _ in ran[:FINALISTS])]


def _warm(folder: Path, workload: Searched, command: BenchCommand, point: Point) -> None:
    """A run that nobody counts: it draws the weights."""
    mark = folder / "warm"
    if not mark.exists():
        ended = command(point)
        if ended.exit_code:
            raise SystemExit(f"{workload.name}: {ended.stderr}")
        mark.touch()


def job_spec(directory: Path, workload: Searched) -> JobSpec:
    model = directory / "models" / workload.name.replace(" ", "-")
    model.mkdir(parents=True, exist_ok=True)
    config = json.dumps(workload.shape.config())
    (model / "config.json").write_text(config, encoding="utf-8")
    return JobSpec(
        model=str(model),
        input_path=directory / "prompts.jsonl",
        output_path=directory / "results.jsonl",
        device=workload.device,
        emulation=workload.emulation,
        given=workload.given,
        load_format="dummy",
        offload_dir=directory / "offload",
        progress=False,
    )


def take_profile(directory: Path, turns: Turns) -> None:
    """The full profile of this machine, kept beside the results, for all runs and predictions."""
    path = directory / "profile.yaml"
    if not path.exists():
        options = {"--device": "cpu", "--offload-dir": directory / "offload", "-o": path}
        words = [str(word) for option in options.items() for word in option]
        with turns:
            ended = run_flexpipe(["profile", "--refresh", *words])
        if ended.exit_code:
            raise SystemExit(ended.stderr)
    os.environ[PROFILE_VARIABLE] = str(path)


def _swept(path: Path) -> dict[str, list[float | None]]:
    """By workload: tokens/s of its policies, in the order in which they are drawn."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    return {
        one["workload"]: [row["measured_tokens_per_s"] for row in one["rows"]]
        for one in facts["workloads"]
    }


class Turns:
    """A file's lock, held while policies run, so that no other measurement that respects it does.

    Whoever waits for it gets it after some of them: waiting at every one would take hours.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("w")
        self._since: float | None = None

    def __enter__(self) -> None:
        if self._file is not None and self._since is None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self._since is not None and time.monotonic() - self._since > TURN_S:
            self.end()

    def end(self) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._since = None


# -- telling ---------------------------------------------------------------------------------------


def tables(all_measured: Sequence[Measured]) -> str:
    parts = [_summary(all_measured)]
    for one in all_measured:
        parts += [f"### {one.workload.name}", one.workload.told, _final(one), _naive(one)]
    return "\n\n".join(parts)


def finals(all_measured: Sequence[Measured]) -> str:
    parts = []
    for one in all_measured:
        reached = f"searched / best: {one.reached:.3f}"
        parts += [f"### {one.workload.name}", one.workload.told, _final(one), reached]
    return "\n\n".join(parts)


def _summary(all_measured: Iterable[Measured]) -> str:
    head = ("workload", "policies ran", "could not", "searched, tokens/s", "best, tokens/s",
            "searched / best", "rank correlation")  # fmt: skip
    lines = []
    for one in all_measured:
        medians = one.medians()
        ran = [row for row in one.drawn if row.measured is not None]
        lines.append(
            (
                one.workload.name,
                len(ran),
                len(one.drawn) - len(ran),
                f"{medians[one.searched.point.key]:.1f}",
                f"{max(medians.values()):.1f}",
                f"{one.reached:.3f}",
                f"{one.rank_correlation:.2f}",
            )
        )
    return markdown(head, lines)


def _final(one: Measured) -> str:
    lines = []
    for key, rate in one.medians().items():
        row = one.row(key)
        rates = [
            some.measured_tokens_per_s
            for some in (row for turn in one.rounds for row in turn)
            if some.point.key == key and some.measured_tokens_per_s is not None
        ]
        predicted = row.predicted_tokens_per_s
        lines.append(
            (
                one.name(row),
                f"{rate:.1f} ({min(rates):.1f}-{max(rates):.1f})",
                "" if predicted is None else f"{predicted:.1f}",
            )
        )
    return markdown(("the final: policy", "tokens/s", "predicted"), lines)


def _naive(one: Measured) -> str:
    lines = []
    for name, row in one.naive.items():
        measured, predicted = row.measured_tokens_per_s, row.predicted_tokens_per_s
        lines.append(
            (
                name,
                row.reason if measured is None else f"{measured:.1f}",
                "" if predicted is None else f"{predicted:.1f}",
            )
        )
    return markdown(("naive plan", "tokens/s", "predicted"), lines)


def to_dict(one: Measured) -> dict[str, Any]:
    """Plain values: every row of the sweep, every round of the final."""
    return {
        "workload": one.workload.name,
        "told": one.workload.told,
        "given": dict(one.workload.given),
        "reached": one.reached,
        "rank_correlation": one.rank_correlation,
        "medians": one.medians(),
        "rows": [{"name": one.name(row), **_plain(row)} for row in one.rows],
        "rounds": [[_plain(row) for row in some] for some in one.rounds],
    }


def _plain(row: Row) -> dict[str, Any]:
    measured: Mapping[str, Any] = row.measured or {}
    predicted: Mapping[str, Any] = row.predicted or {}
    return {
        "key": row.point.key,
        "settings": row.to_dict()["settings"],
        "measured_tokens_per_s": row.measured_tokens_per_s,
        "measured": measured.get("median"),
        "predicted_tokens_per_s": row.predicted_tokens_per_s,
        "policy": measured.get("policy") or predicted.get("policy"),
        "reason": row.reason,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="keeps profile, models and what was measured")
    parser.add_argument("--only", help="one workload")
    parser.add_argument("--finals-of", type=Path, help="what --json wrote of an earlier sweep")
    parser.add_argument("--lock", type=Path, help="a file that flock holds while a policy runs")
    parser.add_argument("--timeout", type=float, default=16.0, help="seconds, of one run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    turns = Turns(args.lock)
    take_profile(args.directory, turns)
    chosen = [one for one in WORKLOADS if args.only in (None, one.name)]
    swept = {} if args.finals_of is None else _swept(args.finals_of)
    done = [
        measure(args.directory, one, turns, args.timeout, swept.get(one.name)) for one in chosen
    ]
    turns.end()
    print(finals(done) if swept else tables(done))
    if args.json is not None:
        facts = {"machine": machine(), "workloads": [to_dict(one) for one in done]}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    missed = [one.workload.name for one in done if one.reached < AIM]
    if missed:
        print(f"the search missed its aim on: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
