"""An adversary: it drops one kind of dependency and holds back whoever was waited for.

Where the edge was needed, the op that lacks it now runs too early: it reads what is not there yet,
or overwrites what is still in use. The adversary does not guess how long that takes: it holds the
first op of a pair back until the second is done, or until nothing has moved for `STALL_S`: then
something else keeps it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flexpipe.job.probes import Probes
from flexpipe.runtime.record import Recorder
from flexpipe.schedule.check import without_edges
from flexpipe.schedule.op import Kind, Lane, Op, Wait

STALL_S = 0.08
_GATES = 10**9  # ids of gates: far from those of ops

Pair = tuple[Op, Op]


@dataclass
class OpLog:
    """The ops of a run, as the schedule made them; `probes` go into the run."""

    ops: list[Op] = field(default_factory=list)

    @property
    def probes(self) -> Probes:
        return Probes(change_ops=self._note, poison=True)

    def _note(self, ops: Iterable[Op | None]) -> Iterator[Op | None]:
        for op in ops:
            if op is not None:
                self.ops.append(op)
            yield op

    def pairs(self, why: str) -> list[Pair]:
        """(waited for, waiting) of every edge of one kind."""
        by_id = {op.id: op for op in self.ops}
        return [(by_id[wait.op], op) for op in self.ops for wait in op.waits_for if wait.why == why]


class Adversary:
    """Drops all edges of kind `why` and turns `num_pairs` of the pairs around."""

    def __init__(self, why: str, pairs: Sequence[Pair], seed: int, num_pairs: int = 8) -> None:
        self._why = why
        self.drops = True
        chosen = random.Random(seed).sample(pairs, min(num_pairs, len(pairs)))
        self._seconds: dict[int, set[int]] = {}
        for first, second in chosen:
            self._seconds.setdefault(first.id, set()).add(second.id)
        # a gate stands on the lane of COMMIT; where that is what must go on, `first` holds its own
        self._blocked = {
            first.id
            for first, second in chosen
            if second.step != first.step or second.lane == Lane.HOST
        }
        self._done: set[int] = set()
        self._changed = threading.Condition()
        self.num_inverted = 0

    @property
    def probes(self) -> Probes:
        return Probes(
            change_ops=self._change,
            before_op=self._before,
            on_recorder=self._watch,
            poison=True,
        )

    def _change(self, ops: Iterable[Op | None]) -> Iterator[Op | None]:
        for op in without_edges(ops, self._why) if self.drops else ops:
            if op is None or op.id not in self._seconds or op.id in self._blocked:
                yield op
                continue
            gate = Op(_GATES + op.id, Kind.BARRIER, op.step, op.layer, None, ())
            yield gate
            yield op._replace(waits_for=(*op.waits_for, Wait(gate.id, "gate")))

    def _before(self, op: Op) -> None:
        first = op.id - _GATES if op.id >= _GATES else op.id
        if op.id >= _GATES or first in self._blocked:
            self._hold(self._seconds[first])

    def _hold(self, seconds: set[int]) -> None:
        with self._changed:
            while not seconds <= self._done:
                seen = len(self._done)
                if not self._changed.wait_for(lambda: len(self._done) > seen, STALL_S):  # noqa: B023
                    return
            self.num_inverted += 1

    def _watch(self, recorder: Recorder) -> None:
        add = recorder.add

        def noted(op: Op, start_s: float, end_s: float) -> None:
            add(op, start_s, end_s)
            with self._changed:
                self._done.add(op.id)
                self._changed.notify_all()

        recorder.add = noted  # type: ignore[method-assign]


@dataclass
class Jitter:
    """Holds back a tenth of all ops for up to `longest_s`; the same ones for the same seed."""

    seed: int
    longest_s: float = 3e-3

    def __call__(self, op: Op) -> None:
        draw = random.Random(self.seed * 1_000_003 + op.id)
        if draw.random() < 0.1:
            time.sleep(draw.random() * self.longest_s)
