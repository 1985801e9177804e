"""What a layer computes for a micro-batch: one op, or segments with other work between them.

Attention on the CPU parts a layer, and so do sums: of a model that is split over the ranks of a
stage, each rank computes a part of what a half of a layer adds to hidden, of the first hidden and
of the logits. ALL_REDUCE adds up the parts, and to hidden; all ranks of a stage reduce in the same
order, that of the micro-batches through the layers, which no tier or slot of theirs changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.schedule.edges import Edges
from flexpipe.schedule.moves import Homes, hidden_of, kv_of, rows_of, tokens_of
from flexpipe.schedule.op import Kind, Lane, Op, Pool, Resource, Segment
from flexpipe.schedule.prefetch import WeightLoads
from flexpipe.schedule.slots import Slots
from flexpipe.schedule.step import MicroBatch


@dataclass(slots=True)
class _Uses:
    """What ops of a layer for one micro-batch touch, and the slots they find it in."""

    weights: list[Resource] = field(default_factory=list)
    cache: list[Resource] = field(default_factory=list)
    hidden: list[Resource] = field(default_factory=list)
    slots: dict[str, Any] = field(default_factory=dict)


class Computations:
    """Ops of the layers that compute."""

    def __init__(
        self, plan: Plan, edges: Edges, slots: Slots, homes: Homes, weights: WeightLoads
    ) -> None:
        self._plan = plan
        self._edges = edges
        self._slots = slots
        self._homes = homes
        self._weights = weights

    def layer(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Hidden after `layer`, or the logits of its slice."""
        if layer.kind == LayerKind.EMBED:
            yield from self._embed(step, layer, batch)
        elif layer.kind == LayerKind.HEAD:
            yield from self._head(step, layer, batch)
        elif self._plan.config.is_split:
            yield from self._halves(step, layer, batch)
        elif layer.has_kv_cache and self._homes.has_rows_on_cpu(batch):
            uses = self._uses(layer, batch)
            yield from self._apart(step, layer, batch, uses, Segment.OUT, uses.hidden)
        else:
            uses = self._uses(layer, batch)
            yield self._edges.op(
                Kind.COMPUTE,
                step,
                layer.position,
                batch,
                reads=tuple(uses.weights),
                writes=(*uses.cache, *uses.hidden),
                **uses.slots,
            )

    def sample(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """The tokens of the rows that ask for one, on the host."""
        edges, where = self._edges, (step, layer.position, batch)
        tokens: Resource = (Pool.TOKENS, batch.index, 0, 0)
        yield edges.op(Kind.SAMPLE, *where, reads=(self._logits(batch),), writes=(tokens,))
        yield edges.op(Kind.FETCH_TOKENS, *where, reads=(tokens,), writes=(tokens_of(batch),))

    def _embed(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        uses = self._uses(layer, batch)
        reads = [*uses.weights, rows_of(batch)]
        if self._plan.embed_streams:
            slot = uses.slots["embed_slot"] = self._slots.held(Pool.EMBED_SLOT, mb=batch.index)
            reads.append((Pool.EMBED_SLOT, slot, 0, 0))
        where = step, layer.position, batch
        made = tuple(uses.hidden)
        yield self._edges.op(Kind.COMPUTE, *where, reads=tuple(reads), writes=made, **uses.slots)
        if self._plan.config.is_split:
            yield self._reduce(step, layer, batch, writes=made, uses=uses)

    def _head(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        uses = _Uses()
        self._use_weights(layer, uses)
        if layer.takes_hidden:
            self._use_hidden(layer, batch, uses)
        index = self._plan.ranks_in_block[batch.index]
        head_input: Resource = (Pool.HEAD_INPUT, index, 0, 0)
        logits = self._logits(batch)
        reads, writes = [*uses.weights, *uses.hidden], [logits]
        (writes if layer.takes_hidden else reads).append(head_input)
        where = step, layer.position, batch
        yield self._edges.op(
            Kind.COMPUTE, *where, reads=tuple(reads), writes=tuple(writes), **uses.slots
        )
        if self._plan.config.is_split and layer is self._plan.layers[-1]:
            yield self._reduce(step, layer, batch, writes=(logits,), uses=_Uses())

    def _apart(
        self,
        step: int,
        layer: LayerPlan,
        batch: MicroBatch,
        uses: _Uses,
        rest: Segment,
        target: Sequence[Resource],
    ) -> Iterator[Op]:
        """A layer in segments: queries of some rows go to the CPU while the others attend here.
        The `rest` of the layer follows, into `target`."""
        where = (step, layer.position, batch)
        slot, stage = self._slots.take(Pool.ATTENTION_SLOT), self._slots.take(Pool.QUERY_STAGE)
        here: Resource = (Pool.ATTENTION_SLOT, slot, 0, 0)
        leaving: Resource = (Pool.ATTENTION_SLOT, slot, 1, 0)
        staged: Resource = (Pool.QUERY_STAGE, stage, 0, 0)
        compute = partial(self._edges.op, Kind.COMPUTE, *where, attention_slot=slot, **uses.slots)
        move = partial(self._edges.op, stage_slot=stage, attention_slot=slot)
        needed, made = (*uses.weights, *uses.hidden), (*uses.cache, here, leaving)
        yield compute(reads=needed, writes=made, segment=Segment.QKV)
        yield move(Kind.MOVE_QUERY, *where, reads=(leaving,), writes=(staged,))
        yield move(Kind.ATTEND_CPU, *where, writes=(kv_of(layer, batch, Tier.CPU), staged))
        if uses.cache:
            yield compute(reads=tuple(uses.cache), writes=(here,), segment=Segment.ATTEND)
        yield move(Kind.MOVE_OUTPUT, *where, reads=(staged,), writes=(leaving,))
        done = (here, leaving, *target)
        yield compute(reads=tuple(uses.weights), writes=done, segment=rest)

    def _halves(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """A shard's part of each half of a layer, and the sums."""
        uses = self._uses(layer, batch)
        compute = partial(self._edges.op, Kind.COMPUTE, step, layer.position, batch)
        needed, hidden = (*uses.weights, *uses.hidden), tuple(uses.hidden)

        def add_up(part: Resource, after: Segment) -> Iterator[Op]:
            yield self._reduce(step, layer, batch, reads=(part,), writes=hidden, uses=uses)
            if self._plan.config.post_norm:
                hidden_slot = uses.slots["hidden_slot"]
                yield compute(writes=hidden, hidden_slot=hidden_slot, segment=after)

        if layer.has_kv_cache:
            part = self._take_part(uses)
            if self._homes.has_rows_on_cpu(batch):
                yield from self._apart(step, layer, batch, uses, Segment.PROJECT, (part,))
            else:
                made = (*uses.cache, part)
                segment = Segment.ATTENTION
                yield compute(reads=needed, writes=made, segment=segment, **uses.slots)
            yield from add_up(part, Segment.AFTER_ATTENTION)
        if layer.kind != LayerKind.ATTENTION:
            part = self._take_part(uses)
            yield compute(reads=needed, writes=(part,), segment=Segment.MLP, **uses.slots)
            yield from add_up(part, Segment.AFTER_MLP)

    def _reduce(
        self,
        step: int,
        layer: LayerPlan,
        batch: MicroBatch,
        *,
        reads: tuple[Resource, ...] = (),
        writes: tuple[Resource, ...],
        uses: _Uses,
    ) -> Op:
        order: Resource = (Pool.ORDER, Lane.REDUCE.value, 0, 0)
        return self._edges.op(
            Kind.ALL_REDUCE,
            step,
            layer.position,
            batch,
            reads=reads,
            writes=(*writes, order),
            hidden_slot=uses.slots.get("hidden_slot"),
            partial_slot=uses.slots.get("partial_slot"),
        )

    def _take_part(self, uses: _Uses) -> Resource:
        slot = uses.slots["partial_slot"] = self._slots.take(Pool.PARTIAL_SLOT)
        return (Pool.PARTIAL_SLOT, slot, 0, 0)

    def _uses(self, layer: LayerPlan, batch: MicroBatch) -> _Uses:
        uses = _Uses()
        self._use_weights(layer, uses)
        if layer.has_kv_cache:
            self._use_cache(layer, batch, uses)
        self._use_hidden(layer, batch, uses)
        return uses

    def _use_weights(self, layer: LayerPlan, uses: _Uses) -> None:
        """The slot that a streamed layer's weights lie in."""
        if layer.is_streamed:
            slot = uses.slots["weight_slot"] = self._weights.slot(layer)
            uses.weights.append((Pool.WEIGHT_SLOT, slot, 0, 0))

    def _use_cache(self, layer: LayerPlan, batch: MicroBatch, uses: _Uses) -> None:
        """Where attention on the device finds keys and values; the slot that some pass through."""
        tiers = self._homes.tiers(batch, with_past=False)
        if self._plan.device_tier in tiers:
            uses.cache.append(kv_of(layer, batch, self._plan.device_tier))
        if tiers - {self._plan.device_tier}:
            slot = self._slots.held(Pool.KV_SLOT, layer.position, batch.index)
            uses.slots["kv_slot"] = slot
            uses.cache.append((Pool.KV_SLOT, slot, 0, 0))

    def _use_hidden(self, layer: LayerPlan, batch: MicroBatch, uses: _Uses) -> None:
        uses.slots["hidden_slot"] = None
        if self._homes.hidden_at_home(batch):
            uses.hidden.append(hidden_of(batch))
            return
        if layer.kind == LayerKind.EMBED:
            self._slots.take(Pool.HIDDEN_SLOT, mb=batch.index)
        slot = self._slots.held(Pool.HIDDEN_SLOT, mb=batch.index)
        uses.slots["hidden_slot"] = slot
        uses.hidden.append((Pool.HIDDEN_SLOT, slot, 0, 0))

    def _logits(self, batch: MicroBatch) -> Resource:
        shared = self._plan.num_logits == 1
        return (Pool.LOGITS, 0 if shared else self._plan.ranks_in_block[batch.index], 0, 0)
