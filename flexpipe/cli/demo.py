"""`flexpipe demo`: the main job on the embedded model, and how often it is right."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexpipe.cli.options import machine_options, policy_options
from flexpipe.job.spec import JobSpec

if TYPE_CHECKING:
    from flexpipe.demo.tickets import Ticket
    from flexpipe.job.report import Report

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
MAX_TOKENS = 64  # an answer is shorter and ends itself
_NUM_SHOWN = 5


@click.command()
@click.option(
    "--num", type=click.IntRange(min=1), default=300, show_default=True, help="Number of tickets."
)
@click.option("--seed", type=int, default=0, help="Which tickets.")
@machine_options
@policy_options
def demo(num: int, seed: int, as_json: bool, **options: Any) -> None:
    """Read support tickets with the embedded model; no download, any machine.

    The tickets are ones that the model's training never saw. Prints some answers beside the wanted
    ones, the share that is right to the letter, and the report of the run.
    """
    from flexpipe.demo.tickets import tickets

    asked = list(tickets("held-out", num, seed))
    with tempfile.TemporaryDirectory(prefix="flexpipe-demo-") as directory:
        report, texts = _run(Path(directory), asked, options)
    right = sum(texts.get(ticket.id) == ticket.answer for ticket in asked)
    out = sys.stderr if as_json else sys.stdout
    print(f"\n{_samples(asked, texts)}\n", file=out)
    print(f"exact match: {right} of {num} ({right / num:.1%})\n\n{report.render()}", file=out)
    if as_json:
        scores = {"num_tickets": num, "num_right": right, "exact_match": right / num}
        print(json.dumps({**report.to_dict(), "demo": scores}))


def _run(
    directory: Path, asked: Sequence[Ticket], options: Mapping[str, Any]
) -> tuple[Report, dict[str, str]]:
    spec = JobSpec(
        model=str(MODEL),
        input_path=directory / "tickets.jsonl",
        output_path=directory / "answers.jsonl",
        max_tokens=MAX_TOKENS,
        **options,
    )
    lines = (json.dumps({"id": ticket.id, "prompt": ticket.prompt}) for ticket in asked)
    spec.input_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    from flexpipe.job.run import run_job  # imports torch, so only once the options are sound

    report = run_job(spec)
    with spec.output_path.open(encoding="utf-8") as file:
        results = [json.loads(line) for line in file]
    return report, {result["id"]: result["text"].strip() for result in results}


def _samples(asked: Sequence[Ticket], texts: Mapping[str, str]) -> str:
    return "\n\n".join(
        f"{ticket.prompt}\n  got    {texts.get(ticket.id, 'nothing')}\n  wanted {ticket.answer}"
        for ticket in asked[:_NUM_SHOWN]
    )
