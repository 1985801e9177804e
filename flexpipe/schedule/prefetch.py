"""Which weights are loaded ahead, and into which slot.

Streamed layers are used in the order of the visits, which is known without any step: every slot but
the one in use holds, or awaits, one of the next layers. A visit may turn out to have no rows; its
loads are then left to the next visits, as far as those begin with the same layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from flexpipe.plan.layer import LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.plan.pools import NUM_STAGES
from flexpipe.schedule.edges import Edges
from flexpipe.schedule.op import Kind, Op, Pool, Resource
from flexpipe.schedule.slots import Ring

_Place = tuple[int, int]  # a visit, and a streamed layer's index in its chunk


class WeightLoads:
    """Loads of streamed layers, in the order of their use."""

    def __init__(self, plan: Plan, edges: Edges) -> None:
        self._plan = plan
        self._edges = edges
        self._num_slots = plan.num_weight_slots
        self._slots = Ring(max(1, plan.num_weight_slots))
        self._stages = Ring(NUM_STAGES)
        self._streamed = [
            tuple(layer for layer in chunk if layer.is_streamed) for chunk in plan.chunks
        ]
        self._loaded: deque[tuple[LayerPlan, int]] = deque()  # and not left yet, with their slots
        self._next: _Place = (0, 0)  # behind them
        self._empty: set[int] = set()  # visits to come that have no rows

    def first(self) -> Iterator[Op]:
        """Loads that precede the first step: as many as there are slots, less its own first one."""
        for _ in range(self._num_slots - self._plan.layers[-1].is_streamed):
            yield from self._load(0)

    def fill(self, step: int) -> Iterator[Op]:
        """Load into every slot that was left."""
        while len(self._loaded) < self._num_slots:
            yield from self._load(step)

    def slot(self, layer: LayerPlan) -> int:
        """Where the weights of `layer`, the one in use, lie."""
        loaded, slot = self._loaded[0]
        assert loaded is layer
        return slot

    def leave(self, layer: LayerPlan) -> None:
        """All micro-batches of a visit have passed `layer`."""
        if layer.is_streamed:
            self._loaded.popleft()

    def skip(self, visit: int) -> None:
        """`visit` has no rows, nor have later visits of its step."""
        pipeline = self._plan.pipeline
        later = range(visit, visit + pipeline.num_chunks * pipeline.num_blocks, pipeline.num_blocks)
        self._empty.discard(visit)
        if not self._chunk(visit):
            self._empty.update(later[1:])
        self._next = visit + 1, 0
        kept: deque[tuple[LayerPlan, int]] = deque()
        for layer, slot in self._loaded:
            wanted, behind = self._wanted()
            if wanted is not layer:
                self._slots.next_slot = slot
                break
            kept.append((layer, slot))
            self._next = behind
        self._loaded = kept

    def _chunk(self, visit: int) -> int:
        pipeline = self._plan.pipeline
        return visit // pipeline.num_blocks % pipeline.num_chunks

    def _wanted(self) -> tuple[LayerPlan, _Place]:
        """The next layer to load, and the place behind it."""
        visit, index = self._next
        while True:
            layers = self._streamed[self._chunk(visit)]
            if visit not in self._empty and index < len(layers):
                return layers[index], (visit, index + 1)
            visit, index = visit + 1, 0

    def _load(self, step: int) -> Iterator[Op]:
        layer, self._next = self._wanted()
        slot = self._slots.take()
        self._loaded.append((layer, slot))
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
            stage = self._stages.take()
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
