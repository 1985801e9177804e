"""What each op does: the one place where a schedule meets tensors.

A stage holds the pools of a plan and performs ops on them, whatever lane calls; how is told in the
modules for moves, computing and messages. It decides no order: that an op finds its inputs ready is
the schedule's promise.

Shapes: R sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpipe.memory.disk import DiskFile
from flexpipe.plan.plan import Plan
from flexpipe.runtime.compute import Compute
from flexpipe.runtime.device import Device
from flexpipe.runtime.kernels import compile_kernels
from flexpipe.runtime.layout import Layouts, rows_of
from flexpipe.runtime.messages import Messages
from flexpipe.runtime.moves import Moves
from flexpipe.runtime.poison import poison_ahead, poison_all
from flexpipe.runtime.ranks import place_name
from flexpipe.runtime.stores import Stores
from flexpipe.runtime.transport import Transport
from flexpipe.schedule.op import Kind, Lane, Op
from flexpipe.schedule.step import MicroBatch, Row

Work = Callable[[Op], None]
OpHook = Callable[[Op], None]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A row's next token; without meaning where its logits were not finite."""

    row: Row
    token: int
    is_finite: bool


Commit = Callable[[MicroBatch, Sequence[SampledToken]], None]


class Stage:
    """The tensors of one stage, and the ops' work on them."""

    def __init__(
        self,
        plan: Plan,
        device: Device,
        *,
        files: Mapping[str, DiskFile],
        commit: Commit | None,
        transport: Transport | None = None,
        before_op: OpHook | None = None,
        poison: bool = False,
    ) -> None:
        """Take every pool; `files` are those of `reserved_files`. Only the first stage of a
        pipeline commits; `transport` reaches the others. `before_op` and `poison` are for tests: a
        hook called first in every op, and slots that hold rubbish until they are filled."""
        self.plan = plan
        self._device = device
        self._commit_rows = commit
        self._transport = transport
        self._before_op = before_op
        self._poison = poison
        self.stores = Stores(plan, device, files)
        self._layouts = Layouts(plan, device, self.stores.kv_cache)
        if poison:
            poison_all(self.stores)
        self._work: dict[Kind, Work] = {
            **self._moves(),
            **self._arithmetic(),
            **self._messages(),
            Kind.COMMIT: self._commit,
            Kind.BARRIER: lambda op: None,
        }

    def load(self, progress: Callable[[int], None]) -> None:
        """Bring the weights home; `progress` is told the bytes read. Kernels are compiled beside.

        In threads of their own: the team that torch gives one for converting ends with it, and the
        compute lane's stays the only one.
        """

        def load() -> None:
            with torch.inference_mode():
                self.stores.weights.load(progress, self._device.stop)

        with ThreadPoolExecutor(2, "flexpipe-load") as threads:
            loaded = threads.submit(load)
            compiled = threads.submit(compile_kernels, self.plan, self._device.torch_device)
            try:
                loaded.result()
                compiled.result()
            except BaseException:
                self._device.stop.set()
                raise

    def perform(self, op: Op) -> None:
        """Do what `op` says, in the calling thread or on the current stream."""
        if self._poison:
            poison_ahead(self.stores, op, has_streams=self._device.has_streams)
        if self._before_op is not None:
            self._before_op(op)
        self._work[op.kind](op)

    def describe(self, op: Op) -> str:
        """An op for messages, its layer by name, and the stage where there are several ranks."""
        mb = "" if op.batch is None else f", micro-batch {op.batch.index}"
        whole = f"{op.kind.value} {self._object(op)} (step {op.step}{mb})"
        alone = not (self.plan.pipeline.is_cut or self.plan.config.is_split)
        return whole if alone else f"{_where(self.plan)}: {whole}"

    def logits(self, op: Op) -> tuple[Sequence[Row], Tensor]:
        """The rows that a SAMPLE op samples and their logits, [R, V]; for whoever watches a run."""
        layout = self._layouts.of(rows_of(op))
        return layout.sampled, self.stores.buffers.logits(layout.source.index, len(layout.sampled))

    def abort(self) -> None:
        """End the messages that other threads wait in; they raise."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        self.stores.close()

    def _object(self, op: Op) -> str:
        """What an op is about, behind its kind."""
        layer = self.plan.layers[op.layer]
        rank, num_stages = self.plan.rank, self.plan.pipeline.num_stages
        match op.lane:
            case Lane.SEND:
                return f"to stage {(rank + 1) % num_stages}"
            case Lane.RECEIVE:
                return f"from stage {(rank - 1) % num_stages}"
            case Lane.REDUCE:
                return f"over the shards of {layer.name}"
        return f"of {layer.name}"

    # who does what

    def _moves(self) -> dict[Kind, Work]:
        moves = Moves(self.plan, self._device, self.stores, self._layouts)
        return {
            Kind.READ_WEIGHT: moves.read_weight,
            Kind.LOAD_WEIGHT: moves.load_weight,
            Kind.READ_EMBED: moves.read_embed,
            Kind.LOAD_EMBED: moves.load_embed,
            Kind.READ_CACHE: moves.read_cache,
            Kind.LOAD_CACHE: moves.load_cache,
            Kind.STORE_CACHE: moves.store_cache,
            Kind.WRITE_CACHE: moves.write_cache,
            Kind.READ_HIDDEN: moves.read_hidden,
            Kind.LOAD_HIDDEN: moves.load_hidden,
            Kind.STORE_HIDDEN: moves.store_hidden,
            Kind.WRITE_HIDDEN: moves.write_hidden,
            Kind.MOVE_QUERY: moves.move_query,
            Kind.MOVE_OUTPUT: moves.move_output,
            Kind.FETCH_TOKENS: moves.fetch_tokens,
        }

    def _arithmetic(self) -> dict[Kind, Work]:
        compute = Compute(self.plan, self._device, self.stores, self._layouts)
        return {
            Kind.COMPUTE: compute.compute,
            Kind.ATTEND_CPU: compute.attend_cpu,
            Kind.SAMPLE: compute.sample,
        }

    def _messages(self) -> dict[Kind, Work]:
        if self._transport is None:
            return {}
        messages = Messages(self.plan, self._device, self._transport, self.stores, self._layouts)
        return {
            Kind.RECEIVE_HIDDEN: messages.receive_hidden,
            Kind.SEND_HIDDEN: messages.send_hidden,
            Kind.RECEIVE_TOKENS: messages.receive_tokens,
            Kind.SEND_TOKENS: messages.send_tokens,
            Kind.ALL_REDUCE: messages.all_reduce,
        }

    def _commit(self, op: Op) -> None:
        layout = self._layouts.of(rows_of(op))
        tokens_R, finite_R = self.stores.buffers.fetched[layout.source.index]
        count = len(layout.sampled)
        sampled = [
            SampledToken(row, token, finite)
            for row, token, finite in zip(
                layout.sampled, tokens_R[:count].tolist(), finite_R[:count].tolist(), strict=True
            )
        ]
        assert self._commit_rows is not None
        self._commit_rows(layout.source, sampled)


def _where(plan: Plan) -> str:
    """Which rank computes a plan, as its gang calls it too."""
    shard = plan.config.shard
    rank = plan.rank * shard.size + shard.index
    return place_name(rank, shard.size, plan.pipeline.chunks(plan.rank))
