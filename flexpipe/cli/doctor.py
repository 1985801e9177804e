"""`flexpipe doctor`: what is here, what will not work, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import click

PROBLEMS = 1  # exit code: something that flexpipe needs does not work


@click.command()
@click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|emulated|cuda[:N]",
    help="The device to look at (default: an accelerator if there is one, else cpu).",
)
@click.option(
    "--offload-dir",
    type=click.Path(path_type=Path),
    default=Path("~/.cache/flexpipe"),
    show_default=True,
    help="The directory to look at; nothing is left in it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON line.")
def doctor(device: str, offload_dir: Path, as_json: bool) -> None:
    """Look at this installation and machine: each finding with what to do about it.

    A note is about speed or room; a problem, and exit code 1, about what does not work.
    """
    from flexpipe.doctor.examine import examine
    from flexpipe.doctor.finding import num_problems, render, to_dict

    findings = examine(device, offload_dir.expanduser())
    print(json.dumps(to_dict(findings)) if as_json else render(findings))
    if num_problems(findings):
        click.get_current_context().exit(PROBLEMS)
