"""Proof that messages and sums of all ranks meet: no circle of waiting, no message misread.

The checker plays the ops of every rank against each other, each rank's taken a bounded number ahead
and not past a micro-batch that nobody knows yet, as a dispatcher takes them. Ops take no time, so
what is left in the end could never have run.

A *channel* is where ends meet: an edge of the ring, in one direction, or all shards of a stage,
which sum what they have when the last of them is there. Under NCCL's rules a send
blocks until it is received, tags are ignored, so that the n-th message sent on a channel is the
n-th received, and a communicator is one FIFO: what a rank posts there runs strictly in the order of
posting. That order must not be left to chance either: where ops do not force it, it is a problem of
its own. Under Gloo's rules channels do not hold each other up, and a send may leave before anybody
asks for it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from flexpipe.schedule.check import Graph
from flexpipe.schedule.op import PEER_LANES, Kind, Lane, Op, Pool

RUN_AHEAD = 512  # ops taken and not done


class Rules(StrEnum):
    """How messages behave: as NCCL's, or as Gloo's."""

    NCCL = "nccl"
    GLOO = "gloo"


Channel = tuple[int, ...]  # from a rank, to a rank; or the ranks of a stage
Communicator = Callable[[Channel], object]


def one_per_edge(channel: Channel) -> object:
    """Every directed edge has a communicator of its own, and so has every stage."""
    return channel


def one_for_all(channel: Channel) -> object:
    """All messages share one."""
    return "all"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that would keep a run from ending well; `rank` is where it shows."""

    rank: int
    op: Op
    what: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.op} {self.what}"


def find_problems(
    ranks: Sequence[Sequence[Op]],
    *,
    rules: Rules,
    communicator: Communicator = one_per_edge,
    run_ahead: int = RUN_AHEAD,
    num_shards: int = 1,
) -> list[Problem]:
    """All that is wrong with the messages of these schedules, a rank each; an empty list is the
    proof. The `num_shards` ranks of a stage follow each other."""
    grid = Grid(len(ranks), num_shards)
    found = list(_mismatches(ranks, grid))
    if rules == Rules.NCCL:
        for rank, ops in enumerate(ranks):
            found += _disordered(rank, ops, grid, communicator)
    return found or _Play(ranks, grid, rules, run_ahead).deadlocked()


@dataclass(frozen=True, slots=True)
class Grid:
    """How ranks stand to each other: stages in a ring, the shards of each in a row."""

    num_ranks: int
    num_shards: int

    def channel_of(self, rank: int, op: Op) -> Channel:
        """Where an op of `rank` meets its other ends."""
        first = rank - rank % self.num_shards
        match op.lane:
            case Lane.SEND:
                return rank, (rank + self.num_shards) % self.num_ranks
            case Lane.RECEIVE:
                return (rank - self.num_shards) % self.num_ranks, rank
        return tuple(range(first, first + self.num_shards))


def size_of(op: Op) -> tuple[str, int]:
    """What a message holds: tokens' hidden, or the tokens of sampled rows; what a sum is of."""
    if op.kind in (Kind.SEND_TOKENS, Kind.RECEIVE_TOKENS):
        return "tokens", max(1, sum(batch.num_sampled for batch in op.batches))
    assert op.batch is not None
    if op.kind == Kind.ALL_REDUCE:
        what = "logits" if op.writes[0][0] == Pool.LOGITS else "hidden"
        return f"{what} of micro-batch {op.batch.index} in step {op.step}", op.batch.num_new
    return "hidden", op.batch.num_new


def _meetings(ops: Iterable[Op]) -> list[Op]:
    return [op for op in ops if op.lane in PEER_LANES]


def _mismatches(ranks: Sequence[Sequence[Op]], grid: Grid) -> Iterator[Problem]:
    """Messages and sums whose ends do not expect the same."""
    posted: dict[Channel, dict[int, list[Op]]] = defaultdict(lambda: defaultdict(list))
    for rank, ops in enumerate(ranks):
        for op in _meetings(ops):
            posted[grid.channel_of(rank, op)][rank].append(op)
    for channel, ends in posted.items():
        for first, rank in pairwise(channel):
            for one, other in zip(ends[first], ends[rank], strict=False):
                if size_of(one) != size_of(other):
                    kind, size = size_of(one)
                    yield Problem(rank, other, f"meets {size} of {kind}")
        fewest = min(len(ends[rank]) for rank in channel)
        for rank in channel:
            for op in ends[rank][fewest:]:
                yield Problem(rank, op, "has no other end")


def _disordered(
    rank: int, ops: Sequence[Op], grid: Grid, communicator: Communicator
) -> Iterator[Problem]:
    """Messages and sums on one communicator that may be posted in either order."""
    by_communicator: dict[object, list[Op]] = defaultdict(list)
    for op in _meetings(ops):
        by_communicator[communicator(grid.channel_of(rank, op))].append(op)
    graph = Graph(ops)
    for posted in by_communicator.values():
        for one, other in pairwise(posted):
            if not graph.must_precede(one, other):
                yield Problem(rank, other, f"may overtake {one} on their communicator")


class _Play:
    """All ranks at work, until nothing moves any more."""

    def __init__(
        self, ranks: Sequence[Sequence[Op]], grid: Grid, rules: Rules, run_ahead: int
    ) -> None:
        self._grid = grid
        self._rules = rules
        self._posted: Mapping[Channel, Mapping[int, deque[Op]]] = defaultdict(
            lambda: defaultdict(deque)
        )
        self._players = [_Player(rank, ops, run_ahead) for rank, ops in enumerate(ranks)]
        self._known: set[tuple[int, int]] = set()  # (step, micro-batch) that rank 0 has formed

    def deadlocked(self) -> list[Problem]:
        """Messages that wait in vain, or the first op that does where there is none."""
        while self._move():
            pass
        return [
            Problem(player.rank, op, "waits forever")
            for player in self._players
            for op in player.stuck()
        ]

    def _move(self) -> bool:
        moved = False
        for player in self._players:
            for op in player.advance(self._known):
                moved = True
                if op.lane in PEER_LANES:
                    channel = self._grid.channel_of(player.rank, op)
                    self._posted[channel][player.rank].append(op)
        for channel, ends in self._posted.items():
            moved |= self._meet(channel, ends)
        return moved

    def _meet(self, channel: Channel, ends: Mapping[int, deque[Op]]) -> bool:
        """Ops whose ends are all there are done; Gloo's sends need not wait so long."""
        moved = False
        if self._rules == Rules.GLOO:
            for rank in channel:
                for op in ends[rank]:
                    moved |= op.lane == Lane.SEND and self._players[rank].finish(op)
        while all(ends[rank] for rank in channel):
            for rank in channel:
                self._players[rank].finish(ends[rank].popleft())
            moved = True
        return moved


class _Player:
    """One rank: ops taken in order, done when what they wait for is."""

    def __init__(self, rank: int, ops: Sequence[Op], run_ahead: int) -> None:
        self.rank = rank
        self._ops = ops
        self._run_ahead = run_ahead
        self._num_taken = 0
        self._pending: dict[int, Op] = {}
        self._unmet: dict[int, int] = {}
        self._dependents: dict[int, list[int]] = defaultdict(list)
        self._ready: deque[Op] = deque()
        self._in_step: dict[int, int] = {}  # micro-batch -> the step whose COMMIT is out
        self._commits = any(op.kind == Kind.COMMIT for op in ops)

    def advance(self, known: set[tuple[int, int]]) -> Iterator[Op]:
        """Take ops and do those that wait for nobody else; yields all that happened."""
        while True:
            while self._takes(known):
                self._take(self._ops[self._num_taken], known)
            if not self._ready:
                return
            op = self._ready.popleft()
            if op.lane not in PEER_LANES:
                self.finish(op)
            yield op

    def finish(self, op: Op) -> bool:
        """`op` is done; whether it was not before."""
        if self._pending.pop(op.id, None) is None:
            return False
        if op.kind == Kind.COMMIT and op.batch is not None:
            self._in_step.pop(op.batch.index, None)
        for dependent in self._dependents.pop(op.id, ()):
            self._unmet[dependent] -= 1
            if not self._unmet[dependent]:
                self._ready.append(self._pending[dependent])
        return True

    def stuck(self) -> list[Op]:
        """Messages that were posted in vain; else the first op that was never taken or done."""
        waiting = [op for op in self._pending.values() if not self._unmet[op.id]]
        rest = [*self._pending.values(), *self._ops[self._num_taken :]]
        return waiting or rest[:1]

    def _takes(self, known: set[tuple[int, int]]) -> bool:
        if self._num_taken == len(self._ops) or len(self._pending) >= self._run_ahead:
            return False
        op = self._ops[self._num_taken]
        if op.batch is None or op.kind == Kind.COMMIT:
            return True
        if self.rank:
            return (op.step, op.batch.index) in known
        return self._in_step.get(op.batch.index, op.step) == op.step

    def _take(self, op: Op, known: set[tuple[int, int]]) -> None:
        self._num_taken += 1
        if op.batch is not None and not self.rank:
            known.add((op.step, op.batch.index))
            if self._commits:
                self._in_step.setdefault(op.batch.index, op.step)
        self._pending[op.id] = op
        unmet = [wait.op for wait in op.waits_for if wait.op in self._pending]
        self._unmet[op.id] = len(unmet)
        for before in unmet:
            self._dependents[before].append(op.id)
        if not unmet:
            self._ready.append(op)
