"""Order of work for one stage.

A schedule is plain data: ops in issue order, each naming what it waits for. It moves no tensor and
picks no stream. The issue order is a correct program by itself; an op's dependencies follow from
what it reads and writes (`flexpipe.schedule.edges`). Strategies add edges and never drop one, so
two runs of a plan may differ in time but not in tokens. Invariant: an op appears after everything
it waits for.

The blocks in flight take turns: a *round* is a step of each. A *visit* is one block's way through
one chunk of the stage's layers; in a round every block visits the first chunk, then every block the
next one. All ranks make the same visits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import count

from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.schedule.compute import Computations
from flexpipe.schedule.edges import Edges
from flexpipe.schedule.messages import Arrival, Arrivals, Messages
from flexpipe.schedule.moves import Homes, Moves, hidden_of, rows_of, tokens_of
from flexpipe.schedule.op import Kind, Op, Resource
from flexpipe.schedule.prefetch import WeightLoads
from flexpipe.schedule.slots import Slots
from flexpipe.schedule.step import MicroBatch

MicroBatches = Iterable[MicroBatch | None]
Steps = Callable[[int], MicroBatches | None]


def schedule(plan: Plan, steps: Steps) -> Iterator[Op | None]:
    """All ops of a job, step after step.

    `steps(index)` gives a step's micro-batches as they become known, with None for "not yet: a
    COMMIT is still out", or None instead of an iterator when the job is done. The schedule passes a
    None on, so that the dispatcher can wait. Weights of the next step's first layers are loaded
    before that step is known, since they do not depend on it.
    """
    builder = ScheduleBuilder(plan)
    yield from builder.first_weights()
    for number in count():
        goes_on = yield from builder.round(number, steps)
        if not goes_on:
            break
    yield from builder.last_arrivals()


class ScheduleBuilder:
    """Turns steps into ops."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pipeline = plan.pipeline
        self._edges = Edges(plan.policy.strategy)
        self._slots = Slots()
        self.homes = Homes(plan)
        self._weights = WeightLoads(plan, self._edges)
        self._messages = Messages(plan, self._edges, self._slots, self.homes)
        self._arrivals = Arrivals()
        self.moves = Moves(plan, self._edges, self._slots, self.homes)
        self._computations = Computations(plan, self._edges, self._slots, self.homes, self._weights)

    def first_weights(self) -> Iterator[Op]:
        """Loads that precede the first step."""
        yield from self._weights.first()
        yield from self._edges.end_of_layer(0, 0)

    def round(self, number: int, steps: Steps) -> Generator[Op | None, None, bool]:
        """A step of each block; returns whether the job goes on."""
        yield from self._drain(number)
        first = number * self._pipeline.num_blocks
        indices = range(first, first + self._pipeline.num_blocks)
        formed: dict[int, tuple[MicroBatch, ...]] = {}
        for index in indices:
            micro_batches = steps(index)
            if micro_batches is None:
                break
            formed[index] = yield from self.visit(index, 0, micro_batches)
        for index in indices[len(formed) :]:
            self._weights.skip(self._number(index, 0))
        for chunk in range(1, self._pipeline.num_chunks):
            for index in indices:
                yield from self.visit(index, chunk, formed.get(index, ()))
        return len(formed) == len(indices)

    def visit(
        self, step: int, chunk: int, micro_batches: MicroBatches
    ) -> Generator[Op | None, None, tuple[MicroBatch, ...]]:
        """A step's way through a chunk; returns its micro-batches that have rows."""
        number = self._number(step, chunk)
        yield from self._arrive(number - self._pipeline.num_blocks)
        work = _Work(self, step)
        first, *later = self._layers_to_visit(chunk)
        batches: list[MicroBatch] = []
        yield from self._weights.fill(step)
        for batch in micro_batches:
            if batch is None:
                yield None
                continue
            batches.append(batch)
            yield from work.iteration(first, batch, None)
        if not batches:
            self._weights.skip(number)
            yield from self._arrive_before_sends(number)
            return ()
        yield from self._leave(step, first)
        for layers in self._uninterrupted(later):
            if layers[0].kind == LayerKind.SEND:
                yield from self._arrive_before_sends(number)
            pairs = [(layer, batch) for layer in layers for batch in batches]
            for (layer, batch), following in zip(pairs, [*pairs[1:], None], strict=True):
                if batch is batches[0]:
                    yield from self._weights.fill(step)
                yield from work.iteration(layer, batch, following)
                if batch is batches[-1]:
                    yield from self._leave(step, layer)
        yield from self._hand_over(step, chunk, tuple(batches))
        return tuple(batches)

    def last_arrivals(self) -> Iterator[Op]:
        """What the first rank has yet to receive when no step follows."""
        yield from self._arrive(None)

    def _number(self, step: int, chunk: int) -> int:
        """Which of all visits this is."""
        blocks, chunks = self._pipeline.num_blocks, self._pipeline.num_chunks
        return (step // blocks * chunks + chunk) * blocks + step % blocks

    def _layers_to_visit(self, chunk: int) -> tuple[LayerPlan, ...]:
        """What comes to the first rank from the last was received before."""
        layers = self._plan.chunks[chunk]
        return layers[1:] if self._plan.embeds and chunk else layers

    def _uninterrupted(self, layers: Sequence[LayerPlan]) -> list[Sequence[LayerPlan]]:
        """The same in pieces between which something may arrive, which takes slots of its own."""
        if not self._plan.embeds or not self._pipeline.is_cut:
            return [layers]
        return [piece for piece in (layers[:-1], layers[-1:]) if piece]

    def _leave(self, step: int, layer: LayerPlan) -> Iterator[Op]:
        self._weights.leave(layer)
        yield from self._edges.end_of_layer(step, layer.position)

    def _hand_over(self, step: int, chunk: int, batches: tuple[MicroBatch, ...]) -> Iterator[Op]:
        """Tokens of a step that is done go to the first rank, which knows what will come to it."""
        if not self._pipeline.is_cut:
            return
        leads = self._plan.config.shard.is_first
        if self._plan.has_head and chunk + 1 == self._pipeline.num_chunks and leads:
            yield self._messages.send_tokens(step, self._plan.layers[-1], batches)
        if self._plan.embeds:
            self._arrivals.expect(Arrival(self._number(step, chunk), step, chunk, batches))

    def _arrive_before_sends(self, visit: int) -> Iterator[Op]:
        """What the first rank must have received before it sends at `visit`."""
        yield from self._arrive(visit - self._pipeline.num_stages + 1)

    def _arrive(self, visit: int | None) -> Iterator[Op]:
        """Receive what the last rank sends up to `visit`, or all that is still to come."""
        for arrival in self._arrivals.due(visit):
            step, batches = arrival.step, arrival.batches
            if arrival.chunk + 1 < self._pipeline.num_chunks:
                layer = self._plan.chunks[arrival.chunk + 1][0]
                for batch in batches:
                    yield from _Work(self, step).iteration(layer, batch, None)
                continue
            if not self._plan.config.shard.is_first:
                continue  # tokens go from the first shard to the first shard
            last = self._plan.layers[-1]
            yield self._messages.receive_tokens(step, last, batches)
            for batch in batches:
                yield self._commit(step, last, batch, (tokens_of(batch),))

    def _drain(self, number: int) -> Iterator[Op]:
        """Unless overlap is all there is to a strategy, a round begins when all tokens are back."""
        if self._plan.policy.strategy == "event" or not self._arrivals.pending:
            return
        yield from self._arrive(None)
        yield from self._edges.end_of_layer(number * self._pipeline.num_blocks, 0)

    # the pieces of an iteration, called by _Work

    def compute(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        """A layer for a micro-batch; after the last slice of the head, its tokens."""
        if layer.kind == LayerKind.RECEIVE:
            yield self._messages.receive_hidden(step, layer, batch)
            return
        if layer.kind == LayerKind.SEND:
            yield self._messages.send_hidden(step, layer, batch)
            return
        if layer.kind == LayerKind.HEAD and not batch.num_sampled:
            if self._commits_after(layer):  # chunks of prompts: nothing to sample
                yield self._commit(step, layer, batch, (hidden_of(batch),))
            return
        yield from self._computations.layer(step, layer, batch)
        if layer is self._plan.layers[-1] and self._plan.config.shard.is_first:
            yield from self._computations.sample(step, layer, batch)
            if self._commits_after(layer):
                yield self._commit(step, layer, batch, (tokens_of(batch),))

    def _commits_after(self, layer: LayerPlan) -> bool:
        """Whether a micro-batch's step ends with `layer`, here and not on the first rank."""
        ends_here = self._plan.config.shard.is_first and not self._pipeline.is_cut
        return ends_here and layer is self._plan.layers[-1]

    def _commit(
        self, step: int, layer: LayerPlan, batch: MicroBatch, reads: tuple[Resource, ...]
    ) -> Op:
        writes = (rows_of(batch),)
        return self._edges.op(Kind.COMMIT, step, layer.position, batch, reads=reads, writes=writes)

    def barrier(self, step: int, layer: LayerPlan) -> Iterator[Op]:
        """What the strategy puts after each (layer, micro-batch)."""
        return self._edges.end_of_iteration(step, layer.position)


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
        moves = build.moves
        if layer.kind == LayerKind.EMBED:
            yield from moves.load_embed(step, layer, batch)
        yield from self._store_before()
        if not self._cache_loaded:
            yield from self._load_cache(layer, batch)
        if not self._hidden_loaded:
            yield from moves.load_hidden(step, layer, batch)
        self._cache_loaded = self._hidden_loaded = False
        if following is not None:
            yield from self._load_cache(*following)
            self._cache_loaded = True
            if following[1] is not batch:
                yield from moves.load_hidden(step, *following)
                self._hidden_loaded = True
        yield from build.compute(step, layer, batch)
        self._to_store = (layer, batch)
        self._hidden_stored = not self._hidden_loaded
        if self._hidden_stored:
            yield from moves.store_hidden(step, layer, batch)
        yield from build.barrier(step, layer)

    def _store_before(self) -> Iterator[Op]:
        if self._to_store is None:
            return
        layer, batch = self._to_store
        if not self._hidden_stored:
            yield from self._builder.moves.store_hidden(self._index, layer, batch)
        if layer.has_kv_cache and self._builder.homes.uses_kv_slot(batch):
            yield from self._builder.moves.store_cache(self._index, layer, batch)

    def _load_cache(self, layer: LayerPlan, batch: MicroBatch) -> Iterator[Op]:
        if layer.has_kv_cache and self._builder.homes.uses_kv_slot(batch):
            yield from self._builder.moves.load_cache(self._index, layer, batch)
