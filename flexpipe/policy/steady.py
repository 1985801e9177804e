"""What one more step takes in the steady state, told from a few layers.

A stage plays equal steps, one of each block in flight in turn, with few of its decoder layers and
with some more: what a step adds, and what a layer adds to it, are differences. A stage of a
pipeline plays alone: messages take their time, and nobody waits for another rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flexpipe.plan.layer import LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.policy.cost import CostModel
from flexpipe.schedule.build import schedule
from flexpipe.schedule.op import Kind
from flexpipe.schedule.simulate import COMPUTING, simulate
from flexpipe.schedule.step import MicroBatch

_ROUNDS = 2  # the first fills the lanes, the second tells what one more takes
_MOST_BLOCKS = 3  # of a round; more tell nothing new
_ENDS = {
    Kind.COMPUTE,
    Kind.SAMPLE,
    Kind.FETCH_TOKENS,
    Kind.SEND_HIDDEN,
    Kind.SEND_TOKENS,
    Kind.COMMIT,
}


class Steady(NamedTuple):
    """What a step adds; how much longer its layers compute beside what else goes on than alone;
    and the ops that were played to know."""

    seconds: float
    stretch: float
    num_ops: int


class Thinned(NamedTuple):
    """A stage with few of its decoder layers, and with some more."""

    few: Plan
    more: Plan

    @classmethod
    def of(cls, plan: Plan, few: int, more: int) -> Thinned:
        """So many in all, dealt to its chunks. They lie next to each other, what there is more of
        them behind, and are those whose homes are most like those of all, for which they stand."""
        chunks = [decoders_in(chunk) for chunk in plan.chunks]
        if sum(map(len, chunks)) <= more:
            return cls(plan, plan)
        kept_few, kept_more = set[int](), set[int]()
        for chunk, decoders in zip(plan.chunks, chunks, strict=True):
            num_more = min(len(decoders), max(1, round(more / len(chunks))))
            num_few = min(num_more, max(1, round(few / len(chunks))))
            first = _typical(chunk, decoders, num_few, num_more)
            kept_few.update(decoders[first : first + num_few])
            kept_more.update(decoders[first : first + num_more])
        return cls(_only(plan, kept_few), _only(plan, kept_more))


def num_steps_played(plan: Plan) -> int:
    """Steps that are played to know one."""
    return _ROUNDS * min(_MOST_BLOCKS, plan.pipeline.num_blocks)


def steady_step(costs: CostModel, thin: Thinned, step: Mapping[int, MicroBatch]) -> Steady:
    """One more step like those before it, of all layers."""
    few, more = (_again(costs, plan, step) for plan in thin)
    num_few, num_more = (len(decoders_in(plan.layers)) for plan in thin)
    if num_more == num_few:
        return more
    factor = (len(decoders_in(costs.plan.layers)) - num_more) / (num_more - num_few)
    seconds = more.seconds + factor * (more.seconds - few.seconds)
    return Steady(seconds, more.stretch, few.num_ops + more.num_ops)


def decoders_in(layers: Iterable[LayerPlan]) -> list[int]:
    """Decoder layers of which there are parts among `layers`, ascending."""
    return sorted({layer.layer for layer in layers if layer.layer is not None})


def _again(costs: CostModel, plan: Plan, step: Mapping[int, MicroBatch]) -> Steady:
    """What a step takes in the second of two rounds of equal ones."""
    script = _Script(plan, step)
    made = simulate(
        schedule(plan, script.steps),
        CostModel(plan, costs.profile, costs.emulation, averaged=True),
        costs.profile.pace,
        on_commit=script.commit,
        keep_spans=True,
    )
    ends_s = [0.0] * _ROUNDS
    for span in made.spans:
        if span.op.kind in _ENDS and span.op.step < script.num_steps:
            played = span.op.step // script.num_blocks
            ends_s[played] = max(ends_s[played], span.end_s)
    seconds = (ends_s[1] - ends_s[0]) / script.num_blocks
    alone_s = max(made.work_s[lane] for lane in COMPUTING)
    return Steady(seconds, made.active_s / alone_s, sum(made.num_ops.values()))


class _Script:
    """The step as each of some blocks would make it, in two rounds.

    Where tokens come back from another stage nobody waits for them: they are there when the block
    has its turn again.
    """

    def __init__(self, plan: Plan, step: Mapping[int, MicroBatch]) -> None:
        self.num_blocks = min(_MOST_BLOCKS, plan.pipeline.num_blocks)
        self.num_steps = _ROUNDS * self.num_blocks
        self._plan = plan
        self._step = step
        self._in_flight: set[int] = set()

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        if self._plan.pipeline.is_cut:
            return self._unasked(index)
        if index >= self.num_steps and not self._in_flight:
            return None
        return self._asked(index)

    def commit(self, batch: MicroBatch, now_s: float) -> None:
        self._in_flight.discard(batch.index)

    def _unasked(self, index: int) -> Iterator[MicroBatch | None]:
        while index >= self.num_steps:
            yield None
        yield from self._batches(index)

    def _asked(self, index: int) -> Iterator[MicroBatch | None]:
        for batch in self._batches(index):
            while batch.index in self._in_flight:
                yield None
            if index < self.num_steps:
                self._in_flight.add(batch.index)
                yield batch

    def _batches(self, index: int) -> list[MicroBatch]:
        """The step for the block whose turn it is, as far as its places go. Equal ones are made
        anew: what is known of a micro-batch is kept per object."""
        blocks = self._plan.blocks
        (own,) = (block for block in blocks if set(self._step) <= set(block))
        pairs = zip(own, blocks[index % len(blocks)], strict=False)
        return [self._moved(self._step[mine], mb) for mine, mb in pairs if mine in self._step]

    def _moved(self, batch: MicroBatch, mb: int) -> MicroBatch:
        """The same rows in another micro-batch, at least one of them."""
        places = self._plan.micro_batches[mb].num_places
        rows = [row for row in batch.rows if row.place < places]
        return MicroBatch(mb, tuple(rows or [replace(batch.rows[0], place=0)]))


def _typical(layers: Sequence[LayerPlan], decoders: Sequence[int], few: int, more: int) -> int:
    """Where to begin so that the layers between `few` and `more` stream as much as all do."""
    index_of = {layer: index for index, layer in enumerate(decoders)}
    streamed = np.zeros((len(decoders), 2))
    for layer in layers:
        if layer.layer is not None:
            moved = layer.streamed.pack_bytes, layer.streamed.read_bytes
            streamed[index_of[layer.layer]] += moved
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(streamed, 0)])
    added = sums[more:] - sums[few : few + len(sums) - more]
    return int(np.abs(added - (more - few) * streamed.mean(0)).sum(1).argmin())


def _only(plan: Plan, decoders: AbstractSet[int]) -> Plan:
    """The plan without the other decoder layers."""
    kept = [layer for layer in plan.layers if layer.layer is None or layer.layer in decoders]
    return replace(plan, layers=tuple(replace(layer, position=i) for i, layer in enumerate(kept)))
