"""Order of work for one stage.

A schedule is plain data: ops in issue order, each naming what it waits for. It moves no tensor and
picks no stream. The issue order is a correct program by itself; an op's dependencies follow from
what it reads and writes: *produced* (it reads what an earlier op wrote) and *freed* (it overwrites
what an earlier op used). That a COMMIT makes the rows of a micro-batch's next step *known* is a
third kind: the job cannot name them sooner, so this tells a dispatcher nothing new, but a checker
and a simulator. A dependency that another one already implies is left out. Strategies add edges
and never drop one, so two runs of a plan may differ in time but not in tokens. Invariant: an op
appears after everything it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.plan import (
    NUM_ATTENTION_SLOTS,
    NUM_EMBED_SLOTS,
    NUM_HIDDEN_SLOTS,
    NUM_KV_SLOTS,
    NUM_STAGES,
    Plan,
)
from flexpipe.plan.tier import Tier
from flexpipe.schedule.op import Kind, Op, Pool, Resource, Segment, Wait
from flexpipe.schedule.step import MicroBatch, Row

# ops further back than this are looked up no more when edges are reduced; an extra edge is harmless
_WINDOW = 4096
_WINDOW_MASK = (1 << _WINDOW) - 1

MicroBatches = Iterable[MicroBatch | None]


def schedule(plan: Plan, steps: Callable[[int], MicroBatches | None]) -> Iterator[Op | None]:
    """All ops of a job, step after step.

    `steps(index)` gives a step's micro-batches as they become known, with None for "not yet: a
    COMMIT is still out", or None instead of an iterator when the job is done. The schedule passes a
    None on, so that the dispatcher can wait. Weights of the next step's first layers are loaded
    before that step is known, since they do not depend on it.
    """
    builder = ScheduleBuilder(plan)
    yield from builder.first_weights()
    index = 0
    while (micro_batches := steps(index)) is not None:
        yield from builder.step(index, micro_batches)
        index += 1


@dataclass(slots=True)
class _Ring:
    """Slots of one pool, handed out in turn."""

    num_slots: int
    next_slot: int = 0

    def take(self) -> int:
        slot = self.next_slot
        self.next_slot = (slot + 1) % self.num_slots
        return slot


class ScheduleBuilder:
    """Turns steps into ops; remembers who last wrote and read each resource."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._edges = _Edges(plan.policy.strategy)
        sizes = {
            Pool.WEIGHT_SLOT: max(1, plan.num_weight_slots),
            Pool.KV_SLOT: NUM_KV_SLOTS,
            Pool.HIDDEN_SLOT: NUM_HIDDEN_SLOTS,
            Pool.EMBED_SLOT: NUM_EMBED_SLOTS,
            Pool.ATTENTION_SLOT: NUM_ATTENTION_SLOTS,
        }
        self._rings = {pool: _Ring(sizes.get(pool, NUM_STAGES)) for pool in Pool}
        self._in_use: dict[tuple[Pool, int, int], int] = {}
        self._ahead = _loads_ahead(plan)
        self._has_begun = False  # the current step's first load ahead was made
        self._homes: dict[tuple[int, bool], tuple[MicroBatch, frozenset[Tier]]] = {}

    def _take(self, pool: Pool, layer: int = 0, mb: int = 0) -> int:
        """The pool's next slot, remembered for the ops of (layer, micro-batch) that use it."""
        slot = self._in_use[pool, layer, mb] = self._rings[pool].take()
        return slot

    def first_weights(self) -> Iterator[Op]:
        """Loads that precede the first step: as many as there are slots, less its own first one."""
        for layer in self._plan.streamed_layers[: self._plan.num_weight_slots]:
            if layer is not self._ahead.get(0):
                yield from self._load_weights(0, layer)
        yield from self._edges.end_of_layer(0, 0)

    def step(self, index: int, micro_batches: MicroBatches) -> Iterator[Op | None]:
        """One trip through the layers; micro-batches without rows do not appear."""
        work = _Work(self, index)
        batches: list[MicroBatch] = []
        first, *later = self._plan.layers
        if not self._has_begun:  # a step without rows leaves its load to the next
            yield from self._load_ahead(index, first)
            self._has_begun = True
        for batch in micro_batches:
            if batch is None:
                yield None
                continue
            batches.append(batch)
            yield from work.iteration(first, batch, None)
        if not batches:
            return
        self._has_begun = False
        yield from self._edges.end_of_layer(index, first.position)
        pairs = [(layer, batch) for layer in later for batch in batches]
        for (layer, batch), following in zip(pairs, [*pairs[1:], None], strict=True):
            if batch is batches[0]:
                yield from self._load_ahead(index, layer)
            yield from work.iteration(layer, batch, following)
            if batch is batches[-1]:
                yield from self._edges.end_of_layer(index, layer.position)

    def _load_ahead(self, step: int, here: LayerPlan) -> Iterator[Op]:
        ahead = self._ahead.get(here.position)
        if ahead is not None:
            yield from self._load_weights(step, ahead)

    def _load_weights(self, step: int, layer: LayerPlan) -> Iterator[Op]:
        slot = self._take(Pool.WEIGHT_SLOT, layer.position)
        target: Resource = (Pool.WEIGHT_SLOT, slot, 0, 0)
        edges, position = self._edges, layer.position
        if not self._plan.streams_to_device:
            yield edges.op(
                Kind.READ_WEIGHT, step, position, None, writes=(target,), weight_slot=slot
            )
            return
        stage: int | None = None
        staged: tuple[Resource, ...] = ()
        if layer.reads_disk:
            stage = self._take(Pool.WEIGHT_STAGE)
            staged = ((Pool.WEIGHT_STAGE, stage, 0, 0),)
            yield edges.op(Kind.READ_WEIGHT, step, position, None, writes=staged, stage_slot=stage)
        yield edges.op(
            Kind.LOAD_WEIGHT,
            step,
            position,
            None,
            reads=staged,
            writes=(target,),
            weight_slot=slot,
            stage_slot=stage,
        )

    # the pieces of an iteration, called by _Work

    def load_embed(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Fetch the embedding rows a micro-batch needs; `embed_slot` tells where they went."""
        if not self._plan.embed_streams:
            return
        slot = self._take(Pool.EMBED_SLOT, mb=batch.index)
        target: Resource = (Pool.EMBED_SLOT, slot, 0, 0)
        edges, where = self._edges, (step, layer.position, batch)
        rows = _rows(batch)
        if not self._plan.streams_to_device:
            yield edges.op(
                Kind.READ_EMBED, *where, reads=(rows,), writes=(target,), embed_slot=slot
            )
            return
        stage = self._take(Pool.EMBED_STAGE)
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
        slot = self._take(Pool.KV_SLOT, layer.position, batch.index)
        target: Resource = (Pool.KV_SLOT, slot, 0, 0)
        tiers = self._tiers(batch, with_past=True)
        edges, where = self._edges, (step, layer.position, batch)
        if not self._plan.streams_to_device:
            if Tier.DISK in tiers:
                yield edges.op(
                    Kind.READ_CACHE,
                    *where,
                    reads=(_kv(layer, batch, Tier.DISK), _rows(batch)),
                    writes=(target,),
                    kv_slot=slot,
                )
            return
        stage: int | None = None
        sources: list[Resource] = []
        if Tier.DISK in tiers:
            stage = self._take(Pool.KV_READ_STAGE)
            sources.append((Pool.KV_READ_STAGE, stage, 0, 0))
            yield edges.op(
                Kind.READ_CACHE,
                *where,
                reads=(_kv(layer, batch, Tier.DISK), _rows(batch)),
                writes=(sources[0],),
                stage_slot=stage,
            )
        if Tier.CPU in tiers:
            sources.append(_kv(layer, batch, Tier.CPU))
        if sources:
            yield edges.op(
                Kind.LOAD_CACHE,
                *where,
                reads=(*sources, _rows(batch)),
                writes=(target,),
                kv_slot=slot,
                stage_slot=stage,
            )

    def store_cache(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """Send new tokens' keys and values home."""
        slot = self._in_use[Pool.KV_SLOT, layer.position, batch.index]
        source: Resource = (Pool.KV_SLOT, slot, 0, 0)
        tiers = self._tiers(batch, with_past=False)
        edges, where = self._edges, (step, layer.position, batch)
        on_disk = _kv(layer, batch, Tier.DISK)
        if not self._plan.streams_to_device:
            if Tier.DISK in tiers:
                yield edges.op(
                    Kind.WRITE_CACHE, *where, reads=(source,), writes=(on_disk,), kv_slot=slot
                )
            return
        stage: int | None = None
        targets: list[Resource] = []
        if Tier.CPU in tiers:
            targets.append(_kv(layer, batch, Tier.CPU))
        if Tier.DISK in tiers:
            stage = self._take(Pool.KV_WRITE_STAGE)
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
        if not layer.takes_hidden or self._hidden_at_home(batch):
            return
        if layer.kind == LayerKind.HEAD and not batch.num_sampled:
            return
        slot = self._take(Pool.HIDDEN_SLOT, mb=batch.index)
        target: Resource = (Pool.HIDDEN_SLOT, slot, 0, 0)
        source = _hidden(batch)
        edges, where = self._edges, (step, layer.position, batch)
        if not self._plan.streams_to_device:
            yield edges.op(
                Kind.READ_HIDDEN, *where, reads=(source,), writes=(target,), hidden_slot=slot
            )
            return
        stage: int | None = None
        if self._hidden_home(batch) == Tier.DISK:
            stage = self._take(Pool.HIDDEN_READ_STAGE)
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
        if not layer.leaves_hidden or self._hidden_at_home(batch):
            return
        slot = self._in_use[Pool.HIDDEN_SLOT, 0, batch.index]
        source: Resource = (Pool.HIDDEN_SLOT, slot, 0, 0)
        edges, where = self._edges, (step, layer.position, batch)
        if not self._plan.streams_to_device:
            yield edges.op(
                Kind.WRITE_HIDDEN,
                *where,
                reads=(source,),
                writes=(_hidden(batch),),
                hidden_slot=slot,
            )
            return
        if self._hidden_home(batch) == Tier.CPU:
            yield edges.op(
                Kind.STORE_HIDDEN,
                *where,
                reads=(source,),
                writes=(_hidden(batch),),
                hidden_slot=slot,
            )
            return
        stage = self._take(Pool.HIDDEN_WRITE_STAGE)
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
            Kind.WRITE_HIDDEN, *where, reads=(staged,), writes=(_hidden(batch),), stage_slot=stage
        )

    def compute(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """A layer for a micro-batch; after the last slice of the head, its tokens."""
        if layer.kind == LayerKind.HEAD and not batch.num_sampled:
            if layer is self._plan.layers[-1]:  # chunks of prompts: nothing to sample
                yield self._commit(step, layer, batch, (_hidden(batch),))
            return
        if layer.has_kv_cache and self._rows_on_cpu(batch):
            yield from self._compute_apart(step, layer, batch)
            return
        reads: list[Resource] = []
        writes: list[Resource] = []
        kv_slot = hidden_slot = embed_slot = None
        weight_slot = self._use_weights(layer, reads)
        if layer.kind == LayerKind.EMBED:
            reads.append(_rows(batch))
            if self._plan.embed_streams:
                embed_slot = self._in_use[Pool.EMBED_SLOT, 0, batch.index]
                reads.append((Pool.EMBED_SLOT, embed_slot, 0, 0))
        if layer.has_kv_cache:
            kv_slot = self._use_cache(layer, batch, writes)
        if layer.takes_hidden or layer.leaves_hidden:
            hidden_slot = self._use_hidden(layer, batch, writes if layer.leaves_hidden else reads)
        if layer.kind == LayerKind.HEAD:
            self._use_head(layer, batch, reads, writes)
        yield self._edges.op(
            Kind.COMPUTE,
            step,
            layer.position,
            batch,
            reads=tuple(reads),
            writes=tuple(writes),
            weight_slot=weight_slot,
            kv_slot=kv_slot,
            hidden_slot=hidden_slot,
            embed_slot=embed_slot,
        )
        if layer is self._plan.layers[-1]:
            yield from self._tokens(step, layer, batch)

    def _compute_apart(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """A layer in segments: queries of some rows go to the CPU while the others attend here."""
        where = (step, layer.position, batch)
        slot, stage = self._take(Pool.ATTENTION_SLOT), self._take(Pool.QUERY_STAGE)
        here: Resource = (Pool.ATTENTION_SLOT, slot, 0, 0)
        leaving: Resource = (Pool.ATTENTION_SLOT, slot, 1, 0)
        staged: Resource = (Pool.QUERY_STAGE, stage, 0, 0)
        weights: list[Resource] = []
        cache: list[Resource] = []
        hidden: list[Resource] = []
        compute = partial(
            self._edges.op,
            Kind.COMPUTE,
            *where,
            weight_slot=self._use_weights(layer, weights),
            kv_slot=self._use_cache(layer, batch, cache),
            hidden_slot=self._use_hidden(layer, batch, hidden),
            attention_slot=slot,
        )
        move = partial(self._edges.op, stage_slot=stage, attention_slot=slot)
        made = (*cache, here, leaving)
        yield compute(reads=(*weights, *hidden), writes=made, segment=Segment.QKV)
        yield move(Kind.MOVE_QUERY, *where, reads=(leaving,), writes=(staged,))
        yield move(Kind.ATTEND_CPU, *where, writes=(_kv(layer, batch, Tier.CPU), staged))
        if cache:
            yield compute(reads=tuple(cache), writes=(here,), segment=Segment.ATTEND)
        yield move(Kind.MOVE_OUTPUT, *where, reads=(staged,), writes=(leaving,))
        done = (here, leaving, *hidden)
        yield compute(reads=tuple(weights), writes=done, segment=Segment.OUT)

    def _use_weights(self, layer: LayerPlan, accesses: list[Resource]) -> int | None:
        """The slot that a streamed layer's weights lie in."""
        if not layer.is_streamed:
            return None
        slot = self._in_use[Pool.WEIGHT_SLOT, layer.position, 0]
        accesses.append((Pool.WEIGHT_SLOT, slot, 0, 0))
        return slot

    def _use_cache(
        self, layer: LayerPlan, batch: MicroBatch, accesses: list[Resource]
    ) -> int | None:
        """Where attention on the device finds keys and values; the slot that some pass through."""
        tiers = self._tiers(batch, with_past=False)
        if self._plan.device_tier in tiers:
            accesses.append(_kv(layer, batch, self._plan.device_tier))
        if not tiers - {self._plan.device_tier}:
            return None
        kv_slot = self._in_use[Pool.KV_SLOT, layer.position, batch.index]
        accesses.append((Pool.KV_SLOT, kv_slot, 0, 0))
        return kv_slot

    def _use_hidden(
        self, layer: LayerPlan, batch: MicroBatch, accesses: list[Resource]
    ) -> int | None:
        if self._hidden_at_home(batch):
            accesses.append(_hidden(batch))
            return None
        if layer.kind == LayerKind.EMBED:
            self._take(Pool.HIDDEN_SLOT, mb=batch.index)
        slot = self._in_use[Pool.HIDDEN_SLOT, 0, batch.index]
        accesses.append((Pool.HIDDEN_SLOT, slot, 0, 0))
        return slot

    def _use_head(
        self, layer: LayerPlan, batch: MicroBatch, reads: list[Resource], writes: list[Resource]
    ) -> None:
        head_input: Resource = (Pool.HEAD_INPUT, batch.index, 0, 0)
        (writes if layer.takes_hidden else reads).append(head_input)
        writes.append(self._logits(batch))

    def _tokens(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        edges, where = self._edges, (step, layer.position, batch)
        tokens: Resource = (Pool.TOKENS, batch.index, 0, 0)
        fetched: Resource = (Pool.HOST_TOKENS, batch.index, 0, 0)
        yield edges.op(Kind.SAMPLE, *where, reads=(self._logits(batch),), writes=(tokens,))
        yield edges.op(Kind.FETCH_TOKENS, *where, reads=(tokens,), writes=(fetched,))
        yield self._commit(step, layer, batch, (fetched,))

    def _commit(
        self, step: int, layer: LayerPlan, batch: MicroBatch, reads: tuple[Resource, ...]
    ) -> Op:
        writes = (_rows(batch),)
        return self._edges.op(Kind.COMMIT, step, layer.position, batch, reads=reads, writes=writes)

    def _logits(self, batch: MicroBatch) -> Resource:
        shared = self._plan.num_logits == 1
        return (Pool.LOGITS, 0 if shared else batch.index, 0, 0)

    def _hidden_home(self, batch: MicroBatch) -> Tier:
        return self._plan.micro_batches[batch.index].hidden_home

    def _hidden_at_home(self, batch: MicroBatch) -> bool:
        return self._hidden_home(batch) == self._plan.device_tier

    def _tiers(self, batch: MicroBatch, *, with_past: bool) -> frozenset[Tier]:
        """KV homes of the rows that have tokens behind them, or of those that get new ones.

        Rows that attend on the CPU are not among them: their cache stays where it is.
        """
        known = self._homes.get((batch.index, with_past))
        if known is None or known[0] is not batch:
            homes = self._plan.micro_batches[batch.index].kv_homes
            tiers = frozenset(
                homes[row.place]
                for row in batch.rows
                if row.num_new and (row.num_context or not with_past)
                if not self._on_cpu(batch, row)
            )
            known = self._homes[batch.index, with_past] = batch, tiers
        return known[1]

    def _on_cpu(self, batch: MicroBatch, row: Row) -> bool:
        return self._plan.row_attends_on_cpu(batch.index, row.place, row.num_new)

    def _rows_on_cpu(self, batch: MicroBatch) -> bool:
        return self._plan.attends_on_cpu and any(self._on_cpu(batch, row) for row in batch.rows)

    def uses_kv_slot(self, batch: MicroBatch) -> bool:
        """Whether any of its rows' KV cache passes through a slot."""
        return bool(self._tiers(batch, with_past=False) - {self._plan.device_tier})

    def barrier(self, step: int, layer: LayerPlan) -> Iterator[Op]:
        """What the strategy puts after each (layer, micro-batch)."""
        return self._edges.end_of_iteration(step, layer.position)


def _loads_ahead(plan: Plan) -> dict[int, LayerPlan]:
    """Position -> the layer whose weights are loaded from there on, in the slot that the streamed
    layer right before has left. Where the last layer streams, position 0 loads for its own step."""
    streamed = plan.streamed_layers
    return {
        (left.position + 1) % len(plan.layers): streamed[
            (index + plan.num_weight_slots) % len(streamed)
        ]
        for index, left in enumerate(streamed)
    }


class _Work:
    """The iterations of one step: one layer for one micro-batch each, software-pipelined.

    Around COMPUTE(j, k) stand the stores of the micro-batch before and the loads of the one after,
    so that a strategy with barriers still overlaps them. Where the next micro-batch is not known
    yet, or is the same one again, its hidden is loaded right before and stored right after.
    """

    def __init__(self, builder: ScheduleBuilder, index: int) -> None:
        self._builder = builder
        self._index = index
        self._to_store: tuple[LayerPlan, MicroBatch] | None = None
        self._hidden_stored = self._hidden_loaded = self._cache_loaded = False

    def iteration(
        self, layer: LayerPlan, batch: MicroBatch, following: tuple[LayerPlan, MicroBatch] | None
    ) -> Iterator[Op]:
        build, step = self._builder, self._index
        if layer.kind == LayerKind.EMBED:
            yield from build.load_embed(step, layer, batch)
        yield from self._store_before()
        if not self._cache_loaded:
            yield from self._load_cache(layer, batch)
        if not self._hidden_loaded:
            yield from build.load_hidden(step, layer, batch)
        self._cache_loaded = self._hidden_loaded = False
        if following is not None:
            yield from self._load_cache(*following)
            self._cache_loaded = True
            if following[1] is not batch:
                yield from build.load_hidden(step, *following)
                self._hidden_loaded = True
        yield from build.compute(step, layer, batch)
        self._to_store = (layer, batch)
        self._hidden_stored = not self._hidden_loaded
        if self._hidden_stored:
            yield from build.store_hidden(step, layer, batch)
        yield from build.barrier(step, layer)

    def _store_before(self) -> Iterator[Op]:
        if self._to_store is None:
            return
        layer, batch = self._to_store
        if not self._hidden_stored:
            yield from self._builder.store_hidden(self._index, layer, batch)
        if layer.has_kv_cache and self._builder.uses_kv_slot(batch):
            yield from self._builder.store_cache(self._index, layer, batch)

    def _load_cache(self, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        if layer.has_kv_cache and self._builder.uses_kv_slot(batch):
            yield from self._builder.load_cache(self._index, layer, batch)


class _Edges:
    """Names ops, derives what they wait for, and adds the strategy's barriers."""

    def __init__(self, strategy: str) -> None:
        self._strategy = strategy
        self._next_id = 0
        self._writer: dict[Resource, int] = {}
        self._readers: dict[Resource, list[int]] = {}
        self._ancestors: dict[int, int] = {}  # bit i: op (own id - 1 - i) comes before
        self._iteration: list[int] = []  # cache, hidden and compute ops since the last barrier
        self._weights: list[int] = []  # weight ops since the last barrier per layer
        self._barrier: int | None = None

    def op(
        self,
        kind: Kind,
        step: int,
        layer: int,
        batch: MicroBatch | None,
        *,
        reads: tuple[Resource, ...] = (),
        writes: tuple[Resource, ...] = (),
        weight_slot: int | None = None,
        kv_slot: int | None = None,
        hidden_slot: int | None = None,
        embed_slot: int | None = None,
        stage_slot: int | None = None,
        attention_slot: int | None = None,
        segment: Segment | None = None,
    ) -> Op:
        """The next op, waiting for what its accesses demand and the strategy adds."""
        made = self._name()
        waits = self._reduced(made, self._needs(made, reads, writes))
        weights = kind in (Kind.READ_WEIGHT, Kind.LOAD_WEIGHT)
        (self._weights if weights else self._iteration).append(made)
        return Op(
            made, kind, step, layer, batch, waits, reads, writes,
            weight_slot, kv_slot, hidden_slot, embed_slot, stage_slot, attention_slot, segment,
        )  # fmt: skip

    def end_of_iteration(self, step: int, layer: int) -> Iterator[Op]:
        """`multi` waits here for all but weight loads."""
        if self._strategy == "multi":
            yield from self._barrier_after(step, layer, self._iteration)

    def end_of_layer(self, step: int, layer: int) -> Iterator[Op]:
        """`single` and `multi` wait here for everything."""
        if self._strategy in ("single", "multi"):
            yield from self._barrier_after(step, layer, [*self._iteration, *self._weights])
            self._weights.clear()

    def _barrier_after(self, step: int, layer: int, ops: list[int]) -> Iterator[Op]:
        if not ops:
            return
        made = self._name()
        waits = self._reduced(made, [Wait(op, "strategy") for op in ops])
        self._barrier = made
        self._iteration.clear()
        yield Op(made, Kind.BARRIER, step, layer, None, waits)

    def _name(self) -> int:
        made = self._next_id
        self._next_id += 1
        return made

    def _needs(
        self, made: int, reads: tuple[Resource, ...], writes: tuple[Resource, ...]
    ) -> list[Wait]:
        """True dependencies of an access list, and the new state of what it touches."""
        waits = []
        for resource in reads:
            writer = self._writer.get(resource)
            if writer is not None:
                why = "known" if resource[0] == Pool.ROWS else "produced"
                waits.append(Wait(writer, f"{why}:{resource[0].value}"))
            self._readers.setdefault(resource, []).append(made)
        for resource in writes:
            readers = self._readers.pop(resource, ())
            waits += [Wait(op, f"freed:{resource[0].value}") for op in readers if op != made]
            writer = self._writer.get(resource)
            if writer is not None:
                waits.append(Wait(writer, f"produced:{resource[0].value}"))
            self._writer[resource] = made
        if self._strategy == "none" and made:
            waits.append(Wait(made - 1, "strategy"))
        if self._barrier is not None:
            waits.append(Wait(self._barrier, "strategy"))
        return waits

    def _reduced(self, made: int, waits: list[Wait]) -> tuple[Wait, ...]:
        """Drop what a later op waited for already implies (transitive reduction)."""
        kept, known = [], 0
        reasons: dict[int, str] = {op: why for op, why in waits if why.startswith("known:")}
        for op, why in waits:
            if reasons.get(op, "").startswith("known:"):
                continue  # nothing else needs to be said: such an op cannot come sooner
            told = reasons.get(op, "")
            if why not in told.split("+"):
                reasons[op] = f"{told}+{why}" if told else why
        for wait in (Wait(op, reasons[op]) for op in sorted(reasons, reverse=True)):
            distance = made - wait.op
            if known >> (distance - 1) & 1:
                continue
            kept.append(wait)
            known |= 1 << (distance - 1)
            known |= self._ancestors.get(wait.op, 0) << distance
        self._ancestors[made] = known & _WINDOW_MASK
        self._ancestors.pop(made - _WINDOW, None)
        return tuple(kept)


def _rows(batch: MicroBatch) -> Resource:
    return (Pool.ROWS, batch.index, 0, 0)


def _kv(layer: LayerPlan, batch: MicroBatch, tier: Tier) -> Resource:
    return (Pool.KV, tier.value, layer.position, batch.index)


def _hidden(batch: MicroBatch) -> Resource:
    return (Pool.HIDDEN, batch.index, 0, 0)
