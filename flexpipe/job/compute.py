"""A stage's part of a job: its pools taken, its weights loaded, the steps run to their end.

The only stage of a job and each stage of a pipeline go this way; who forms the steps, and where
tokens go, is the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import psutil

from flexpipe.job.measure import Measured, Ran
from flexpipe.job.probes import Probes
from flexpipe.memory.disk import physical_bytes_read
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.plan.hardware import reset_peak_rss
from flexpipe.plan.plan import Plan
from flexpipe.runtime.device import Device
from flexpipe.runtime.dispatcher import Dispatcher
from flexpipe.runtime.executor import execute
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import Commit, Stage
from flexpipe.runtime.stores import reserved_files
from flexpipe.runtime.transport import Transport
from flexpipe.schedule.build import Steps


@dataclass(frozen=True, kw_only=True)
class Work:
    """The plan of one stage, and what it is carried out with.

    `steps` may have None for what is not known yet, as `schedule` takes it. `commit` is called for
    each micro-batch that came back, on the first stage; `transport` reaches the other stages.
    """

    plan: Plan
    device: Device
    steps: Steps
    commit: Commit | None = None
    transport: Transport | None = None


@dataclass(frozen=True, kw_only=True)
class Events:
    """Who is told how far a stage is: the name of a phase, that its weights are loaded, the
    dispatcher at the start, and of a failure before other stages notice."""

    phase: Callable[[str], None] = lambda name: None
    loaded: Callable[[], None] = lambda: None
    started: Callable[[Dispatcher], None] = lambda dispatcher: None
    failed: Callable[[BaseException], None] = lambda error: None


def compute(
    work: Work, offload: OffloadDirectory, events: Events, probes: Probes, *, keep_spans: bool
) -> Ran:
    """Take the pools, load, run the steps to the end; `keep_spans` for a trace."""
    plan, device = work.plan, work.device
    recorder = Recorder(keep_spans=keep_spans or probes.keep_spans)
    if probes.on_recorder is not None:
        probes.on_recorder(recorder)
    with ExitStack() as stack:
        files = stack.enter_context(reserved_files(plan, offload.job, device))
        reset_peak_rss()
        start = time.perf_counter()
        events.phase("loading")
        stage = Stage(
            plan,
            device,
            files=files,
            commit=work.commit,
            transport=work.transport,
            before_op=probes.before_op,
            poison=probes.poison,
        )
        stack.callback(stage.close)
        stage.load(lambda num_bytes: None)
        load_s = time.perf_counter() - start
        if probes.on_stage is not None:
            probes.on_stage(stage)
        events.loaded()
        read_before, cpu_before = physical_bytes_read(), _cpu_s()
        began = time.perf_counter()
        events.phase("running")
        execute(
            plan,
            device,
            stage,
            work.steps,
            recorder,
            change_ops=probes.change_ops,
            on_start=events.started,
            on_failure=events.failed,
        )
        run_s = time.perf_counter() - began
        read_after = physical_bytes_read()
        disk_bytes = sum(file.allocated_bytes for file in files.values())
        disk_bytes += stage.stores.weights.form_bytes
    known = read_before is not None and read_after is not None
    measured = Measured(
        load_s=load_s,
        began=began,
        run_s=run_s,
        cpu_s=_cpu_s() - cpu_before,
        physical_read_bytes=(read_after or 0) - (read_before or 0) if known else None,
        disk_bytes=disk_bytes,
    )
    return Ran(stage=stage, device=device, recorder=recorder, measured=measured)


def _cpu_s() -> float:
    """What all threads of this process have computed."""
    times = psutil.Process().cpu_times()
    seconds: float = times.user + times.system
    return seconds
