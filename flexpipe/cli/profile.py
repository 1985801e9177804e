"""`flexpipe profile`: what this machine can do, measured once and kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click
import yaml

from flexpipe.errors import InputError
from flexpipe.job.spec import DEFAULT_OFFLOAD_DIR

log = logging.getLogger("flexpipe")


@click.command()
@click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|cuda[:N]",
    help="Which device (default: an accelerator if there is one, else cpu).",
)
@click.option(
    "--offload-dir",
    type=click.Path(path_type=Path),
    help="Directory on the disk to measure (default: where runs offload to).",
)
@click.option("--refresh", is_flag=True, help="Measure again even if a profile is kept.")
@click.option("--quick", is_flag=True, help="Under 20 seconds instead of up to 2 minutes.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    help="Measure again, every rate so often instead of 3 times: more, some 30 s each, for a "
    "machine whose pace changes from minute to minute.",
)
@click.option(
    "-o",
    "--output-file",
    "output_path",
    type=click.Path(path_type=Path),
    help="Write the profile here too, as YAML with comments.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the profile as one JSON line.")
def profile(
    device: str,
    offload_dir: Path | None,
    refresh: bool,
    quick: bool,
    rounds: int | None,
    output_path: Path | None,
    as_json: bool,
) -> None:
    """Measure this machine, or show what was measured: links, disk, products, attention.

    Runs and plans read the profile; without one they take a quick one by themselves.
    """
    if output_path is not None and not output_path.absolute().parent.is_dir():
        raise InputError(f"--output-file {output_path}: there is no directory of that name")
    from flexpipe.policy.profile import render_profile
    from flexpipe.policy.profile_table import profile_table

    # imports torch, so only once all is sound
    from flexpipe.profiling.cache import machine_profile, profile_path, write_profile

    directory = (offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()
    found = machine_profile(
        device,
        directory,
        refresh=refresh or rounds is not None,
        quick=quick,
        rounds=rounds,
        progress=lambda what: log.info("measuring %s", what),
    )
    if output_path is not None:
        write_profile(output_path, found)
    if as_json:
        print(json.dumps(yaml.safe_load(render_profile(found))))
    else:
        print(profile_table(found))
    log.info("the profile of %s is in %s", found.date, profile_path(device, directory))
