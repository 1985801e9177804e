"""Steps and ops for the simulator: a job that only says how many rows come back when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flexpipe.plan.plan import Plan
from flexpipe.schedule.build import schedule
from flexpipe.schedule.op import Kind, Op, Wait
from flexpipe.schedule.simulate import Cost, Pace, Simulated, simulate
from flexpipe.schedule.step import MicroBatch, Row
from tests.schedule.plans import MicroBatches

PLAIN = Pace()  # lanes that leave each other alone
ROWS = MicroBatch(0, (Row(0, 0, 8, (3,), True),))


class Script:
    """Steps known beforehand, of blocks in turn; each micro-batch is given out once its last
    step came back."""

    def __init__(self, steps: Sequence[MicroBatches], num_blocks: int = 1) -> None:
        self._steps = steps
        self._last = steps[-num_blocks:]
        self._out: set[int] = set()

    def commit(self, batch: MicroBatch, now_s: float) -> None:
        self._out.remove(batch.index)

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        if index >= len(self._steps) and not self._out:
            return None
        return self._step(index)

    def _step(self, index: int) -> Iterator[MicroBatch | None]:
        if index >= len(self._steps):
            while self._out.intersection(self._of_block(index)):
                yield None
            return
        for batch in self._steps[index]:
            while batch.index in self._out:
                yield None
            self._out.add(batch.index)
            yield batch

    def _of_block(self, index: int) -> set[int]:
        """What of the block may be out: all that ever was, where there is but one."""
        if len(self._last) == 1:
            return set(self._out)
        return {batch.index for batch in self._last[index % len(self._last)]}


def play(
    plan: Plan,
    steps: Sequence[MicroBatches],
    cost_of: Callable[[Op], Cost],
    pace: Pace = PLAIN,
) -> Simulated:
    """A plan's own ops against costs."""
    script = Script(steps)
    return simulate(
        schedule(plan, script.steps),
        cost_of,
        pace,
        on_commit=script.commit,
        keep_spans=True,
    )


def op(id: int, kind: Kind, *before: int) -> Op:
    """An op that waits for others."""
    return Op(id, kind, 0, 0, ROWS, tuple(Wait(other, "produced:") for other in before))


def play_ops(
    costs: Sequence[tuple[Op, Cost]],
    pace: Pace = PLAIN,
) -> tuple[Simulated, dict[int, tuple[float, float]]]:
    """A few ops, then a COMMIT that waits for all; what it came to, and each op's start and end."""
    known = {one.id: cost for one, cost in costs}
    last = op(len(costs), Kind.COMMIT, *known)
    committed: list[MicroBatch] = []

    def ops() -> Iterator[Op | None]:
        yield from (one for one, _ in costs)
        yield last
        while not committed:
            yield None

    made = simulate(
        ops(),
        lambda one: known.get(one.id, Cost(0.0)),
        pace,
        on_commit=lambda batch, now_s: committed.append(batch),
        keep_spans=True,
    )
    return made, {span.op.id: (span.start_s, span.end_s) for span in made.spans}
