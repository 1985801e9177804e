"""What tests and benchmarks put into a run: hooks that observe, delay, fail or spoil it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexpipe.job.batcher import Admitted
from flexpipe.job.journal import SystemCalls
from flexpipe.runtime.executor import ChangeOps
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import OpHook, Stage


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Hooks; none of them does anything by default."""

    before_op: OpHook | None = None
    change_ops: ChangeOps | None = None
    poison: bool = False
    keep_spans: bool = False
    on_stage: Callable[[Stage], None] | None = None
    on_recorder: Callable[[Recorder], None] | None = None
    journal_calls: SystemCalls | None = None
    on_admit: Callable[[Admitted], Admitted] = lambda request: request
