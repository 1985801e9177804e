"""`flexpipe sweep`: many policies, each predicted, measured in a process of its own, or both."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from flexpipe.cli.options import (
    device_options,
    model_options,
    policy_options,
    workload_options,
)
from flexpipe.errors import InputError
from flexpipe.job.bench import FORMATS, Format
from flexpipe.job.spec import JobSpec
from flexpipe.sweep.grid import Grid, parse_vary, read_grid
from flexpipe.sweep.ledger import Ledger, read_ledger
from flexpipe.sweep.pareto import SUFFIXES, check_plot, draw_pareto
from flexpipe.sweep.point import Point, make_points
from flexpipe.sweep.ranking import Row, best_first, render
from flexpipe.sweep.run import BenchCommand, Forecast, is_finished, run_sweep

_FILE = click.Path(path_type=Path)
_UNUSED = (Path("prompts.jsonl"), Path("results.jsonl"))  # each bench has its own

_HELP = """Compare policies and workloads: every combination of the values given.

A point that cannot run is a row with its reason. What is finished is kept in --output-file, so
a sweep that was stopped or killed goes on when the same command is given again.

\b
NAME is an option below without its dashes or a policy file's field:
  --vary gpu-batch-size=8,16,32    the values of a list
  --vary num_micro_batches=1:8     a range, both ends within
  --vary num_micro_batches=1:8:2   the same in steps of 2: 1, 3, 5, 7
  --vary gen_len=32:256:*2         in steps that double: 32, 64, 128, 256
  --vary cpu_mem=2GiB,4GiB,none    sizes; none takes what is free
  --vary pin_weights=true,false    switches
  --vary prompt_len=128,256:512:64 also gen_len, num_prompts; ranges in lists
\b
Shares of weights, kv_cache and hidden:
  --vary weights.gpu=0:1:0.25      one tier's; the rest is on the next
                                   slower tier (of disk: on cpu)
  --vary kv_cache=gpu:0.5/cpu:0.5,cpu:1
                                   a list of whole shares
  --vary percent=100/0/100/0/100/0,50/50/0/100/0/100
                                   all three as --percent has them
\b
A --grid file has the same names and values, and points of their own:
  micro_batch_size: [16, 32]
  weights.gpu: 0:1:0.25
  points:
    - {micro_batch_size: 8, strategy: none, weights: {cpu: 1}}

Options fix what is not varied, as they do for bench.
"""


@click.command(help=_HELP)
@model_options
@click.option(
    "--vary",
    metavar="NAME=VALUES",
    multiple=True,
    help="Values of one name, see above; may be given several times.",
)
@click.option("--grid", type=_FILE, metavar="FILE.yaml", help="More names and points, see above.")
@workload_options
@click.option(
    "-o",
    "--output-file",
    "output_path",
    type=_FILE,
    help="Keeps every finished point, a JSON line each; run again, the sweep goes on from there.",
)
@click.option("--predict", "predicts", is_flag=True, help="Predict the points, and run none.")
@click.option("--measure", "measures", is_flag=True, help="With --predict: run the points too.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give a point up after so long (default: never).",
)
@click.option("--retry", is_flag=True, help="Try the points again that failed.")
@click.option("--dry-run", is_flag=True, help="List the points and what is left to do; run none.")
@click.option(
    "--format",
    "format",
    type=click.Choice(FORMATS),
    default="md",
    show_default=True,
    help="How to print the rows, best first.",
)
@click.option(
    "--plot",
    "plot_path",
    type=_FILE,
    metavar="|".join(f"FILE{suffix}" for suffix in SUFFIXES),
    help="Draw latency over throughput, with the points that nothing beats at both.",
)
@device_options
@policy_options
def sweep(
    vary: Sequence[str],
    grid: Path | None,
    num_prompts: int | None,
    output_path: Path | None,
    predicts: bool,
    measures: bool,
    timeout_s: float | None,
    retry: bool,
    dry_run: bool,
    format: Format,
    plot_path: Path | None,
    **options: Any,
) -> None:
    """Make the points, do what is left of them, and print the rows."""
    measures = measures or not predicts
    if plot_path is not None:
        check_plot(plot_path)
    spec = JobSpec(input_path=_UNUSED[0], output_path=_UNUSED[1], **_job_options(options))
    points = make_points(_grid(vary, grid).points(), spec, _load(num_prompts, options))
    if dry_run:
        _list(points, output_path, measures, retry)
        return
    with _ledger(output_path, measures) as ledger:
        rows = run_sweep(
            points,
            ledger,
            forecast=_forecast(spec) if predicts else None,
            measure=BenchCommand(spec=spec, timeout_s=timeout_s) if measures else None,
            retry=retry,
        )
    rows = best_first(rows)
    if plot_path is not None:
        draw_pareto(plot_path, rows, spec.model)
    print(render(rows, format))


def _load(num_prompts: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """What each point runs, where it does not say otherwise."""
    load = {name: options[name] for name in ("prompt_len", "gen_len", "warmup", "repetitions")}
    return load if num_prompts is None else {**load, "num_prompts": num_prompts}


def _job_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in JobSpec.__dataclass_fields__}


def _grid(vary: Sequence[str], path: Path | None) -> Grid:
    """What the options vary goes before what the file says."""
    grid = Grid() if path is None else read_grid(path)
    grid = grid.updated(parse_vary(vary))
    if not grid.num_points:
        raise InputError("nothing is varied; give --vary NAME=VALUES, or a --grid with points")
    return grid


def _forecast(spec: JobSpec) -> Forecast:
    from flexpipe.sweep.forecast import forecaster

    forecast: Forecast = forecaster(spec)
    return forecast


@contextlib.contextmanager
def _ledger(path: Path | None, measures: bool) -> Iterator[Ledger]:
    """Predictions alone are quickly made again and need no file."""
    if path is None and measures:
        raise InputError("what is measured must be kept somewhere; give -o FILE.jsonl")
    with (
        tempfile.TemporaryDirectory(prefix="flexpipe-sweep-") as directory,
        Ledger(path or Path(directory) / "rows.jsonl") as ledger,
    ):
        yield ledger


def _list(points: Sequence[Point], path: Path | None, measures: bool, retry: bool) -> None:
    lines = {} if path is None else read_ledger(path)[0]
    todo = "to measure" if measures else "to predict"
    for number, point in enumerate(points, 1):
        row = Row.of(point, lines.get(point.key, {}))
        finished = is_finished(row, measured=measures, retry=retry)
        print(f"{number:>4}  {point.name}: {_state(row) if finished else todo}")


def _state(row: Row) -> str:
    if row.point.refusal is not None:
        return f"cannot be: {row.reason}"
    return "finished" if row.reason is None else f"failed: {row.reason}"
