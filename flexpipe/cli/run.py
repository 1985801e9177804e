"""`flexpipe run`: prompts from a file, results to a file, the report at the end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from flexpipe.cli.options import (
    machine_options,
    model_options,
    network_options,
    stage_policy_options,
)
from flexpipe.job.report import Report
from flexpipe.job.spec import DEFAULT_OFFLOAD_DIR, JobSpec
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.plan.arrangement import Arrangement
from flexpipe.runtime.launch import flexpipe_command, heed_launcher, launch
from flexpipe.runtime.ranks import Ranks

REQUESTS_FAILED = 6  # exit code: the run is complete, but some records hold an error

_FILE = click.Path(path_type=Path)


@click.command()
@model_options
@click.option(
    "-i",
    "--input-file",
    "input_path",
    type=_FILE,
    required=True,
    help="JSON lines with prompt, messages or prompt_token_ids, or one prompt a line; - is stdin.",
)
@click.option(
    "-o",
    "--output-file",
    "output_path",
    type=_FILE,
    required=True,
    help="One JSON line per request, in the order of finishing.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output file that is not empty.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=JobSpec.__dataclass_fields__["max_tokens"].default,
    show_default=True,
    help="Most tokens to generate, where the request does not say.",
)
@click.option(
    "--temperature", type=float, default=0.0, help="0 takes the likeliest token; above, samples."
)
@click.option("--top-p", type=float, default=1.0, help="Sample from this much of the probability.")
@click.option("--top-k", type=int, default=0, help="Sample from so many tokens; 0 means all.")
@click.option("--stop", multiple=True, help="Text that ends an answer; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first line that cannot be run.")
@machine_options
@network_options
@stage_policy_options
def run(as_json: bool, **options: Any) -> None:
    """Run a model over a file of prompts."""
    spec = JobSpec(**options)
    ranks = _rank(spec.arrangement) if spec.arrangement.num_ranks > 1 else None
    if ranks is None and spec.arrangement.num_ranks > 1:
        _start_ranks(spec)
    report = _run_alone(spec) if ranks is None else _run_shared(spec, ranks)
    if report is None:  # rank 0 tells
        return
    print(f"\n{report.render()}", file=sys.stderr)
    if as_json:
        print(json.dumps(report.to_dict()))
    is_restarted = ranks is not None and ranks.restarts  # for nothing: each line has its record
    if report.num_failed and not is_restarted:
        click.get_current_context().exit(REQUESTS_FAILED)


def _run_alone(spec: JobSpec) -> Report:
    from flexpipe.job.run import run_job  # imports torch, so only once the options are sound

    return run_job(spec)


def _run_shared(spec: JobSpec, ranks: Ranks) -> Report | None:
    from flexpipe.job.run import run_shared

    return run_shared(spec, ranks)


def _rank(arrangement: Arrangement) -> Ranks | None:
    """Which of the job's ranks this process is; None where it is to start them."""
    heed_launcher()
    # torch would tell of every wait in its store, each with seconds for a name server it misses
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return Ranks.from_environment(arrangement.num_stages, arrangement.num_shards)


def _start_ranks(spec: JobSpec) -> NoReturn:
    """All ranks on this host, by this same command line."""
    context = click.get_current_context()
    try:
        code = launch(
            flexpipe_command(context.find_root().obj),
            num_stages=spec.arrangement.num_stages,
            num_shards=spec.arrangement.num_shards,
            completed=(0, REQUESTS_FAILED),
        )
    except BaseException:
        with OffloadDirectory((spec.offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()):
            raise  # to open it was to clear what a killed rank left
    context.exit(code)
