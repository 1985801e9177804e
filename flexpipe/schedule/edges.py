"""What an op waits for: derived from what it touches, and what a strategy adds.

There are two true kinds: *produced* (it reads what an earlier op wrote) and *freed* (it overwrites
what an earlier op used). That a COMMIT makes the rows of a micro-batch's next step *known* is a
third: the job cannot name them sooner, so this tells a dispatcher nothing new, but a checker and a
simulator. Messages, and sums over the shards of a stage, keep their *order*. A dependency that
another one already implies is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexpipe.schedule.op import Kind, Op, Pool, Resource, Segment, Wait
from flexpipe.schedule.step import MicroBatch

# ops further back than this are looked up no more when edges are reduced; an extra edge is harmless
_WINDOW = 4096
_WINDOW_MASK = (1 << _WINDOW) - 1
_KNOWN = f"known:{Pool.ROWS.value}"
_PRODUCED = {pool: f"produced:{pool.value}" for pool in Pool}
_READ = {**_PRODUCED, Pool.ROWS: _KNOWN}
_FREED = {pool: f"freed:{pool.value}" for pool in Pool}
_Need = tuple[int, str]  # an op to wait for, and why


class Edges:
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
        batches: tuple[MicroBatch, ...] = (),
        partial_slot: int | None = None,
    ) -> Op:
        """The next op, waiting for what its accesses demand and the strategy adds."""
        made = self._name()
        waits = self._reduced(made, self._needs(made, reads, writes))
        weights = kind in (Kind.READ_WEIGHT, Kind.LOAD_WEIGHT)
        (self._weights if weights else self._iteration).append(made)
        return Op(
            made, kind, step, layer, batch, waits, reads, writes,
            weight_slot, kv_slot, hidden_slot, embed_slot, stage_slot, attention_slot, segment,
            batches, partial_slot,
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
        waits = self._reduced(made, [(op, "strategy") for op in ops])
        self._barrier = made
        self._iteration.clear()
        yield Op(made, Kind.BARRIER, step, layer, None, waits)

    def _name(self) -> int:
        made = self._next_id
        self._next_id += 1
        return made

    def _needs(
        self, made: int, reads: tuple[Resource, ...], writes: tuple[Resource, ...]
    ) -> list[_Need]:
        """True dependencies of an access list, and the new state of what it touches."""
        waits = []
        for resource in reads:
            writer = self._writer.get(resource)
            if writer is not None:
                waits.append((writer, _READ[resource[0]]))
            self._readers.setdefault(resource, []).append(made)
        for resource in writes:
            pool = resource[0]
            readers = self._readers.pop(resource, ())
            waits += [(op, _FREED[pool]) for op in readers if op != made]
            writer = self._writer.get(resource)
            if writer is not None:
                ordered = pool == Pool.ORDER
                waits.append((writer, f"order:{resource[1]}" if ordered else _PRODUCED[pool]))
            self._writer[resource] = made
        if self._strategy == "none" and made:
            waits.append((made - 1, "strategy"))
        if self._barrier is not None:
            waits.append((self._barrier, "strategy"))
        return waits

    def _reduced(self, made: int, waits: Sequence[_Need]) -> tuple[Wait, ...]:
        """Drop what a later op waited for already implies (transitive reduction)."""
        kept, known = [], 0
        reasons: dict[int, str] = {}
        for op, why in waits:
            told = reasons.get(op)
            if told is None or why == _KNOWN:
                reasons[op] = why  # of a COMMIT to come nothing else needs to be said
            elif told != _KNOWN and why not in told.split("+"):
                reasons[op] = f"{told}+{why}"
        for op in sorted(reasons, reverse=True):
            distance = made - op
            if known >> (distance - 1) & 1:
                continue
            kept.append(Wait(op, reasons[op]))
            known |= 1 << (distance - 1)
            known |= self._ancestors.get(op, 0) << distance
        self._ancestors[made] = known & _WINDOW_MASK
        self._ancestors.pop(made - _WINDOW, None)
        return tuple(kept)
