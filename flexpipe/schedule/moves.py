"""The hops of KV cache, hidden and embedding rows between their homes and the compute device."""

from __future__ import annotations

from collections.abc import Iterator

from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.schedule.edges import Edges
from flexpipe.schedule.op import Kind, Op, Pool, Resource
from flexpipe.schedule.slots import Slots
from flexpipe.schedule.step import MicroBatch, Row


def rows_of(batch: MicroBatch) -> Resource:
    return (Pool.ROWS, batch.index, 0, 0)


def kv_of(layer: LayerPlan, batch: MicroBatch, tier: Tier) -> Resource:
    return (Pool.KV, tier.value, layer.position, batch.index)


def hidden_of(batch: MicroBatch) -> Resource:
    return (Pool.HIDDEN, batch.index, 0, 0)


def tokens_of(batch: MicroBatch) -> Resource:
    return (Pool.HOST_TOKENS, batch.index, 0, 0)


class Homes:
    """Where a micro-batch's rows and hidden rest."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tiers: dict[tuple[int, bool], tuple[MicroBatch, frozenset[Tier]]] = {}

    def hidden(self, batch: MicroBatch) -> Tier:
        return self._plan.micro_batches[batch.index].hidden_home

    def hidden_at_home(self, batch: MicroBatch) -> bool:
        """Whether hidden rests beside the compute device."""
        return self.hidden(batch) == self._plan.device_tier

    def tiers(self, batch: MicroBatch, *, with_past: bool) -> frozenset[Tier]:
        """KV homes of the rows that have tokens behind them, or of those that get new ones.

        Rows that attend on the CPU are not among them: their cache stays where it is.
        """
        known = self._tiers.get((batch.index, with_past))
        if known is None or known[0] is not batch:
            homes = self._plan.micro_batches[batch.index].kv_homes
            tiers = frozenset(
                homes[row.place]
                for row in batch.rows
                if row.num_new and (row.num_context or not with_past)
                if not self._on_cpu(batch, row)
            )
            known = self._tiers[batch.index, with_past] = batch, tiers
        return known[1]

    def has_rows_on_cpu(self, batch: MicroBatch) -> bool:
        """Whether any of its rows attends on the CPU."""
        return self._plan.attends_on_cpu and any(self._on_cpu(batch, row) for row in batch.rows)

    def uses_kv_slot(self, batch: MicroBatch) -> bool:
        """Whether any of its rows' KV cache passes through a slot."""
        return bool(self.tiers(batch, with_past=False) - {self._plan.device_tier})

    def _on_cpu(self, batch: MicroBatch, row: Row) -> bool:
        return self._plan.row_attends_on_cpu(batch.index, row.place, row.num_new)


class Moves:
    """Ops that bring a layer's inputs and take its results home, where those are elsewhere."""

    def __init__(self, plan: Plan, edges: Edges, slots: Slots, homes: Homes) -> None:
        self._plan = plan
        self._edges = edges
        self._slots = slots
        self._homes = homes

    def load_embed(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Fetch the embedding rows a micro-batch needs; `embed_slot` tells where they went."""
        if not self._plan.embed_streams:
            return
        slot = self._slots.take(Pool.EMBED_SLOT, mb=batch.index)
        target: Resource = (Pool.EMBED_SLOT, slot, 0, 0)
        edges, where = self._edges, (step, layer.position, batch)
        rows = rows_of(batch)
        if not self._plan.streams_to_device:
            yield edges.op(
                Kind.READ_EMBED, *where, reads=(rows,), writes=(target,), embed_slot=slot
            )
            return
        stage = self._slots.take(Pool.EMBED_STAGE)
        staged: Resource = (Pool.EMBED_STAGE, stage, 0, 0)
        yield edges.op(Kind.READ_EMBED, *where, reads=(rows,), writes=(staged,), stage_slot=stage)
        yield edges.op(
            Kind.LOAD_EMBED,
            *where,
            reads=(staged,),
            writes=(target,),
            embed_slot=slot,
            stage_slot=stage,
        )

    def load_cache(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Bring the KV cache of rows with a past into a slot; takes the slot in any case."""
        slot = self._slots.take(Pool.KV_SLOT, layer.position, batch.index)
        target: Resource = (Pool.KV_SLOT, slot, 0, 0)
        tiers = self._homes.tiers(batch, with_past=True)
        edges, where = self._edges, (step, layer.position, batch)
        if not self._plan.streams_to_device:
            if Tier.DISK in tiers:
                yield edges.op(
                    Kind.READ_CACHE,
                    *where,
                    reads=(kv_of(layer, batch, Tier.DISK), rows_of(batch)),
                    writes=(target,),
                    kv_slot=slot,
                )
            return
        stage: int | None = None
        sources: list[Resource] = []
        if Tier.DISK in tiers:
            stage = self._slots.take(Pool.KV_READ_STAGE)
            sources.append((Pool.KV_READ_STAGE, stage, 0, 0))
            yield edges.op(
                Kind.READ_CACHE,
                *where,
                reads=(kv_of(layer, batch, Tier.DISK), rows_of(batch)),
                writes=(sources[0],),
                stage_slot=stage,
            )
        if Tier.CPU in tiers:
            sources.append(kv_of(layer, batch, Tier.CPU))
        if sources:
            yield edges.op(
                Kind.LOAD_CACHE,
                *where,
                reads=(*sources, rows_of(batch)),
                writes=(target,),
                kv_slot=slot,
                stage_slot=stage,
            )

    def store_cache(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Send new tokens' keys and values home."""
        slot = self._slots.held(Pool.KV_SLOT, layer.position, batch.index)
        source: Resource = (Pool.KV_SLOT, slot, 0, 0)
        tiers = self._homes.tiers(batch, with_past=False)
        edges, where = self._edges, (step, layer.position, batch)
        on_disk = kv_of(layer, batch, Tier.DISK)
        if not self._plan.streams_to_device:
            if Tier.DISK in tiers:
                yield edges.op(
                    Kind.WRITE_CACHE, *where, reads=(source,), writes=(on_disk,), kv_slot=slot
                )
            return
        stage: int | None = None
        targets: list[Resource] = []
        if Tier.CPU in tiers:
            targets.append(kv_of(layer, batch, Tier.CPU))
        if Tier.DISK in tiers:
            stage = self._slots.take(Pool.KV_WRITE_STAGE)
            targets.append((Pool.KV_WRITE_STAGE, stage, 0, 0))
        if not targets:
            return
        yield edges.op(
            Kind.STORE_CACHE,
            *where,
            reads=(source,),
            writes=tuple(targets),
            kv_slot=slot,
            stage_slot=stage,
        )
        if stage is not None:
            staged: Resource = (Pool.KV_WRITE_STAGE, stage, 0, 0)
            yield edges.op(
                Kind.WRITE_CACHE, *where, reads=(staged,), writes=(on_disk,), stage_slot=stage
            )

    def load_hidden(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Bring a micro-batch's hidden into a slot, where its home is elsewhere."""
        if not layer.takes_hidden or self._homes.hidden_at_home(batch):
            return
        if layer.kind == LayerKind.HEAD and not batch.num_sampled:
            return
        slot = self._slots.take(Pool.HIDDEN_SLOT, mb=batch.index)
        target: Resource = (Pool.HIDDEN_SLOT, slot, 0, 0)
        source = hidden_of(batch)
        edges, where = self._edges, (step, layer.position, batch)
        if not self._plan.streams_to_device:
            yield edges.op(
                Kind.READ_HIDDEN, *where, reads=(source,), writes=(target,), hidden_slot=slot
            )
            return
        stage: int | None = None
        if self._homes.hidden(batch) == Tier.DISK:
            stage = self._slots.take(Pool.HIDDEN_READ_STAGE)
            staged: Resource = (Pool.HIDDEN_READ_STAGE, stage, 0, 0)
            yield edges.op(
                Kind.READ_HIDDEN, *where, reads=(source,), writes=(staged,), stage_slot=stage
            )
            source = staged
        yield edges.op(
            Kind.LOAD_HIDDEN,
            *where,
            reads=(source,),
            writes=(target,),
            hidden_slot=slot,
            stage_slot=stage,
        )

    def store_hidden(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Send a micro-batch's hidden home after a layer."""
        if not layer.leaves_hidden or self._homes.hidden_at_home(batch):
            return
        slot = self._slots.held(Pool.HIDDEN_SLOT, 0, batch.index)
        source: Resource = (Pool.HIDDEN_SLOT, slot, 0, 0)
        edges, where = self._edges, (step, layer.position, batch)
        if not self._plan.streams_to_device:
            yield edges.op(
                Kind.WRITE_HIDDEN,
                *where,
                reads=(source,),
                writes=(hidden_of(batch),),
                hidden_slot=slot,
            )
            return
        if self._homes.hidden(batch) == Tier.CPU:
            yield edges.op(
                Kind.STORE_HIDDEN,
                *where,
                reads=(source,),
                writes=(hidden_of(batch),),
                hidden_slot=slot,
            )
            return
        stage = self._slots.take(Pool.HIDDEN_WRITE_STAGE)
        staged: Resource = (Pool.HIDDEN_WRITE_STAGE, stage, 0, 0)
        yield edges.op(
            Kind.STORE_HIDDEN,
            *where,
            reads=(source,),
            writes=(staged,),
            hidden_slot=slot,
            stage_slot=stage,
        )
        yield edges.op(
            Kind.WRITE_HIDDEN, *where, reads=(staged,), writes=(hidden_of(batch),), stage_slot=stage
        )
