"""`flexpipe bench`: how fast a model runs here, on prompts anyone can make again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flexpipe.cli.options import Command, machine_options, model_options, policy_options
from flexpipe.job.bench import FORMATS, Format, Workload, block_rows, measure
from flexpipe.job.spec import JobSpec

_DEFAULTS = {name: item.default for name, item in Workload.__dataclass_fields__.items()}


def _count(field: str, help: str, least: int = 1) -> Callable[[Command], Command]:
    return click.option(
        f"--{field.replace('_', '-')}",
        type=click.IntRange(min=least),
        default=_DEFAULTS[field],
        show_default=True,
        help=help,
    )


@click.command()
@model_options
@_count("prompt_len", "Tokens of each prompt.")
@_count("gen_len", "Tokens to generate for each prompt; end tokens are ignored.")
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    help="Number of prompts (default: one block, --gpu-batch-size times --num-gpu-batches).",
)
@_count("warmup", "Runs before the first that counts.", least=0)
@_count("repetitions", "Runs that count.")
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
