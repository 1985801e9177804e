"""Plays ops against costs: when each would run, and how busy every lane and link is.

The ops are the very ones the executor runs, taken as its dispatcher takes them: a bounded number
ahead, and not past a micro-batch whose rows a COMMIT has yet to make known. Lanes perform them in
the order they become ready. Ops that run at the same time share links, and slow each other down as
the costs say: every op has an amount of work, and its speed is settled anew whenever another one
starts or ends.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flexpipe.schedule.op import LANE_OF, Kind, Lane, Op
from flexpipe.schedule.step import MicroBatch

RUN_AHEAD = 512  # ops taken and not done
_NEVER = float("inf")  # seconds

Pairs = Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an op takes on a machine of its own.

    `duty` is the share of its time in which it occupies what `activity` names, for slowdowns; an
    op that mostly waits for its link neither disturbs nor is disturbed. `link` is shared evenly by
    the ops on it.
    """

    seconds: float
    activity: str = ""
    duty: float = 1.0
    link: str = ""
    num_bytes: int = 0


CostOf = Callable[[Op], Cost]


@dataclass(frozen=True, slots=True)
class SimulatedSpan:
    """One op and when it would run, in seconds since the start."""

    op: Op
    start_s: float
    end_s: float


@dataclass(slots=True)
class Simulated:
    """What a schedule came to. `work_s` is what each lane's ops would take alone, `link_work_s`
    what each link's: no schedule is faster than the largest of them."""

    seconds: float = 0.0
    work_s: dict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    num_ops: dict[Lane, int] = field(default_factory=lambda: defaultdict(int))
    busy_s: dict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    link_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    link_work_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    link_busy_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: list[SimulatedSpan] = field(default_factory=list)


@dataclass(slots=True)
class _Running:
    """An op on its lane: `hop_s` until it may begin, then `left_s` of work at `speed`."""

    op: Op
    cost: Cost
    hop_s: float
    left_s: float
    start_s: float
    speed: float = 1.0


@dataclass(slots=True)
class _Waiting:
    op: Op
    num_unmet: int
    dependents: list[int] = field(default_factory=list)


def simulate(
    ops: Iterator[Op | None],
    cost_of: CostOf,
    *,
    slowdown: Pairs,
    hop_s: float = 0.0,
    on_commit: Callable[[MicroBatch, float], None] = lambda batch, now_s: None,
    keep_spans: bool = False,
) -> Simulated:
    """Play all ops to the last COMMIT; loads that nobody waits for are dropped, as in a run.

    `hop_s` passes between an op's end and the start of one on another, idle lane that waited for
    it. `on_commit` is told when a micro-batch's tokens are known, before more ops are taken.
    """
    return _Simulation(ops, cost_of, slowdown, hop_s, on_commit, keep_spans).run()


class _Simulation:
    def __init__(
        self,
        ops: Iterator[Op | None],
        cost_of: CostOf,
        slowdown: Pairs,
        hop_s: float,
        on_commit: Callable[[MicroBatch, float], None],
        keep_spans: bool,
    ) -> None:
        self._ops = ops
        self._cost_of = cost_of
        self._slowdown = slowdown
        self._hop_s = hop_s
        self._on_commit = on_commit
        self._keep_spans = keep_spans
        self._now_s = 0.0
        self._made = Simulated()
        self._pending: dict[int, _Waiting] = {}
        self._queues: dict[Lane, deque[tuple[Op, float]]] = {lane: deque() for lane in Lane}
        self._running: dict[Lane, _Running] = {}
        self._is_over = False
        self._is_blocked = False  # until the next COMMIT
        self._speeds: dict[tuple[tuple[str, str, float], ...], tuple[float, ...]] = {}

    def run(self) -> Simulated:
        self._take()
        while self._running and not self._is_over:
            self._advance()
        self._made.seconds = self._now_s
        return self._made

    def _take(self) -> None:
        """Take ops as far as the dispatcher would, and start what can start."""
        while not self._is_over and not self._is_blocked and len(self._pending) < RUN_AHEAD:
            try:
                op = next(self._ops)
            except StopIteration:
                self._is_over = True
                break
            if op is None:
                self._is_blocked = True
                break
            self._submit(op)
        self._start_idle()

    def _submit(self, op: Op) -> None:
        waiting = _Waiting(op, 0)
        for wait in op.waits_for:
            before = self._pending.get(wait.op)
            if before is not None:
                before.dependents.append(op.id)
                waiting.num_unmet += 1
        self._pending[op.id] = waiting
        if not waiting.num_unmet:
            self._queues[op.lane].append((op, self._now_s))

    def _start_idle(self) -> None:
        changed = False
        for lane, queue in self._queues.items():
            if queue and lane not in self._running:
                op, since_s = queue.popleft()
                cost = self._cost_of(op)
                hop_s = max(0.0, since_s + self._hop_s - self._now_s)
                start_s = self._now_s + hop_s
                self._running[lane] = _Running(op, cost, hop_s, cost.seconds, start_s)
                changed = True
        if changed:
            self._settle()

    def _settle(self) -> None:
        """Each running op's speed beside the others."""
        running = self._running.values()
        key = tuple(
            ("", "", 0.0) if one.hop_s > 0 else (one.cost.activity, one.cost.link, one.cost.duty)
            for one in running
        )
        speeds = self._speeds.get(key)
        if speeds is None:
            speeds = self._speeds[key] = tuple(self._speed(key, i) for i in range(len(key)))
        for one, speed in zip(running, speeds, strict=True):
            one.speed = speed

    def _speed(self, key: tuple[tuple[str, str, float], ...], index: int) -> float:
        activity, link, duty = key[index]
        sharing = sum(other[1] == link for other in key) if link else 1
        factor = 1.0
        for other, (beside, _, part) in enumerate(key):
            if other != index and activity and beside:
                factor *= 1 + (self._slowdown.get((activity, beside), 1.0) - 1) * part
        return 1 / (sharing * max(1.0, duty * factor))

    def _advance(self) -> None:
        """To the next moment at which an op begins or ends."""
        step_s = _NEVER
        for one in self._running.values():
            left_s = one.hop_s if one.hop_s > 0 else one.left_s / one.speed
            step_s = min(step_s, left_s)
        self._now_s += step_s
        ended = []
        for lane, one in self._running.items():
            if one.hop_s > 0:
                one.hop_s = 0.0 if one.hop_s <= step_s else one.hop_s - step_s
            else:
                one.left_s -= step_s * one.speed
            if one.hop_s <= 0 and one.left_s <= 1e-12:
                ended.append(lane)
        for lane in ended:
            self._end(self._running.pop(lane))
        self._take()
        self._settle()

    def _end(self, one: _Running) -> None:
        op, made, cost = one.op, self._made, one.cost
        took_s = self._now_s - one.start_s
        made.num_ops[LANE_OF[op.kind]] += 1
        made.busy_s[LANE_OF[op.kind]] += took_s
        made.work_s[LANE_OF[op.kind]] += cost.seconds
        if cost.link:
            made.link_bytes[cost.link] += cost.num_bytes
            made.link_busy_s[cost.link] += took_s
            made.link_work_s[cost.link] += cost.seconds
        if self._keep_spans:
            made.spans.append(SimulatedSpan(op, one.start_s, self._now_s))
        if op.kind == Kind.COMMIT:
            assert op.batch is not None
            self._on_commit(op.batch, self._now_s)
            self._is_blocked = False
        for dependent in self._pending.pop(op.id).dependents:
            waiting = self._pending[dependent]
            waiting.num_unmet -= 1
            if not waiting.num_unmet:
                after = waiting.op
                since_s = -_NEVER if after.lane == op.lane else self._now_s
                self._queues[after.lane].append((after, since_s))
