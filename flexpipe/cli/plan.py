"""`flexpipe plan`: the best policy for a model, a workload and a machine, without running it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexpipe.cli.options import bytes_option, inquiry_options, stage_policy_options
from flexpipe.errors import InputError
from flexpipe.plan.policy_file import MadeFor, write_whole

if TYPE_CHECKING:
    from flexpipe.job.outlook import Inquiry
    from flexpipe.plan.arrangement import Arrangement


@click.command()
@inquiry_options
@click.option(
    "--max-latency",
    "max_latency_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Most seconds a request may take on average, from its first step to its last token.",
)
@bytes_option("--max-disk-writes", "Most bytes written to disk per 1,000 generated tokens.")
@click.option(
    "--compression/--no-compression",
    help="Let the search compress weights and KV cache, which is lossy (default: no).",
)
@click.option(
    "--fit-only",
    is_flag=True,
    help="Only say whether the model fits, where, and in how many pipeline stages; measures "
    "nothing.",
)
@click.option(
    "-o",
    "--output-file",
    "output_path",
    type=click.Path(path_type=Path),
    help="Write the policy as a file for --policy.",
)
@stage_policy_options
def plan(
    inquiry: Inquiry,
    max_latency_s: float | None,
    max_disk_writes: int | None,
    compression: bool,
    fit_only: bool,
    output_path: Path | None,
    as_json: bool,
    given: Mapping[str, Any],
    stage_given: Sequence[Mapping[str, Any]],
    arrangement: Arrangement,
    made_for: MadeFor | None,
) -> None:
    """Find the fastest policy for a model, a workload and a machine.

    Policy options fix single knobs; the search finds the rest. Prints what would rest where, the
    predicted throughput and what bounds it, and how other plans compare.
    """
    if fit_only:
        if output_path is not None or max_latency_s is not None or max_disk_writes is not None:
            raise InputError("--fit-only knows no rates: drop --output-file and the limits")
        from flexpipe.job.fitting import look

        fitting = look(inquiry, given, made_for, num_shards=arrangement.num_shards)
        print(json.dumps(fitting.to_dict()) if as_json else fitting.render())
        if not fitting.fits:
            click.get_current_context().exit(4)
        return
    from flexpipe.job.pipeline_proposal import PipelineProposal, propose_pipeline
    from flexpipe.job.proposal import Proposal, propose  # numpy and scipy are not needed for --help
    from flexpipe.policy.search import Limits

    limits = Limits(
        max_latency_s=max_latency_s, max_disk_writes=max_disk_writes, compression=compression
    )
    outlook = inquiry.outlook(given, made_for, num_shards=arrangement.num_shards)
    today = date.today().isoformat()
    found: Proposal | PipelineProposal
    if arrangement.num_stages > 1:
        found = propose_pipeline(outlook, stage_given, arrangement, limits, today)
    else:
        found = propose(outlook, given, limits, today)
    if output_path is not None:
        write_whole(output_path, found.policy_file())
        print(f"flexpipe: {output_path} holds the policy, for --policy", file=sys.stderr)
    print(json.dumps(found.to_dict()) if as_json else found.render())
