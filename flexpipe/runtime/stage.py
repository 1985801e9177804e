"""What each op does: the one place where a schedule meets tensors.

A stage holds the pools of a plan and performs ops on them, whatever lane calls. It decides no
order: that an op finds its inputs ready is the schedule's promise.

Shapes: T new tokens, E embedding width, H hidden size, R sampled rows, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from flexpipe.memory.disk import DiskCounter, DiskFile, DiskReader
from flexpipe.memory.hidden import HiddenStore
from flexpipe.memory.kv_cache import KvCache, RowRun, Where
from flexpipe.memory.link import wait_until
from flexpipe.memory.queries import QueryStore
from flexpipe.memory.tier import POISON, TierMemory, torch_dtype, typed
from flexpipe.memory.weights import LayerParts, WeightStore
from flexpipe.model import segments
from flexpipe.model.batch import Batch, RopeTable, RowSpan
from flexpipe.model.matmul import CompressedWeight
from flexpipe.model.sampling import choose
from flexpipe.model.workspace import Workspace
from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.plan import Plan, PoolPlan
from flexpipe.plan.tier import Tier
from flexpipe.runtime.device import Device
from flexpipe.runtime.ranks import place_name
from flexpipe.runtime.transport import Transport
from flexpipe.schedule.flops import compute_flops, num_attended_by
from flexpipe.schedule.op import Kind, Lane, Op, Segment
from flexpipe.schedule.step import MicroBatch, Row

_APART = (Segment.QKV, Segment.ATTEND, Segment.OUT, Segment.PROJECT)  # with attention on the CPU
_LEAVES_PARTIAL = (Segment.ATTENTION, Segment.PROJECT, Segment.MLP)

OpHook = Callable[[Op], None]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A row's next token; without meaning where its logits were not finite."""

    row: Row
    token: int
    is_finite: bool


Commit = Callable[[MicroBatch, Sequence[SampledToken]], None]


@dataclass(slots=True)
class _Layout:
    """A micro-batch of one step as compute sees it; the batch itself is made by its first
    COMPUTE."""

    source: MicroBatch
    runs: tuple[RowRun, ...]
    ids_T: Tensor  # of rows of the embedding here
    absent_T: Tensor | None  # tokens whose row another shard has
    sampled: tuple[Row, ...]
    batch: Batch | None = None
    cpu_batch: Batch | None = None  # of the rows that attend on the CPU
    tokens: tuple[Tensor, Tensor] | None = None

    @property
    def cpu_runs(self) -> tuple[RowRun, ...]:
        """They are the last ones."""
        return tuple(run for run in self.runs if run.where == Where.CPU)

    @property
    def num_cpu_rows(self) -> int:
        """Rows that attend on the CPU; each has one new token, behind all others."""
        return sum(len(run.rows) for run in self.cpu_runs)


class Stage:
    """The tensors of one stage, and the ops' work on them."""

    def __init__(
        self,
        plan: Plan,
        device: Device,
        *,
        kv_file: DiskFile | None,
        hidden_file: DiskFile | None,
        commit: Commit | None,
        transport: Transport | None = None,
        before_op: OpHook | None = None,
        poison: bool = False,
    ) -> None:
        """Take every pool. Only the first stage of a pipeline commits; `transport` reaches the
        others. `before_op` and `poison` are for tests: a hook called first in every op, and slots
        that hold rubbish until they are filled."""
        self.plan = plan
        self._device = device
        self._commit_rows = commit
        self._transport = transport
        self._before_op = before_op
        self._poison = poison
        self.memory = TierMemory(device.torch_device, pin=plan.policy.pin_weights)
        self._reader = DiskReader(counter=DiskCounter(), stop=device.stop)
        self.weights = WeightStore(plan, self.memory, self._reader)
        self.kv_cache = KvCache(plan, self.memory, kv_file)
        self._hidden = HiddenStore(plan, self.memory, hidden_file)
        self._queries = QueryStore(plan, self.memory)
        self._dtype = torch_dtype(plan.compute_dtype)
        self._take_compute_pools()
        config = plan.config
        self._rope = (
            RopeTable.build(config.rope, config.head_dim, device.torch_device)
            if config.rope
            else None
        )
        if poison:
            self._spoil_all()
        self._layouts: dict[int, _Layout] = {}
        self._lock = threading.Lock()
        self._work: dict[Kind, Callable[[Op], None]] = {
            Kind.READ_WEIGHT: self._read_weight,
            Kind.LOAD_WEIGHT: self._load_weight,
            Kind.READ_EMBED: self._read_embed,
            Kind.LOAD_EMBED: self._load_embed,
            Kind.READ_CACHE: self._read_cache,
            Kind.LOAD_CACHE: self._load_cache,
            Kind.STORE_CACHE: self._store_cache,
            Kind.WRITE_CACHE: self._write_cache,
            Kind.READ_HIDDEN: self._read_hidden,
            Kind.LOAD_HIDDEN: self._load_hidden,
            Kind.STORE_HIDDEN: self._store_hidden,
            Kind.WRITE_HIDDEN: self._write_hidden,
            Kind.MOVE_QUERY: self._move_query,
            Kind.ATTEND_CPU: self._attend_cpu,
            Kind.MOVE_OUTPUT: self._move_output,
            Kind.COMPUTE: self._compute,
            Kind.SAMPLE: self._sample,
            Kind.FETCH_TOKENS: self._fetch_tokens,
            Kind.RECEIVE_HIDDEN: self._receive_hidden,
            Kind.SEND_HIDDEN: self._send_hidden,
            Kind.RECEIVE_TOKENS: self._receive_tokens,
            Kind.SEND_TOKENS: self._send_tokens,
            Kind.ALL_REDUCE: self._all_reduce,
            Kind.COMMIT: self._commit,
            Kind.BARRIER: lambda op: None,
        }

    def load(self, progress: Callable[[int], None]) -> None:
        """Bring the weights home; `progress` is told the bytes read.

        In a thread of its own: the team that torch gives it for converting ends with it, and the
        compute lane's stays the only one.
        """

        def load() -> None:
            with torch.inference_mode():
                self.weights.load(progress, self._device.stop)

        with ThreadPoolExecutor(1, "flexpipe-load") as thread:
            loaded = thread.submit(load)
            try:
                loaded.result()
            except BaseException:
                self._device.stop.set()
                raise

    def perform(self, op: Op) -> None:
        """Do what `op` says, in the calling thread or on the current stream."""
        if self._poison:
            self._spoil(op)
        if self._before_op is not None:
            self._before_op(op)
        self._work[op.kind](op)

    def describe(self, op: Op) -> str:
        """An op for messages, its layer by name, and the stage where there are several ranks."""
        mb = "" if op.batch is None else f", micro-batch {op.batch.index}"
        whole = f"{op.kind.value} {self._object(op)} (step {op.step}{mb})"
        alone = not (self.plan.pipeline.is_cut or self.plan.config.is_split)
        return whole if alone else f"{_where(self.plan)}: {whole}"

    def abort(self) -> None:
        """End the messages that other threads wait in; they raise."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        self._reader.close()
        self.memory.close()

    # rubbish, for tests: whoever comes too early or too late finds it

    def _spoil_all(self) -> None:
        self.weights.poison_all()
        self.kv_cache.poison_all()
        self._hidden.poison_all()
        self._queries.poison_all()
        for slab in chain(
            self._embed_slots,
            self._embed_stages,
            self._head_inputs,
            self._logits,
            *self._fetched,
            *self._messages,
            *self._partials,
        ):
            slab.fill_(POISON)

    def _spoil(self, op: Op) -> None:
        """Rubbish into the slot or stage that `op` is about to fill."""
        kind, stage = op.kind, op.stage_slot
        if kind in (Kind.READ_WEIGHT, Kind.LOAD_WEIGHT):
            filled = None if kind == Kind.LOAD_WEIGHT else stage
            self.weights.poison(slot=op.weight_slot, stage=filled)
        elif kind in (Kind.READ_EMBED, Kind.LOAD_EMBED):
            on_stage = kind == Kind.READ_EMBED and stage is not None
            self._embed_rows(op, on_stage=on_stage).view(torch.uint8).fill_(POISON)
        elif kind in (Kind.READ_CACHE, Kind.LOAD_CACHE):
            filled = None if kind == Kind.LOAD_CACHE else stage
            self.kv_cache.poison(slot=op.kv_slot, read_stage=filled)
        elif kind in (Kind.READ_HIDDEN, Kind.LOAD_HIDDEN, Kind.RECEIVE_HIDDEN):
            filled = stage if kind == Kind.READ_HIDDEN else None
            self._hidden.poison(slot=op.hidden_slot, read_stage=filled)
        elif kind == Kind.COMPUTE and op.segment == Segment.QKV:
            assert op.attention_slot is not None
            self._queries.poison(slot=op.attention_slot)
        elif kind == Kind.COMPUTE and op.segment in _LEAVES_PARTIAL:
            self._partials[op.partial_slot or 0].fill_(POISON)
        elif self._device.has_streams:
            return  # a stream fills host memory later than this is called
        elif kind == Kind.STORE_CACHE:
            self.kv_cache.poison(write_stage=stage)
        elif kind == Kind.STORE_HIDDEN:
            self._hidden.poison(write_stage=stage)
        elif kind == Kind.MOVE_QUERY:
            self._queries.poison(stage=stage)

    # moves

    def _read_weight(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self.weights.read(self._layer(op), slot=op.weight_slot, stage=op.stage_slot)
        self._device.disk_read.deliver(num_bytes, start)

    def _load_weight(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.weight_slot is not None
        num_bytes = self.weights.load_layer(
            self._layer(op), op.weight_slot, op.stage_slot, self._device.copy
        )
        self._device.h2d.deliver(num_bytes, start)

    def _read_embed(self, op: Op) -> None:
        start = time.perf_counter()
        layout = self._layout(op)
        rows_TE = self._embed_rows(op, on_stage=self.plan.streams_to_device)
        num_bytes = self.weights.embedding_rows(layout.ids_T, rows_TE)
        self._device.disk_read.deliver(num_bytes, start)

    def _load_embed(self, op: Op) -> None:
        start = time.perf_counter()
        source = self._embed_rows(op, on_stage=True)
        self._device.copy(self._embed_rows(op, on_stage=False), source)
        self._device.h2d.deliver(source.nbytes, start)

    def _read_cache(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self.kv_cache.read(
            self._rows(op), self._decoder(op), slot=op.kv_slot, stage=op.stage_slot
        )
        self._device.disk_read.deliver(num_bytes, start)

    def _load_cache(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.kv_slot is not None
        num_bytes = self.kv_cache.load(
            self._rows(op),
            self._decoder(op),
            slot=op.kv_slot,
            stage=op.stage_slot,
            copy=self._device.copy,
        )
        self._device.h2d.deliver(num_bytes, start)

    def _store_cache(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.kv_slot is not None
        num_bytes = self.kv_cache.store(
            self._rows(op),
            self._decoder(op),
            slot=op.kv_slot,
            stage=op.stage_slot,
            copy=self._device.copy,
        )
        self._device.d2h.deliver(num_bytes, start)

    def _write_cache(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self.kv_cache.write(
            self._rows(op), self._decoder(op), slot=op.kv_slot, stage=op.stage_slot
        )
        self._device.disk_write.deliver(num_bytes, start)

    def _read_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._hidden.read(self._rows(op), slot=op.hidden_slot, stage=op.stage_slot)
        self._device.disk_read.deliver(num_bytes, start)

    def _load_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.hidden_slot is not None
        num_bytes = self._hidden.load(
            self._rows(op), slot=op.hidden_slot, stage=op.stage_slot, copy=self._device.copy
        )
        self._device.h2d.deliver(num_bytes, start)

    def _store_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        assert op.hidden_slot is not None
        num_bytes = self._hidden.store(
            self._rows(op), slot=op.hidden_slot, stage=op.stage_slot, copy=self._device.copy
        )
        self._device.d2h.deliver(num_bytes, start)

    def _write_hidden(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._hidden.write(self._rows(op), slot=op.hidden_slot, stage=op.stage_slot)
        self._device.disk_write.deliver(num_bytes, start)

    # attention on the CPU

    def _move_query(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._queries.move_queries(*self._query_places(op), self._device.copy)
        self._device.d2h.deliver(num_bytes, start)

    def _attend_cpu(self, op: Op) -> None:
        """Append and attend where the rows' cache is; the outputs take the queries' place."""
        layout, config, decoder = self._layout(op), self.plan.config, self._decoder(op)
        if layout.cpu_batch is None:
            layout.cpu_batch = Batch.build(
                config,
                _spans(layout.cpu_runs),
                None,
                lambda index: index,
                self._dtype,
                kv_codec=self.plan.policy.cache_codec,
            )
        kvs = self.kv_cache.views(layout.cpu_runs, self._rows(op), decoder, None)
        assert op.stage_slot is not None
        q_RND, kv_R2KD = self._queries.staged(op.stage_slot, layout.num_cpu_rows)
        segments.append_kv(kv_R2KD, layout.cpu_batch, kvs, self._cpu_workspace)
        segments.attend(q_RND, layout.cpu_batch, kvs, config, decoder, self._cpu_workspace)

    def _move_output(self, op: Op) -> None:
        start = time.perf_counter()
        num_bytes = self._queries.move_outputs(*self._query_places(op), self._device.copy)
        self._device.h2d.deliver(num_bytes, start)

    def _query_places(self, op: Op) -> tuple[int, int, int, int]:
        """Slot and stage, new tokens, rows that attend on the CPU."""
        assert op.attention_slot is not None and op.stage_slot is not None
        num_tokens, num_rows = self._rows(op).num_new, self._layout(op).num_cpu_rows
        return op.attention_slot, op.stage_slot, num_tokens, num_rows

    # messages

    def _receive_hidden(self, op: Op) -> None:
        """Rows come by ascending place and go where they lie here."""
        assert self._transport is not None
        hidden_TH, order_T = self._hidden.view(self._rows(op), op.hidden_slot), self._order(op)
        if order_T is None:
            self._transport.receive(hidden_TH)
            return
        came_TH = typed(self._messages[1], self._dtype, hidden_TH.shape)
        self._transport.receive(came_TH)
        hidden_TH.index_copy_(0, self._device.upload(order_T), came_TH)
        if self._device.has_streams:
            torch.accelerator.current_stream().synchronize()

    def _send_hidden(self, op: Op) -> None:
        assert self._transport is not None
        hidden_TH, order_T = self._hidden.view(self._rows(op), op.hidden_slot), self._order(op)
        if order_T is not None:
            leaving_TH = typed(self._messages[0], self._dtype, hidden_TH.shape)
            torch.index_select(hidden_TH, 0, self._device.upload(order_T), out=leaving_TH)
            hidden_TH = leaving_TH
        self._send(hidden_TH)

    def _receive_tokens(self, op: Op) -> None:
        """Sampled rows of all micro-batches, by ascending place: tokens and whether they mean
        something."""
        assert self._transport is not None
        came = _token_message(op)
        self._transport.receive(came)
        for layout, where in self._sampled_in(op):
            for target, source in zip(self._fetched[layout.source.index], came, strict=True):
                target[: len(where)].copy_(source[where])

    def _send_tokens(self, op: Op) -> None:
        assert self._transport is not None
        leaving = _token_message(op)
        for layout, where in self._sampled_in(op):
            for target, source in zip(leaving, self._fetched[layout.source.index], strict=True):
                target[where] = source[: len(where)].to(target.dtype)
        self._send(leaving)

    def _send(self, message: Tensor) -> None:
        """A message counts on the link of the rank that sends it."""
        assert self._transport is not None
        start = time.perf_counter()
        self._transport.send(message)
        self._device.comm.deliver(message.nbytes, start)

    def _sum(self, parts: Tensor) -> None:
        """Each shard sends and receives a part of the bytes twice, less its own."""
        assert self._transport is not None
        start, size = time.perf_counter(), self.plan.config.shard.size
        self._transport.all_reduce(parts)
        self._device.comm.deliver(2 * (size - 1) * parts.nbytes // size, start)

    def _all_reduce(self, op: Op) -> None:
        """What the shards have computed of the first hidden, of the logits, or of what a half of a
        layer adds to hidden."""
        layer = self._layer(op)
        if layer.kind == LayerKind.HEAD:
            batch = self._rows(op)
            self._sum(self._logits_view(batch.index, batch.num_sampled))
            return
        hidden_TH = self._hidden.view(self._rows(op), op.hidden_slot)
        if layer.kind == LayerKind.EMBED:
            self._sum(hidden_TH)
            return
        partial_TH = self._partial(op)
        self._sum(partial_TH)
        hidden_TH.add_(partial_TH)
        if self._device.has_streams:
            torch.accelerator.current_stream().synchronize()

    def _order(self, op: Op) -> Tensor | None:
        """Where the tokens of a message, rows by ascending place, lie in hidden; None where they
        lie in that order."""
        if not self.plan.reorders_messages:
            return None
        layout = self._layout(op)
        rows = [row for run in layout.runs for row in run.rows]
        if all(one.place < other.place for one, other in pairwise(rows)):
            return None
        ends = accumulate(row.num_new for row in rows)
        spans = {
            row.place: range(end - row.num_new, end) for row, end in zip(rows, ends, strict=True)
        }
        ascending = chain.from_iterable(spans[place] for place in sorted(spans))
        return torch.tensor(list(ascending), dtype=torch.int64)

    def _sampled_in(self, op: Op) -> Iterator[tuple[_Layout, list[int]]]:
        """The micro-batches of a message of tokens, and each sampled row's place in it."""
        first = 0
        for source in op.batches:
            layout = self._layout_of(source)
            places = sorted(row.place for row in layout.sampled)
            yield layout, [first + places.index(row.place) for row in layout.sampled]
            first += len(places)

    # compute

    def _compute(self, op: Op) -> None:
        start = time.perf_counter()
        layer, layout = self._layer(op), self._layout(op)
        parts = self.weights.layer(layer, op.weight_slot)
        hidden_TH = (
            self._hidden.view(self._rows(op), op.hidden_slot)
            if layer.takes_hidden or layer.leaves_hidden
            else None
        )
        if layout.batch is None:
            layout.batch = self._make_batch(layout)
        self._workspace.reset()
        if layer.kind == LayerKind.EMBED:
            assert hidden_TH is not None
            self._compute_embed(op, layout, parts, hidden_TH)
        elif layer.kind == LayerKind.HEAD:
            self._compute_head(op, layer, layout, parts, hidden_TH)
        elif op.segment in _APART:
            assert hidden_TH is not None
            self._compute_apart(op, layer, layout, parts, hidden_TH)
        elif op.segment is not None:
            assert hidden_TH is not None
            self._compute_half(op, layout, parts, hidden_TH)
        else:
            assert hidden_TH is not None
            self._compute_decoder(op, layer, layout, parts, hidden_TH)
        if self._device.flops_per_s is not None:
            rows = self._rows(op)
            flops = compute_flops(
                self.plan,
                op,
                num_new=rows.num_new,
                num_sampled=rows.num_sampled,
                attended=num_attended_by(self.plan, op),
            )
            wait_until(start + flops / self._device.flops_per_s, self._device.stop)

    def _compute_embed(self, op: Op, layout: _Layout, parts: LayerParts, hidden_TH: Tensor) -> None:
        assert layout.batch is not None and isinstance(parts.weights, segments.EmbedWeights)
        rows_TE: Tensor | CompressedWeight
        if parts.embed_tokens is None:
            rows_TE = self._embed_rows(op, on_stage=False)
            if codec := self.plan.embedding.codec:
                rows_TE = CompressedWeight(rows_TE, codec, self.plan.config.input_size)
        elif isinstance(parts.embed_tokens, CompressedWeight):
            rows_TE = parts.embed_tokens.take(self._device.upload(layout.ids_T))
        else:
            rows_TE = torch.embedding(parts.embed_tokens, self._device.upload(layout.ids_T))
        absent_T = None if layout.absent_T is None else self._device.upload(layout.absent_T)
        segments.embed(
            rows_TE,
            hidden_TH,
            parts.weights,
            layout.batch,
            self.plan.config,
            self._workspace,
            absent_T,
        )

    def _compute_decoder(
        self, op: Op, layer: LayerPlan, layout: _Layout, parts: LayerParts, hidden_TH: Tensor
    ) -> None:
        batch, weights, config = layout.batch, parts.weights, self.plan.config
        assert batch is not None and isinstance(weights, segments.LayerWeights)
        decoder = self._decoder(op)
        if layer.has_kv_cache:
            kvs = self.kv_cache.views(layout.runs, self._rows(op), decoder, op.kv_slot)
            segments.attention_half(
                hidden_TH, weights, batch, kvs, config, decoder, self._workspace
            )
        if layer.kind != LayerKind.ATTENTION:
            segments.mlp_half(hidden_TH, weights, config, self._workspace)

    def _compute_half(self, op: Op, layout: _Layout, parts: LayerParts, hidden_TH: Tensor) -> None:
        """A shard's part of what half a layer adds to hidden, or what follows their sum."""
        batch, weights, config = layout.batch, parts.weights, self.plan.config
        assert batch is not None and isinstance(weights, segments.LayerWeights)
        match op.segment:
            case Segment.ATTENTION:
                decoder = self._decoder(op)
                kvs = self.kv_cache.views(layout.runs, self._rows(op), decoder, op.kv_slot)
                segments.attention_half(
                    hidden_TH, weights, batch, kvs, config, decoder, self._workspace,
                    self._partial(op),
                )  # fmt: skip
            case Segment.AFTER_ATTENTION:
                segments.after_attention(hidden_TH, weights, config, self._workspace)
            case Segment.MLP:
                segments.mlp_half(hidden_TH, weights, config, self._workspace, self._partial(op))
            case Segment.AFTER_MLP:
                segments.after_mlp(hidden_TH, weights, config, self._workspace)

    def _compute_apart(
        self, op: Op, layer: LayerPlan, layout: _Layout, parts: LayerParts, hidden_TH: Tensor
    ) -> None:
        """A decoder layer up to attention, attention itself, or the rest of the layer."""
        batch, weights, config = layout.batch, parts.weights, self.plan.config
        assert batch is not None and isinstance(weights, segments.LayerWeights)
        decoder, rows, num_tokens = self._decoder(op), layout.num_cpu_rows, self._rows(op).num_new
        assert op.attention_slot is not None
        both = self._queries.view(op.attention_slot, num_tokens)
        q_TND = both[:, : config.num_heads]
        leaving = self._queries.leaving(op.attention_slot, num_tokens, rows)
        if op.segment in (Segment.OUT, Segment.PROJECT):
            q_TND[-rows:].copy_(leaving[0])
            partial_TH = self._partial(op) if op.segment == Segment.PROJECT else None
            segments.out(q_TND.flatten(1), hidden_TH, weights, config, self._workspace, partial_TH)
            if op.segment == Segment.OUT and layer.kind != LayerKind.ATTENTION:
                segments.mlp_half(hidden_TH, weights, config, self._workspace)
            return
        here = layout.runs[: len(layout.runs) - len(layout.cpu_runs)]
        kvs = self.kv_cache.views(here, self._rows(op), decoder, op.kv_slot)
        if op.segment == Segment.ATTEND:
            segments.attend(q_TND, batch, kvs, config, decoder, self._workspace)
            return
        q_TND, kv_T2KD = segments.qkv(hidden_TH, weights, batch, config, both, self._workspace)
        segments.append_kv(kv_T2KD, batch, kvs, self._workspace)
        for target, source in zip(leaving, (q_TND, kv_T2KD), strict=True):
            target.copy_(source[-rows:])

    def _compute_head(
        self,
        op: Op,
        layer: LayerPlan,
        layout: _Layout,
        parts: LayerParts,
        hidden_TH: Tensor | None,
    ) -> None:
        batch, weights = layout.batch, parts.weights
        assert batch is not None and isinstance(weights, segments.HeadWeights)
        assert layer.vocab is not None and parts.lm_head is not None
        mb, rows = self._rows(op).index, len(layout.sampled)
        slab = self._head_inputs[self.plan.ranks_in_block[mb]]
        x_RE = typed(slab, self._dtype, (rows, self.plan.config.input_size))
        if hidden_TH is not None:
            x_RE.copy_(
                segments.head_input(
                    hidden_TH, batch.sample_index_S, weights, self.plan.config, self._workspace
                )
            )
            self._workspace.reset()
        logits_RV, first = self._logits_view(mb, rows), self.plan.config.vocab_rows.start
        if self.plan.config.is_split and layer.takes_hidden:
            logits_RV.zero_()  # the others add theirs
        out_RV = logits_RV[:, first + layer.vocab[0] : first + layer.vocab[1]]
        segments.logits_slice(x_RE, parts.lm_head, out_RV, self._workspace)

    def _sample(self, op: Op) -> None:
        layout = self._layout(op)
        logits_RV = self._logits_view(layout.source.index, len(layout.sampled))
        layout.tokens = choose(logits_RV, [row.draw for row in layout.sampled])

    def _fetch_tokens(self, op: Op) -> None:
        layout = self._layout(op)
        assert layout.tokens is not None
        count = len(layout.sampled)
        fetched = self._fetched[layout.source.index]
        for target, source in zip(fetched, layout.tokens, strict=True):
            target[:count].copy_(source, non_blocking=target.is_pinned())
        if self.plan.streams_to_device:
            num_bytes = sum(source.nbytes for source in layout.tokens)
            self._device.d2h.deliver(num_bytes, time.perf_counter())

    def _commit(self, op: Op) -> None:
        layout = self._layout(op)
        tokens_R, finite_R = self._fetched[layout.source.index]
        count = len(layout.sampled)
        sampled = [
            SampledToken(row, token, finite)
            for row, token, finite in zip(
                layout.sampled, tokens_R[:count].tolist(), finite_R[:count].tolist(), strict=True
            )
        ]
        assert self._commit_rows is not None
        self._commit_rows(layout.source, sampled)

    def logits(self, op: Op) -> tuple[Sequence[Row], Tensor]:
        """The rows that a SAMPLE op samples and their logits, [R, V]; for whoever watches a run."""
        layout = self._layout(op)
        return layout.sampled, self._logits_view(layout.source.index, len(layout.sampled))

    # lookups

    def _object(self, op: Op) -> str:
        """What an op is about, behind its kind."""
        rank, num_stages = self.plan.rank, self.plan.pipeline.num_stages
        match op.lane:
            case Lane.SEND:
                return f"to stage {(rank + 1) % num_stages}"
            case Lane.RECEIVE:
                return f"from stage {(rank - 1) % num_stages}"
            case Lane.REDUCE:
                return f"over the shards of {self._layer(op).name}"
        return f"of {self._layer(op).name}"

    def _layer(self, op: Op) -> LayerPlan:
        return self.plan.layers[op.layer]

    def _decoder(self, op: Op) -> int:
        layer = self._layer(op).layer
        assert layer is not None
        return layer

    def _rows(self, op: Op) -> MicroBatch:
        assert op.batch is not None
        return op.batch

    def _layout(self, op: Op) -> _Layout:
        """The micro-batch's layout in this step; made by whichever op needs it first."""
        return self._layout_of(self._rows(op))

    def _layout_of(self, source: MicroBatch) -> _Layout:
        with self._lock:
            layout = self._layouts.get(source.index)
            if layout is None or layout.source is not source:
                layout = self._layouts[source.index] = self._make_layout(source)
            return layout

    def _make_layout(self, source: MicroBatch) -> _Layout:
        runs = self.kv_cache.runs(source)
        rows = [row for run in runs for row in run.rows]
        ids = list(chain.from_iterable(row.tokens for row in rows)) if self.plan.embeds else []
        sampled = tuple(row for row in rows if row.sampled)
        ids_T, absent_T = torch.tensor(ids, dtype=torch.int64), None
        if self.plan.config.is_split:
            here = self.plan.config.vocab_rows
            ids_T -= here.start
            absent_T = (ids_T < 0) | (ids_T >= len(here))
            ids_T.masked_fill_(absent_T, 0)
        return _Layout(source, runs, ids_T, absent_T, sampled)

    def _make_batch(self, layout: _Layout) -> Batch:
        return Batch.build(
            self.plan.config,
            _spans(layout.runs),
            self._rope,
            self._device.upload,
            self._dtype,
            kv_codec=self.plan.policy.cache_codec,
            num_elsewhere=len(layout.cpu_runs),
        )

    def _embed_rows(self, op: Op, *, on_stage: bool) -> Tensor:
        slot = op.stage_slot if on_stage else op.embed_slot
        assert slot is not None
        slab = (self._embed_stages if on_stage else self._embed_slots)[slot]
        table = self.plan.embedding
        shape = (self._rows(op).num_new, table.shape[1])
        return typed(slab, torch_dtype(table.dtype), shape)

    def _partial(self, op: Op) -> Tensor:
        """This shard's part of what is added to hidden, [T, H]."""
        assert op.partial_slot is not None
        shape = (self._rows(op).num_new, self.plan.config.hidden_size)
        return typed(self._partials[op.partial_slot], self._dtype, shape)

    def _logits_view(self, mb: int, rows: int) -> Tensor:
        slab = self._logits[0 if len(self._logits) == 1 else self.plan.ranks_in_block[mb]]
        return typed(slab, self._dtype, (rows, self.plan.config.vocab_size))

    def _take_compute_pools(self) -> None:
        pools = {(pool.name, pool.tier): pool for pool in self.plan.pools}
        device = self.plan.device_tier

        def slots(name: str, tier: Tier) -> list[Tensor]:
            pool = pools.get((name, tier))
            return [self._take(pool) for _ in range(pool.num_slots)] if pool else []

        self._workspace = Workspace(slots("workspace", device)[0])
        self._logits = slots("logits", device)
        self._head_inputs = slots("head input", device)
        self._embed_slots = slots("embedding slots", device)
        self._embed_stages = slots("embedding staging", Tier.CPU)
        self._messages = slots("messages", device)
        self._partials = slots("partial sums", device)
        none = torch.empty(0, dtype=torch.uint8)
        self._cpu_workspace = Workspace((slots("attention workspace", Tier.CPU) or [none])[0])
        pin = self._device.has_streams
        self._fetched = [
            (
                torch.zeros(mb.num_places, dtype=torch.int64, pin_memory=pin),
                torch.zeros(mb.num_places, dtype=torch.bool, pin_memory=pin),
            )
            for mb in self.plan.micro_batches
        ]

    def _take(self, pool: PoolPlan) -> Tensor:
        if pool.tier == self.plan.device_tier:
            return self.memory.take_on_device(pool.slot_bytes, pool.name)
        return self.memory.take_on_host(pool.slot_bytes, pool.name)


def _where(plan: Plan) -> str:
    """Which rank computes a plan, as its gang calls it too."""
    shard = plan.config.shard
    rank = plan.rank * shard.size + shard.index
    return place_name(rank, shard.size, plan.pipeline.chunks(plan.rank))


def _token_message(op: Op) -> Tensor:
    """[2, R]: tokens of a step's R sampled rows, and 1 where the logits were finite."""
    num_rows = sum(batch.num_sampled for batch in op.batches)
    return torch.zeros((2, max(1, num_rows)), dtype=torch.int64)


def _spans(runs: Sequence[RowRun]) -> list[list[RowSpan]]:
    return [
        [RowSpan(row.num_context, row.num_new, row.sampled) for row in run.rows] for run in runs
    ]
