"""Runs the ops of a plan on a device: stage, lanes, dispatcher, put together once per run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from flexpipe.plan.plan import Plan
from flexpipe.runtime.device import Device
from flexpipe.runtime.dispatcher import Dispatcher
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.build import Steps, schedule
from flexpipe.schedule.op import MESSAGE_LANES, Lane, Op

ChangeOps = Callable[[Iterable[Op | None]], Iterable[Op | None]]


def execute(
    plan: Plan,
    device: Device,
    stage: Stage,
    steps: Steps,
    recorder: Recorder,
    *,
    change_ops: ChangeOps | None = None,
    on_start: Callable[[Dispatcher], None] = lambda dispatcher: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> float:
    """Run a job's steps to the end; returns seconds.

    `on_start` is given the dispatcher, to wake when `steps` has news that no COMMIT brings, or to
    tell that the run must end. `on_failure` hears of an op's failure before other stages notice.
    `change_ops` lets tests alter the ops.
    """
    ops: Iterable[Op | None] = schedule(plan, steps)
    if change_ops is not None:
        ops = change_ops(ops)
    with single_threaded() as num_threads, torch.inference_mode():
        dispatcher = Dispatcher(
            device,
            stage.perform,
            recorder,
            describe=stage.describe,
            num_threads=num_threads,
            peer_lanes=_peer_lanes(plan),
            end_messages=stage.abort,
            on_failure=on_failure,
        )
        on_start(dispatcher)
        return dispatcher.run(iter(ops))


def _peer_lanes(plan: Plan) -> tuple[Lane, ...]:
    messages = MESSAGE_LANES if plan.pipeline.is_cut else ()
    return (*messages, Lane.REDUCE) if plan.config.is_split else messages


@contextmanager
def single_threaded() -> Iterator[int]:
    """Leave torch's intra-op threads to the compute lane; yields their number."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)
