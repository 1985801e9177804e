"""Plays ops against costs: when each would run, and how busy every lane and link is.

The ops are the very ones the executor runs, taken as its dispatcher takes them: a bounded number
ahead, and not past a micro-batch whose rows a COMMIT has yet to make known. Of those that are ready
a lane performs the one that was issued first. Ops that run at the same time share links, and slow
each other down as the costs say: every op has an amount of work, and its speed is settled anew
whenever another one starts or ends.

The ranks of a pipeline are played together, each with its own ops, lanes and links. Messages couple
them: the n-th that a rank sends is the n-th that the next one receives, and it moves once both have
come to it. Whoever waits for steps that rank 0 has yet to form asks again when rank 0 went on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from flexpipe.schedule.op import Kind, Lane, Op
from flexpipe.schedule.step import MicroBatch

RUN_AHEAD = 512  # ops taken and not done
_NEVER = float("inf")  # seconds
COMPUTING = (Lane.COMPUTE, Lane.ATTEND_CPU)  # a rank that does neither idles

Pairs = Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an op takes on a machine of its own.

    `duty` is the share of its time in which it occupies what `activity` names, for slowdowns; an
    op that mostly waits for its link neither disturbs nor is disturbed. `link` is shared evenly by
    the ops on it, but one that comes waits for what another has in flight: `in_flight_s` of it.
    `calls` is the share of its time that goes into calls; those of all lanes, and the dispatcher,
    come from one interpreter and slow each other down as the pair ("calls", "calls") says.
    """

    seconds: float
    activity: str = ""
    duty: float = 1.0
    link: str = ""
    num_bytes: int = 0
    in_flight_s: float = 0.0
    calls: float = 0.0

    @property
    def device(self) -> str:
        """What serves the link: reads and writes are one disk's."""
        return self.link.partition("_")[0]


class Manner(NamedTuple):
    """What of a cost decides how ops that run together slow each other down."""

    activity: str = ""
    link: str = ""
    duty: float = 0.0
    calls: float = 0.0
    held: float = 0.0  # share of its time in which it holds the interpreter: calls and dispatcher


_IDLE = Manner()
CALLS = ("calls", "calls")
_TURNS = 8  # by then waits and shares agree well enough


CostOf = Callable[[Op], Cost]
OnCommit = Callable[[MicroBatch, float], None]


def _at_once(idle_s: float) -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How the lanes of a machine get along.

    One that does `slowdown`'s first activity takes so many times as long beside one that does the
    second. `turn_s` passes between two ops of a lane, `hop_s` between an op's end and the start of
    one on another, idle lane that waited for it: calls, which others slow down. `wake_s` of its
    idle seconds comes on top where that lane computes. For every op the dispatcher holds the
    interpreter for `dispatch_s`, beside the lanes.
    """

    slowdown: Pairs = field(default_factory=dict)
    turn_s: float = 0.0
    hop_s: float = 0.0
    wake_s: Callable[[float], float] = _at_once
    dispatch_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOps:
    """What one rank plays, and the machine it has for it."""

    ops: Iterator[Op | None]
    cost_of: CostOf
    pace: Pace


@dataclass(frozen=True, slots=True)
class SimulatedSpan:
    """One op and when it would run, in seconds since the start."""

    op: Op
    start_s: float
    end_s: float


@dataclass(slots=True)
class Simulated:
    """What a rank's schedule came to. `work_s` is what each lane's ops would take alone,
    `link_work_s` what each link's: no schedule is faster than the largest of them. `seconds` pass
    from the first op of any rank to the last of any, `active_s` of them in computing."""

    seconds: float = 0.0
    active_s: float = 0.0
    work_s: dict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    num_ops: dict[Lane, int] = field(default_factory=lambda: defaultdict(int))
    busy_s: dict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    link_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    link_work_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    link_busy_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: list[SimulatedSpan] = field(default_factory=list)

    @property
    def bubble(self) -> float:
        """Share of the time in which the rank computed nothing."""
        return 1 - self.active_s / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Running:
    """An op on its lane: `hop_s` until it may begin, then `left_s` of work at `speed`. A message
    that has come to its turn (`is_due`) begins when the other side has too."""

    op: Op
    cost: Cost
    hop_s: float
    left_s: float
    start_s: float
    manner: int  # its number
    held: float  # as that has it
    speed: float = 1.0
    is_due: bool = False

    @property
    def calling(self) -> float:
        """Share of its time in which it holds the interpreter; all of it while it comes to begin,
        but not while it waits for another rank."""
        if self.hop_s <= 0:
            return self.held
        return 0.0 if self.hop_s == _NEVER else 1.0


@dataclass(slots=True)
class _Waiting:
    op: Op
    num_unmet: int
    dependents: list[int] = field(default_factory=list)


def simulate(
    ops: Iterator[Op | None],
    cost_of: CostOf,
    pace: Pace,
    *,
    on_commit: OnCommit = lambda batch, now_s: None,
    keep_spans: bool = False,
) -> Simulated:
    """Play all ops of a rank that is alone, to the last COMMIT; loads that nobody waits for are
    dropped, as in a run. `on_commit` is told when a micro-batch's tokens are known, before more ops
    are taken.
    """
    part = RankOps(ops=ops, cost_of=cost_of, pace=pace)
    return simulate_ranks([part], on_commit=on_commit, keep_spans=keep_spans)[0]


def simulate_ranks(
    parts: Sequence[RankOps],
    *,
    on_commit: OnCommit = lambda batch, now_s: None,
    keep_spans: bool = False,
) -> list[Simulated]:
    """Play all ops of all ranks, to the last COMMIT of rank 0."""
    ranks = [_Rank(part, on_commit, keep_spans) for part in parts]
    if len(ranks) > 1:
        for one, other in zip(ranks, ranks[1:] + ranks[:1], strict=True):
            one.edges[Lane.SEND] = other.edges[Lane.RECEIVE] = _Edge(one, other)
    first, *others = ranks
    for rank in ranks:
        rank.take()
    while not first.is_over:
        rank = min(ranks, key=lambda rank: rank.next_s)
        if rank.next_s == _NEVER:
            assert not others, "every rank waits for another one"
            break
        if rank.play() and rank is first:
            for other in others:
                other.take_news(first.now_s)
    for rank in ranks:
        rank.made.seconds = first.now_s
    return [rank.made for rank in ranks]


class _Edge:
    """The messages from a rank to the next one: how many either side has come to."""

    def __init__(self, sender: _Rank, receiver: _Rank) -> None:
        self._sides = {Lane.SEND: sender, Lane.RECEIVE: receiver}
        self._num_begun = {Lane.SEND: 0, Lane.RECEIVE: 0}

    def begin(self, lane: Lane, now_s: float) -> bool:
        """One side comes to its next message; whether the other one is there already, which then
        goes on."""
        other = Lane.RECEIVE if lane == Lane.SEND else Lane.SEND
        self._num_begun[lane] += 1
        if self._num_begun[lane] > self._num_begun[other]:
            return False
        self._sides[other].go_on(other, now_s)
        return True


class _Rank:
    """The ops of one rank in flight, at its own `now_s`; others may be further."""

    def __init__(self, part: RankOps, on_commit: OnCommit, keep_spans: bool) -> None:
        self.now_s = 0.0
        self.made = Simulated()
        self.is_over = False
        self.edges: dict[Lane, _Edge] = {}
        self._ops = part.ops
        self._cost_of = part.cost_of
        self._slowdown = part.pace.slowdown
        self._most_wait = self._slowdown.get(CALLS, 1.0) - 1
        self._pace = part.pace
        self._idle_since = dict.fromkeys(COMPUTING, 0.0)
        self._on_commit = on_commit
        self._keep_spans = keep_spans
        self._pending: dict[int, _Waiting] = {}
        self._ready: dict[Lane, list[tuple[int, Op, float]]] = {lane: [] for lane in Lane}  # heaps
        self._running: dict[Lane, _Running] = {}
        self._is_blocked = False  # until the next COMMIT, or news of one
        self._step_s = _NEVER  # to the next moment at which an op begins or ends
        self._manners = {_IDLE: 0}  # and their numbers
        self._speeds: dict[tuple[int, ...], tuple[float, ...]] = {}  # of manners by number

    @property
    def next_s(self) -> float:
        return self.now_s + self._step_s

    def play(self) -> bool:
        """To the next moment at which an op begins or ends; whether that made room for more ops."""
        self._move(self._step_s)
        ended = []
        for lane, one in self._running.items():
            if one.hop_s <= 0 and one.left_s <= 1e-12:
                ended.append(lane)
        for lane in ended:
            self._end(self._running.pop(lane))
        num_taken = self.take()
        return num_taken > 0 or self.is_over

    def take_news(self, now_s: float) -> None:
        """Ask again for what was not known."""
        if self._is_blocked:
            self._move(now_s - self.now_s)
            self._is_blocked = False
            self.take()

    def go_on(self, lane: Lane, now_s: float) -> None:
        """The message that this lane waited to hand over, or for, moves from now on."""
        self._move(now_s - self.now_s)
        self._running[lane].hop_s = 0.0
        self._settle()

    def take(self) -> int:
        """Take ops as far as the dispatcher would, and start what can start."""
        num_taken = 0
        while not self.is_over and not self._is_blocked and len(self._pending) < RUN_AHEAD:
            try:
                op = next(self._ops)
            except StopIteration:
                self.is_over = True
                break
            if op is None:
                self._is_blocked = True
                break
            self._submit(op)
            num_taken += 1
        self._start_idle()
        self._settle()
        return num_taken

    def _submit(self, op: Op) -> None:
        waiting = _Waiting(op, 0)
        for wait in op.waits_for:
            before = self._pending.get(wait.op)
            if before is not None:
                before.dependents.append(op.id)
                waiting.num_unmet += 1
        self._pending[op.id] = waiting
        if not waiting.num_unmet:
            heappush(self._ready[op.lane], (op.id, op, self.now_s))

    def _start_idle(self) -> None:
        """Lanes that begin at once all call, beside those at work."""
        idle = [lane for lane, ready in self._ready.items() if ready and lane not in self._running]
        if not idle:
            return
        calling = sum(one.calling for one in self._running.values()) + len(idle) - 1
        longer = 1 + self._most_wait * calling
        for lane in idle:
            self._running[lane] = self._start(lane, longer)

    def _start(self, lane: Lane, longer: float) -> _Running:
        """The first op that is ready, where calls take so much `longer`."""
        _, op, since_s = heappop(self._ready[lane])
        cost, pace = self._cost_of(op), self._pace
        hop_s = max(pace.turn_s * longer, since_s + pace.hop_s * longer - self.now_s)
        hop_s += self._queue_s(cost)
        if lane in self._idle_since:
            hop_s += pace.wake_s(self.now_s - self._idle_since[lane])
        dispatched = pace.dispatch_s / cost.seconds if cost.seconds else 0.0
        held = min(1.0, cost.calls + dispatched)
        manner = Manner(cost.activity, cost.link, cost.duty, cost.calls, held)
        number = self._manners.setdefault(manner, len(self._manners))
        return _Running(op, cost, hop_s, cost.seconds, self.now_s + hop_s, number, held)

    def _queue_s(self, cost: Cost) -> float:
        """What the op waits for in the queue of its device, which is half of what another one has
        put there: that is filled again and again, and an op comes at any moment."""
        if not cost.link:
            return 0.0
        return max(
            (
                min(one.left_s, one.cost.in_flight_s) / 2
                for one in self._running.values()
                if one.hop_s <= 0 and one.cost.device == cost.device
            ),
            default=0.0,
        )

    def _settle(self) -> None:
        """Each running op's speed beside the others, and when the next one begins or ends."""
        self._meet()
        running = self._running.values()
        key = tuple([0 if one.hop_s > 0 else one.manner for one in running])
        speeds = self._speeds.get(key)
        if speeds is None:
            speeds = self._speeds[key] = self._speeds_of(key)
        step_s = _NEVER
        for one, speed in zip(running, speeds, strict=True):
            one.speed = speed
            left_s = one.hop_s if one.hop_s > 0 else one.left_s / speed
            if left_s < step_s:
                step_s = left_s
        self._step_s = max(0.0, step_s)

    def _speeds_of(self, key: tuple[int, ...]) -> tuple[float, ...]:
        manners = list(self._manners)
        beside = [manners[number] for number in key]
        waits = _interpreter_waits(beside, self._most_wait)
        return tuple(self._speed(beside, index, wait) for index, wait in enumerate(waits))

    def _meet(self) -> None:
        """Messages whose turn has come wait for the other side."""
        for lane, edge in self.edges.items():
            one = self._running.get(lane)
            if one is not None and one.hop_s <= 0 and not one.is_due:
                one.is_due, one.hop_s = True, _NEVER
                if edge.begin(lane, self.now_s):
                    one.hop_s = 0.0

    def _speed(self, beside: Sequence[Manner], index: int, wait: float) -> float:
        own = beside[index]
        sharing = sum(other.link == own.link for other in beside) if own.link else 1
        factor = 1 + own.calls * wait
        for place, other in enumerate(beside):
            if place != index:
                disturbed = self._slowdown.get((own.activity, other.activity), 1.0) - 1
                factor *= 1 + disturbed * other.duty
        return 1 / (sharing * max(1.0, own.duty * factor))

    def _move(self, step_s: float) -> None:
        """So much time passes, in which no op ends."""
        self.now_s += step_s
        active = False
        for lane, one in self._running.items():
            if one.hop_s > 0:
                one.hop_s = 0.0 if one.hop_s <= step_s else one.hop_s - step_s
            else:
                one.left_s -= step_s * one.speed
                active = active or lane in COMPUTING
        if active:
            self.made.active_s += step_s

    def _end(self, one: _Running) -> None:
        op, made, cost = one.op, self.made, one.cost
        lane, took_s = op.lane, self.now_s - one.start_s
        if lane in self._idle_since:
            self._idle_since[lane] = self.now_s
        made.num_ops[lane] += 1
        made.busy_s[lane] += took_s
        made.work_s[lane] += cost.seconds
        if cost.link:
            made.link_bytes[cost.link] += cost.num_bytes
            made.link_busy_s[cost.link] += took_s
            made.link_work_s[cost.link] += cost.seconds
        if self._keep_spans:
            made.spans.append(SimulatedSpan(op, one.start_s, self.now_s))
        if op.kind == Kind.COMMIT:
            assert op.batch is not None
            self._on_commit(op.batch, self.now_s)
            self._is_blocked = False
        for dependent in self._pending.pop(op.id).dependents:
            waiting = self._pending[dependent]
            waiting.num_unmet -= 1
            if not waiting.num_unmet:
                after = waiting.op
                since_s = -_NEVER if after.lane == lane else self.now_s
                heappush(self._ready[after.lane], (after.id, after, since_s))


def _interpreter_waits(beside: Sequence[Manner], most: float) -> list[float]:
    """How much longer calls take for each op that runs, where one other that does nothing but calls
    makes them take `most` longer.

    An op whose calls wait is in them for a larger share of its time, and so holds up the others
    for longer: shares and waits follow from each other.
    """
    waits = [0.0] * len(beside)
    for _ in range(_TURNS if most else 0):
        shares = [
            one.held * (1 + wait) / (1 + one.held * wait)
            for one, wait in zip(beside, waits, strict=True)
        ]
        waits = [most * (sum(shares) - share) for share in shares]
    return waits
