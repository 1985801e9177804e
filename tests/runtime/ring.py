"""The ranks of a pipeline in one process: a thread each, messages over the edges of a ring, sums
over the shards of a stage.

Rank 0 forms the steps with the job's own batcher and tells them to the others, as the control
channel does. A send blocks until it is received, the strictest a transport may be.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexpipe.errors import RunError
from flexpipe.job.batcher import Admitted, Batcher, Entry, Finished
from flexpipe.job.params import SamplingParams
from flexpipe.memory.checkpoint import open_directory
from flexpipe.memory.disk import Stopped
from flexpipe.memory.form import FormCache
from flexpipe.memory.shards import shard_tensors
from flexpipe.model.config import Shard, shard_config
from flexpipe.model.families import read_config
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import model_tensors
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier
from flexpipe.runtime.device import Device, open_device
from flexpipe.runtime.dispatcher import Dispatcher
from flexpipe.runtime.executor import execute
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import OpHook, Stage
from flexpipe.runtime.stores import reserved_files
from flexpipe.schedule.step import MicroBatch, Row
from tests.runtime.jobs import FAST

PATIENCE_S = 60.0
ROOMY = Budgets(gpu=2**40, cpu=2**40, disk=2**40)
END_OF_STEP, END_OF_JOB = "step", "job"
GREEDY = SamplingParams(max_tokens=1)
Tokens = tuple[tuple[int, ...], ...]


class Edge:
    """From one rank to the next: one message at a time, handed over when both ends are there."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._offered: Tensor | None = None
        self._is_over = False

    def send(self, tensor: Tensor) -> None:
        with self._changed:
            self._wait(lambda: self._offered is None)
            self._offered = tensor
            self._changed.notify_all()
            self._wait(lambda: self._offered is not tensor)

    def receive(self, tensor: Tensor) -> None:
        with self._changed:
            self._wait(lambda: self._offered is not None)
            offered = self._offered
            assert offered is not None
            assert (offered.shape, offered.dtype) == (tensor.shape, tensor.dtype)
            tensor.copy_(offered)
            self._offered = None
            self._changed.notify_all()

    def abort(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        assert self._changed.wait_for(lambda: ready() or self._is_over, PATIENCE_S), "stuck"
        if not ready():
            raise Stopped("the ring was broken")


class Sum:
    """Adds up what the shards of a stage have, when all are there."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self._parts: list[Tensor | None] = [None] * size

    def all_reduce(self, index: int, tensor: Tensor) -> None:
        self._parts[index] = tensor.clone()
        self._meet()
        parts = [part for part in self._parts if part is not None]
        assert len({(part.shape, part.dtype) for part in parts}) == 1
        tensor.copy_(torch.stack(parts).sum(0))
        self._meet()

    def abort(self) -> None:
        self._barrier.abort()

    def _meet(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise Stopped("the stage was broken") from None


@dataclass(frozen=True)
class Neighbours:
    """A rank's two edges, and the stage it is a shard of."""

    before: Edge
    after: Edge
    sum: Sum
    shard: int

    def send(self, tensor: Tensor) -> None:
        self.after.send(tensor)

    def receive(self, tensor: Tensor) -> None:
        self.before.receive(tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        self.sum.all_reduce(self.shard, tensor)

    def abort(self) -> None:
        self.before.abort()
        self.after.abort()
        self.sum.abort()


class Told:
    """Steps as a rank hears of them from the first."""

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._news: deque[MicroBatch | str] = deque()
        self._is_over = False

    def tell(self, news: MicroBatch | str) -> None:
        self._news.append(news)
        self.wake()

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        return None if self._is_over else self._step()

    def _step(self) -> Iterator[MicroBatch | None]:
        while True:
            if not self._news:
                yield None
                continue
            news = self._news.popleft()
            if isinstance(news, MicroBatch):
                yield news
                continue
            self._is_over = news == END_OF_JOB
            return


@dataclass
class Ring:
    """One model and its prompts, to be run by any number of stages."""

    model: Path
    folder: Path
    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    params: SamplingParams = GREEDY
    _runs: int = field(default=0)

    def __post_init__(self) -> None:
        checkpoint = open_directory(self.model)
        self.config = read_config(checkpoint.config)
        self._stored = {
            spec.name: checkpoint.require(spec.name, spec.shape)
            for spec in model_tensors(self.config)
        }
        self._identity = checkpoint.identity()
        (self.folder / "cache").mkdir(parents=True, exist_ok=True)

    @property
    def entries(self) -> list[Entry]:
        pairs = zip(self.prompts, self.limits, strict=True)
        return [Entry(i, i, 0, len(prompt), limit) for i, (prompt, limit) in enumerate(pairs)]

    def plans(
        self,
        given: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        pipeline: Pipeline,
        tier: Tier,
        num_shards: int = 1,
    ) -> list[Plan]:
        """A plan per rank, those of a stage's shards in a row; `given` may differ from stage to
        stage."""
        each = [given] * pipeline.num_stages if isinstance(given, Mapping) else given
        return [
            self._plan(knobs, pipeline, rank, Shard(index, num_shards), tier)
            for rank, knobs in enumerate(each)
            for index in range(num_shards)
        ]

    def __call__(
        self,
        given: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        pipeline: Pipeline | None = None,
        *,
        num_shards: int = 1,
        device: str = "emulated",
        before_op: Callable[[int], OpHook] | None = None,
        poison: bool = True,
    ) -> Tokens:
        """The tokens of each prompt; raises what the first rank to fail raises."""
        pipeline = pipeline or Pipeline.whole(self.config.num_layers)
        tier = Tier.GPU if device == "emulated" else Tier.CPU
        self._runs += 1
        plans = self.plans(given, pipeline, tier, num_shards)
        run = _Run(self, plans, device, before_op, poison)
        return run(self.folder / f"run-{self._runs}")

    def admit(self, entry: Entry) -> Admitted:
        return Admitted(
            entry=entry,
            tokens=tuple(self.prompts[entry.index]),
            params=replace(self.params, max_tokens=entry.num_output),
            eos_token_ids=frozenset(self.config.eos_token_ids),
        )

    def _plan(
        self, given: Mapping[str, Any], pipeline: Pipeline, rank: int, shard: Shard, tier: Tier
    ) -> Plan:
        config = shard_config(self.config, shard)
        stored = shard_tensors(config, self._stored)
        planner = Planner(
            config,
            [entry.need for entry in self.entries],
            stored,
            ROOMY,
            device_tier=tier,
            compute_dtype="float32",
            form_of=FormCache(self.folder / "cache", stored, lambda: self._identity).locate,
            pipeline=pipeline,
            rank=rank,
        )
        return planner(Policy(**given))


class _Run:
    """All ranks of one run."""

    def __init__(
        self,
        ring: Ring,
        plans: Sequence[Plan],
        device: str,
        before_op: Callable[[int], OpHook] | None,
        poison: bool,
    ) -> None:
        self._ring = ring
        self._plans = plans
        self._device = device
        self._before_op = before_op
        self._poison = poison
        self._told = [Told() for _ in plans[1:]]
        self._num_shards = plans[0].config.shard.size
        self._edges = [Edge() for _ in plans]
        self._sums = [Sum(self._num_shards) for _ in plans[:: self._num_shards]]
        self._dispatchers: list[Dispatcher] = []
        self._failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._answers: dict[int, tuple[int, ...]] = {}
        self.batcher = Batcher(plans[0], ring.entries, ring.admit, self._finish)

    def __call__(self, folder: Path) -> Tokens:
        ready = threading.Barrier(len(self._plans), timeout=PATIENCE_S)
        with ThreadPoolExecutor(len(self._plans)) as threads:
            for rank in range(len(self._plans)):
                threads.submit(self._rank, rank, folder / str(rank), ready)
        if self._failures:
            raise self._failures[0]
        return tuple(self._answers[index] for index in range(len(self._ring.prompts)))

    def _rank(self, rank: int, folder: Path, ready: threading.Barrier) -> None:
        try:
            folder.mkdir(parents=True)
            self._execute(rank, folder, ready)
        except BaseException as error:
            self._fail(error)
            ready.abort()

    def _execute(self, rank: int, folder: Path, ready: threading.Barrier) -> None:
        plan, device = self._plans[rank], open_device(self._device, self._emulation)
        with ExitStack() as stack:
            stage = self._stage(rank, plan, device, folder, stack)
            stage.load(lambda num_bytes: None)
            ready.wait()
            steps = self._publish if rank == 0 else self._told[rank - 1].steps

            def start(dispatcher: Dispatcher) -> None:
                with self._lock:
                    self._dispatchers.append(dispatcher)
                    if rank:
                        self._told[rank - 1].wake = dispatcher.wake

            recorder = Recorder(keep_spans=False)
            execute(
                plan,
                device,
                stage,
                steps,
                recorder,
                on_start=start,
                on_failure=self._failures.append,
            )

    @property
    def _emulation(self) -> Any:
        return FAST if self._device == "emulated" else None

    def _stage(
        self, rank: int, plan: Plan, device: Device, folder: Path, stack: ExitStack
    ) -> Stage:
        stage = Stage(
            plan,
            device,
            files=stack.enter_context(reserved_files(plan, folder, device)),
            commit=self.batcher.commit if rank == 0 else None,
            transport=Neighbours(
                self._edges[rank - self._num_shards],
                self._edges[rank],
                self._sums[rank // self._num_shards],
                rank % self._num_shards,
            ),
            before_op=self._before_op(rank) if self._before_op else None,
            poison=self._poison,
        )
        stack.callback(stage.close)
        return stage

    def _publish(self, index: int) -> Iterator[MicroBatch | None] | None:
        batches = self.batcher.steps(index)
        if batches is None:
            self._tell(END_OF_JOB)
            return None
        return self._step(batches)

    def _step(self, batches: Iterator[MicroBatch | None]) -> Iterator[MicroBatch | None]:
        for batch in batches:
            if batch is not None:
                self._tell(batch)
            yield batch
        self._tell(END_OF_STEP)

    def _tell(self, news: MicroBatch | str) -> None:
        for plan, told in zip(self._plans[1:], self._told, strict=True):
            if isinstance(news, MicroBatch) and not plan.embeds:
                told.tell(MicroBatch(news.index, tuple(map(_counted, news.rows))))
            else:
                told.tell(news)

    def _finish(self, end: Finished) -> None:
        self._answers[end.request.entry.index] = end.tokens

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failures.append(error)
            for meeting in (*self._edges, *self._sums):
                meeting.abort()
            for dispatcher in self._dispatchers:
                dispatcher.abort(RunError("another stage failed"))


def _counted(row: Row) -> Row:
    """What the others learn of a row."""
    return replace(row, tokens=range(row.num_new))
