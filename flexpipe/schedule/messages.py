"""What stages hand each other, and in which order.

All ranks make the same visits in the same order, so the order of messages on an edge of the ring is
known at both ends and needs no tags. A rank's messages of one direction keep their order; without
asynchrony both directions share one. A rank with one before it receives a visit's hidden first
thing and sends it last: it sends, then receives the next. The first rank must receive what the last
one sent long ago before it sends more than the others can take in: with N stages, what was sent at
visit q before its own send of visit q + N - 1. Then nobody waits in a circle, even where a send
blocks until it is received.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexpipe.plan.layer import LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.schedule.edges import Edges
from flexpipe.schedule.moves import Homes, hidden_of, tokens_of
from flexpipe.schedule.op import LANE_OF, Kind, Op, Pool, Resource
from flexpipe.schedule.slots import Slots
from flexpipe.schedule.step import MicroBatch


class Messages:
    """Ops that send and receive."""

    def __init__(self, plan: Plan, edges: Edges, slots: Slots, homes: Homes) -> None:
        self._plan = plan
        self._edges = edges
        self._slots = slots
        self._homes = homes

    def receive_hidden(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Op:
        """Hidden from the stage before, to its home or into a slot on the way there."""
        slot = None
        if not self._homes.hidden_at_home(batch):
            slot = self._slots.take(Pool.HIDDEN_SLOT, mb=batch.index)
        return self._edges.op(
            Kind.RECEIVE_HIDDEN,
            step,
            layer.position,
            batch,
            writes=(_place(batch, slot), self._order(Kind.RECEIVE_HIDDEN)),
            hidden_slot=slot,
        )

    def send_hidden(self, step: int, layer: LayerPlan, batch: MicroBatch) -> Op:
        """Hidden to the stage after, from its home or from the slot it was loaded into."""
        slot = None
        if not self._homes.hidden_at_home(batch):
            slot = self._slots.held(Pool.HIDDEN_SLOT, mb=batch.index)
        return self._edges.op(
            Kind.SEND_HIDDEN,
            step,
            layer.position,
            batch,
            reads=(_place(batch, slot),),
            writes=(self._order(Kind.SEND_HIDDEN),),
            hidden_slot=slot,
        )

    def send_tokens(self, step: int, layer: LayerPlan, batches: Sequence[MicroBatch]) -> Op:
        """A step's tokens to the first stage, or that it is over where nothing was sampled."""
        done = tuple(tokens_of(mb) if mb.num_sampled else hidden_of(mb) for mb in batches)
        return self._edges.op(
            Kind.SEND_TOKENS,
            step,
            layer.position,
            None,
            reads=done,
            writes=(self._order(Kind.SEND_TOKENS),),
            batches=tuple(batches),
        )

    def receive_tokens(self, step: int, layer: LayerPlan, batches: Sequence[MicroBatch]) -> Op:
        """A step's tokens from the last stage."""
        return self._edges.op(
            Kind.RECEIVE_TOKENS,
            step,
            layer.position,
            None,
            writes=(*map(tokens_of, batches), self._order(Kind.RECEIVE_TOKENS)),
            batches=tuple(batches),
        )

    def _order(self, kind: Kind) -> Resource:
        """What each message of a lane hands to the next one."""
        lane = LANE_OF[kind].value if self._plan.pipeline.async_comm else "comm"
        return (Pool.ORDER, lane, 0, 0)


def _place(batch: MicroBatch, slot: int | None) -> Resource:
    return hidden_of(batch) if slot is None else (Pool.HIDDEN_SLOT, slot, 0, 0)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the last rank sends to the first at `visit`, when it has done `chunk` of a step."""

    visit: int
    step: int
    chunk: int
    batches: tuple[MicroBatch, ...]


class Arrivals:
    """What the first rank has yet to receive from the last, in order."""

    def __init__(self) -> None:
        self._pending: deque[Arrival] = deque()

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def expect(self, arrival: Arrival) -> None:
        self._pending.append(arrival)

    def due(self, visit: int | None = None) -> Iterator[Arrival]:
        """Those sent up to `visit`, or all."""
        while self._pending and (visit is None or self._pending[0].visit <= visit):
            yield self._pending.popleft()
