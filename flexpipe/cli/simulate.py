"""`flexpipe simulate`: the timeline of a plan that nobody runs, here or on a machine on paper."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexpipe.cli.options import inquiry_options, stage_policy_options
from flexpipe.errors import InputError
from flexpipe.job.spec import TRACE_SUFFIXES

if TYPE_CHECKING:
    from flexpipe.job.outlook import Inquiry
    from flexpipe.plan.arrangement import Arrangement
    from flexpipe.plan.policy_file import MadeFor


@click.command()
@inquiry_options
@click.option(
    "-o",
    "--output-file",
    "output_path",
    type=click.Path(path_type=Path),
    metavar="|".join(f"FILE{suffix}" for suffix in TRACE_SUFFIXES),
    help="Draw what would run when, in the form of `flexpipe run --trace`.",
)
@click.option(
    "--steps",
    "num_steps",
    type=click.IntRange(min=1),
    help="Steps to draw, from the first on (default: until there are some 5,000 ops; more are hard "
    "to read).",
)
@stage_policy_options
def simulate(
    inquiry: Inquiry,
    output_path: Path | None,
    num_steps: int | None,
    as_json: bool,
    given: Mapping[str, Any],
    stage_given: Sequence[Mapping[str, Any]],
    arrangement: Arrangement,
    made_for: MadeFor | None,
) -> None:
    """Play a plan without running it: its times, its bytes, its timeline.

    Without policy options it is the plan that `flexpipe run` would choose. All figures are of the
    whole job, only the picture ends after the first steps.
    """
    if output_path is not None and output_path.suffix not in TRACE_SUFFIXES:
        raise InputError(f"--output-file {output_path} must end in {', '.join(TRACE_SUFFIXES)}")
    from flexpipe.job.timeline import play  # numpy is not needed for --help

    draws = output_path is not None
    outlook = inquiry.outlook(given, made_for, num_shards=arrangement.num_shards)
    made = play(outlook, stage_given, arrangement, draws=draws, num_steps=num_steps)
    if output_path is not None:
        made.draw(output_path)
        drawn = f"the first {made.num_drawn_steps} of {made.prediction.num_steps} steps"
        print(f"flexpipe: {output_path} shows {drawn}", file=sys.stderr)
    print(json.dumps(made.to_dict()) if as_json else made.render())
