"""`flexpipe bench`: how fast a model runs here, on prompts anyone can make again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from flexpipe.cli.options import (
    machine_options,
    model_options,
    policy_options,
    workload_options,
)
from flexpipe.job.bench import FORMATS, Format, Workload, block_rows, measure
from flexpipe.job.spec import JobSpec


@click.command()
@model_options
@workload_options
@click.option(
    "--format",
    "format",
    type=click.Choice(FORMATS),
    help="How to print the figures (default md; --json is the same as --format json).",
)
@machine_options
@policy_options
def bench(
    num_prompts: int | None,
    prompt_len: int,
    gen_len: int,
    warmup: int,
    repetitions: int,
    format: Format | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure throughput on random prompts: a warm-up, repetitions, median and spread.

    Figures go to stdout. End tokens (EOS) are ignored, so every prompt gets all its tokens. A trace
    shows the last repetition.
    """
    if as_json and format not in (None, "json"):
        raise click.UsageError(f"--json asks for JSON and --format for {format}; drop one of them")
    workload = Workload(
        num_prompts=num_prompts or block_rows(options["given"]),
        prompt_len=prompt_len,
        gen_len=gen_len,
        warmup=warmup,
        repetitions=repetitions,
    )
    with tempfile.TemporaryDirectory(prefix="flexpipe-bench-") as directory:
        spec = JobSpec(
            input_path=Path(directory) / "prompts.jsonl",
            output_path=Path(directory) / "results.jsonl",
            **options,
        )
        report = measure(spec, workload)
    print(report.render("json" if as_json else format or "md"))
