"""What COMPUTE, ATTEND_CPU and SAMPLE do: a layer or a segment of it, on tensors that lie ready.

Shapes: T new tokens, E embedding width, H hidden size, N query heads, D head size, R sampled rows,
V vocabulary.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from flexpipe.memory.link import wait_until
from flexpipe.memory.weights import LayerParts
from flexpipe.model import segments
from flexpipe.model.matmul import CompressedWeight
from flexpipe.model.sampling import choose
from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.runtime.device import Device
from flexpipe.runtime.layout import Layout, Layouts, rows_of
from flexpipe.runtime.stores import Stores
from flexpipe.schedule.flops import compute_flops, num_attended_by
from flexpipe.schedule.op import Op, Segment

_APART = (Segment.QKV, Segment.ATTEND, Segment.OUT, Segment.PROJECT)  # with attention on the CPU


class Compute:
    """The arithmetic of a stage."""

    def __init__(self, plan: Plan, device: Device, stores: Stores, layouts: Layouts) -> None:
        self._plan = plan
        self._config = plan.config
        self._device = device
        self._stores = stores
        self._buffers = stores.buffers
        self._workspace = stores.buffers.workspace
        self._layouts = layouts

    def compute(self, op: Op) -> None:
        """On an emulated accelerator it takes what its rate makes of it."""
        start = time.perf_counter()
        self._workspace.reset()
        self._compute(op)
        if self._device.flops_per_s is not None:
            end = start + self._flops(op) / self._device.flops_per_s
            wait_until(end, self._device.stop)

    def attend_cpu(self, op: Op) -> None:
        """Append and attend where the rows' cache is; the outputs take the queries' place."""
        layout, decoder = self._layouts.of(rows_of(op)), self._plan.layers[op.layer].decoder
        batch, workspace = self._layouts.cpu_batch(layout), self._buffers.cpu_workspace
        kvs = self._stores.kv_cache.views(layout.cpu_runs, layout.source, decoder, None)
        assert op.stage_slot is not None
        q_RND, kv_R2KD = self._stores.queries.staged(op.stage_slot, layout.num_cpu_rows)
        segments.append_kv(kv_R2KD, batch, kvs, workspace)
        segments.attend(q_RND, batch, kvs, self._config, decoder, workspace)

    def sample(self, op: Op) -> None:
        layout = self._layouts.of(rows_of(op))
        logits_RV = self._buffers.logits(layout.source.index, len(layout.sampled))
        layout.tokens = choose(logits_RV, [row.draw for row in layout.sampled])

    def _compute(self, op: Op) -> None:
        layer, layout = self._plan.layers[op.layer], self._layouts.of(rows_of(op))
        parts = self._stores.weights.layer(layer, op.weight_slot)
        if layer.kind == LayerKind.HEAD:
            self._head(op, layer, layout, parts)
            return
        hidden_TH = self._stores.hidden.view(layout.source, op.hidden_slot)
        if layer.kind == LayerKind.EMBED:
            self._embed(op, layout, parts, hidden_TH)
        elif op.segment in _APART:
            self._apart(op, layer, layout, parts, hidden_TH)
        elif op.segment is not None:
            self._half(op, layer, layout, parts, hidden_TH)
        else:
            self._decoder(op, layer, layout, parts, hidden_TH)

    def _flops(self, op: Op) -> int:
        rows = rows_of(op)
        return compute_flops(
            self._plan,
            op,
            num_new=rows.num_new,
            num_sampled=rows.num_sampled,
            attended=num_attended_by(self._plan, op),
        )

    def _embed(self, op: Op, layout: Layout, parts: LayerParts, hidden_TH: Tensor) -> None:
        assert isinstance(parts.weights, segments.EmbedWeights)
        rows_TE: Tensor | CompressedWeight
        if parts.embed_tokens is None:
            rows_TE = self._buffers.embed_rows(layout.source.num_new, op.embed_slot)
            if codec := self._plan.embedding.codec:
                rows_TE = CompressedWeight(rows_TE, codec, self._config.input_size)
        elif isinstance(parts.embed_tokens, CompressedWeight):
            rows_TE = parts.embed_tokens.take(self._device.upload(layout.ids_T))
        else:
            rows_TE = torch.embedding(parts.embed_tokens, self._device.upload(layout.ids_T))
        absent_T = None if layout.absent_T is None else self._device.upload(layout.absent_T)
        segments.embed(
            rows_TE,
            hidden_TH,
            parts.weights,
            self._layouts.batch(layout),
            self._config,
            self._workspace,
            absent_T,
        )

    def _decoder(
        self, op: Op, layer: LayerPlan, layout: Layout, parts: LayerParts, hidden_TH: Tensor
    ) -> None:
        batch, weights, config = self._layouts.batch(layout), parts.weights, self._config
        assert isinstance(weights, segments.LayerWeights)
        decoder = layer.decoder
        if layer.has_kv_cache:
            kvs = self._stores.kv_cache.views(layout.runs, layout.source, decoder, op.kv_slot)
            segments.attention_half(
                hidden_TH, weights, batch, kvs, config, decoder, self._workspace
            )
        if layer.kind != LayerKind.ATTENTION:
            segments.mlp_half(hidden_TH, weights, config, self._workspace)

    def _half(
        self, op: Op, layer: LayerPlan, layout: Layout, parts: LayerParts, hidden_TH: Tensor
    ) -> None:
        """A shard's part of what half a layer adds to hidden, or what follows their sum."""
        batch, weights, config = self._layouts.batch(layout), parts.weights, self._config
        assert isinstance(weights, segments.LayerWeights)
        match op.segment:
            case Segment.ATTENTION:
                decoder = layer.decoder
                kvs = self._stores.kv_cache.views(layout.runs, layout.source, decoder, op.kv_slot)
                segments.attention_half(
                    hidden_TH, weights, batch, kvs, config, decoder, self._workspace,
                    self._partial(op, layout),
                )  # fmt: skip
            case Segment.AFTER_ATTENTION:
                segments.after_attention(hidden_TH, weights, config, self._workspace)
            case Segment.MLP:
                segments.mlp_half(
                    hidden_TH, weights, config, self._workspace, self._partial(op, layout)
                )
            case Segment.AFTER_MLP:
                segments.after_mlp(hidden_TH, weights, config, self._workspace)

    def _apart(
        self, op: Op, layer: LayerPlan, layout: Layout, parts: LayerParts, hidden_TH: Tensor
    ) -> None:
        """A decoder layer up to attention, attention itself, or the rest of the layer."""
        batch, weights, config = self._layouts.batch(layout), parts.weights, self._config
        assert isinstance(weights, segments.LayerWeights)
        decoder, rows, num_tokens = layer.decoder, layout.num_cpu_rows, layout.source.num_new
        assert op.attention_slot is not None
        both = self._stores.queries.view(op.attention_slot, num_tokens)
        q_TND = both[:, : config.num_heads]
        leaving = self._stores.queries.leaving(op.attention_slot, num_tokens, rows)
        if op.segment in (Segment.OUT, Segment.PROJECT):
            q_TND[-rows:].copy_(leaving[0])
            partial_TH = self._partial(op, layout) if op.segment == Segment.PROJECT else None
            segments.out(q_TND.flatten(1), hidden_TH, weights, config, self._workspace, partial_TH)
            if op.segment == Segment.OUT and layer.kind != LayerKind.ATTENTION:
                segments.mlp_half(hidden_TH, weights, config, self._workspace)
            return
        kvs = self._stores.kv_cache.views(layout.device_runs, layout.source, decoder, op.kv_slot)
        if op.segment == Segment.ATTEND:
            segments.attend(q_TND, batch, kvs, config, decoder, self._workspace)
            return
        q_TND, kv_T2KD = segments.qkv(hidden_TH, weights, batch, config, both, self._workspace)
        segments.append_kv(kv_T2KD, batch, kvs, self._workspace)
        for target, source in zip(leaving, (q_TND, kv_T2KD), strict=True):
            target.copy_(source[-rows:])

    def _head(self, op: Op, layer: LayerPlan, layout: Layout, parts: LayerParts) -> None:
        """Logits of the head's slice; the first one leaves what the others multiply too."""
        assert isinstance(parts.weights, segments.HeadWeights)
        assert layer.vocab is not None and parts.lm_head is not None
        mb, num_rows = layout.source.index, len(layout.sampled)
        x_RE = self._buffers.head_input(mb, num_rows)
        if layer.takes_hidden:
            hidden_TH = self._stores.hidden.view(layout.source, op.hidden_slot)
            index_S = self._layouts.batch(layout).sample_index_S
            x_RE.copy_(
                segments.head_input(
                    hidden_TH, index_S, parts.weights, self._config, self._workspace
                )
            )
            self._workspace.reset()
        logits_RV, first = self._buffers.logits(mb, num_rows), self._config.vocab_rows.start
        if self._config.is_split and layer.takes_hidden:
            logits_RV.zero_()  # the others add theirs
        out_RV = logits_RV[:, first + layer.vocab[0] : first + layer.vocab[1]]
        segments.logits_slice(x_RE, parts.lm_head, out_RV, self._workspace)

    def _partial(self, op: Op, layout: Layout) -> Tensor:
        return self._buffers.partial(layout.source.num_new, op.partial_slot)
