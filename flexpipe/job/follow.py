"""A rank of a job that is not the first: it brings what it has, follows orders, computes its stage.

It reads no input and writes no result; what fails here ends the job on every rank.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from flexpipe.job.compute import compute
from flexpipe.job.crew import Crew
from flexpipe.job.prepare import Model
from flexpipe.job.probes import Probes
from flexpipe.job.spec import DEFAULT_OFFLOAD_DIR, JobSpec
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.plan.plan import check_fits
from flexpipe.runtime.gang import Gang


def follow_job(spec: JobSpec, gang: Gang, probes: Probes | None = None) -> None:
    """This rank's part of the job, until it is done."""
    with ExitStack() as stack:
        offload_dir = (spec.offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()
        offload = stack.enter_context(OffloadDirectory(offload_dir))
        gang.watch.clean_up(offload.close)
        model = Model.open(spec, offload, needs_text=False).of_shard(gang.shard)
        crew = stack.enter_context(Crew(gang, spec, model, offload))
        orders = crew.take()
        if orders is None:
            return
        model = replace(model, compute_dtype=orders.compute_dtype)
        planner = model.planners(offload, orders.needs, never_stops=spec.ignore_eos)
        stage = gang.ranks.stage
        plan = planner(orders.pipeline, stage, crew.here.budgets)(orders.policies[stage])
        check_fits(plan, "Its memory was taken by another program meanwhile.")
        crew.introduce(plan, model.device)
        traced = spec.trace_path is not None
        with crew.following(plan, model.device) as (work, events):
            ran = compute(work, offload, events, probes or Probes(), keep_spans=traced)
        crew.stages(ran)
        crew.trace(ran, spec.trace_path)
