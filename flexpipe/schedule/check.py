"""Proof of order for a schedule: no hazard, no deadlock.

The checker knows nothing of how the ops were made. It plays their accesses in issue order and
demands that every pair that touches the same resource, one of them writing, is ordered by what the
ops wait for, and that a slot holds what its reader came for. An op may only wait for an earlier
one, so whatever order the lanes find, some op can always run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flexpipe.schedule.op import Kind, Op, Pool, Resource

_SLOTS = {
    Pool.WEIGHT_SLOT,
    Pool.WEIGHT_STAGE,
    Pool.EMBED_SLOT,
    Pool.EMBED_STAGE,
    Pool.KV_SLOT,
    Pool.KV_READ_STAGE,
    Pool.KV_WRITE_STAGE,
    Pool.ATTENTION_SLOT,
    Pool.QUERY_STAGE,
    Pool.PARTIAL_SLOT,
    Pool.HIDDEN_SLOT,
    Pool.HIDDEN_READ_STAGE,
    Pool.HIDDEN_WRITE_STAGE,
}
_HIDDEN = {Pool.HIDDEN_SLOT, Pool.HIDDEN_READ_STAGE, Pool.HIDDEN_WRITE_STAGE}
_FILLS = {
    Kind.READ_WEIGHT,
    Kind.LOAD_WEIGHT,
    Kind.READ_EMBED,
    Kind.LOAD_EMBED,
    Kind.READ_CACHE,
    Kind.LOAD_CACHE,
    Kind.READ_HIDDEN,
    Kind.LOAD_HIDDEN,
    Kind.RECEIVE_HIDDEN,
}


@dataclass(frozen=True, slots=True)
class Hazard:
    """Two ops that may run in the wrong order, or a reader that finds something else."""

    first: Op
    second: Op
    resource: Resource
    problem: str

    def __str__(self) -> str:
        pool, *place = self.resource
        return f"{self.second} and {self.first} on {pool.value}{place}: {self.problem}"


@dataclass(slots=True)
class _History:
    writer: Op | None = None
    readers: list[Op] = field(default_factory=list)


def find_hazards(ops: Iterable[Op]) -> list[Hazard]:
    """All hazards of a schedule, in issue order; an empty list is the proof."""
    graph = Graph(ops)
    found: list[Hazard] = []
    history: dict[Resource, _History] = {}
    for op in graph.ops:
        for wait in op.waits_for:
            if wait.op >= op.id:
                found.append(Hazard(op, op, (Pool.ROWS, 0, 0, 0), "waits for a later op"))
        for resource in op.reads:
            past = history.setdefault(resource, _History())
            found += _check_read(graph, past, op, resource)
            past.readers.append(op)
        for resource in op.writes:
            past = history.setdefault(resource, _History())
            found += _check_write(graph, past, op, resource)
            past.writer, past.readers = op, []
    return found


def _check_read(graph: Graph, past: _History, op: Op, resource: Resource) -> list[Hazard]:
    writer = past.writer
    if writer is None:
        if resource[0] in _SLOTS:
            return [Hazard(op, op, resource, "reads a slot nobody filled")]
        return []
    found = []
    if not graph.must_precede(writer, op):
        found.append(Hazard(writer, op, resource, "may be read before it is produced"))
    if resource[0] in _SLOTS and not _same_content(writer, op, resource[0]):
        found.append(Hazard(writer, op, resource, "holds something else than its reader wants"))
    return found


def _check_write(graph: Graph, past: _History, op: Op, resource: Resource) -> list[Hazard]:
    found = [
        Hazard(reader, op, resource, "may be overwritten before it is read")
        for reader in past.readers
        if reader is not op and not graph.must_precede(reader, op)
    ]
    writer = past.writer
    if writer is not None and not graph.must_precede(writer, op):
        found.append(Hazard(writer, op, resource, "may be overwritten before it is complete"))
    uses = op.kind == Kind.COMPUTE and resource[0] in _SLOTS and not past.readers
    filled = writer is not None and writer.kind in _FILLS
    if uses and writer is not None and filled and not _same_content(writer, op, resource[0]):
        found.append(Hazard(writer, op, resource, "holds something else than it works on"))
    return found


def _same_content(writer: Op, reader: Op, pool: Pool) -> bool:
    if pool in (Pool.WEIGHT_SLOT, Pool.WEIGHT_STAGE):
        return writer.layer == reader.layer
    if pool in _HIDDEN:
        return writer.mb == reader.mb
    return (writer.layer, writer.mb) == (reader.layer, reader.mb)


class Graph:
    """What must come before what, from the ops' dependencies alone."""

    def __init__(self, ops: Iterable[Op]) -> None:
        self.ops: Sequence[Op] = tuple(ops)
        self._position = {op.id: index for index, op in enumerate(self.ops)}
        self._before: list[int] = []
        for op in self.ops:
            before = 0
            for wait in op.waits_for:
                index = self._position[wait.op]
                if index < len(self._before):
                    before |= self._before[index] | 1 << index
            self._before.append(before)

    def must_precede(self, first: Op, second: Op) -> bool:
        """Whether `second` waits for `first`, directly or through others."""
        return bool(self._before[self._position[second.id]] >> self._position[first.id] & 1)


def edge_kinds(ops: Iterable[Op]) -> list[str]:
    """The kinds of dependency a schedule has, like "freed:weight_slot"."""
    return sorted({wait.why for op in ops for wait in op.waits_for if wait.why != "strategy"})


def without_edges(ops: Iterable[Op | None], why: str) -> Iterable[Op | None]:
    """The same ops with one kind of dependency dropped: a mutant that the checker must refuse."""
    for op in ops:
        if op is not None and any(wait.why == why for wait in op.waits_for):
            kept = tuple(wait for wait in op.waits_for if wait.why != why)
            op = op._replace(waits_for=kept)
        yield op
