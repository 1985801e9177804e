"""Where a model is cut into stages.

The cut is found over predicted times: how long each rank would take for so many decoder layers,
with the embedding or the head where it has them, infinitely long where they do not fit its memory.
Devices may differ. Dynamic programming makes the slowest stage as quick as can be, since a pipeline
is no faster than that; among the cuts that do, the one whose stages are most alike wins. Decoder
layers are taken to be alike; a rank's layers are dealt evenly to its virtual stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

from flexpipe.errors import PlanError, PolicyError
from flexpipe.plan.arrangement import Arrangement

# seconds that a rank takes for so many decoder layers; inf where it cannot hold them
StageSeconds = Callable[[int, int], float]
Cut = tuple[int, ...]  # decoder layers of each virtual stage, in the order that hidden passes them
_CLEARLY = 1 - 1e-9  # sums of the same seconds differ by less than that


def even(num_layers: int, num_stages: int, num_chunks: int = 1) -> Cut:
    """The first stages have a layer more where the division leaves a rest."""
    _check_enough(num_layers, num_stages, num_chunks)
    return _dealt(num_layers, num_stages * num_chunks)


def by_hand(layers: Sequence[int], num_layers: int, num_stages: int, num_chunks: int = 1) -> Cut:
    """The cut as asked; refused where it is not one of this model into so many stages."""
    asked = ",".join(map(str, layers))
    if len(layers) != num_stages * num_chunks:
        virtual = f" of {num_chunks} virtual stages each" if num_chunks > 1 else ""
        raise PolicyError(
            f"--layers-per-stage {asked} names {len(layers)} stages, but there are {num_stages}"
            f"{virtual}; name {num_stages * num_chunks}"
        )
    if min(layers) < 1:
        raise PolicyError(
            f"--layers-per-stage {asked} leaves a stage without layers; give each at least 1"
        )
    if sum(layers) != num_layers:
        raise PolicyError(
            f"--layers-per-stage {asked} adds up to {sum(layers)}, but the model has {num_layers} "
            "layers; make the two equal"
        )
    return tuple(layers)


def simple_cut(arrangement: Arrangement, num_layers: int) -> Cut:
    """By hand where that is asked, else even."""
    where = num_layers, arrangement.num_stages, arrangement.num_chunks
    return even(*where) if arrangement.layers is None else by_hand(arrangement.layers, *where)


def cut_with(arrangement: Arrangement, rank: int, count: int, num_layers: int) -> Cut:
    """Any cut that gives a rank so many layers; all of them where it is the only one."""
    num_stages, num_chunks = arrangement.num_stages, arrangement.num_chunks
    if num_stages == 1:
        return (num_layers,)
    rest = iter(even(num_layers - count, num_stages - 1, num_chunks))
    own = iter(_dealt(count, num_chunks))
    places = range(num_stages * num_chunks)
    return tuple(next(own if place % num_stages == rank else rest) for place in places)


def most_even(num_layers: int, rooms: Sequence[int], num_chunks: int = 1) -> Cut | None:
    """The cut whose largest stage is smallest, with no more layers on any rank than it has room
    for; None where there is none."""
    if sum(rooms) < num_layers or min(rooms) < num_chunks or num_layers < num_chunks * len(rooms):
        return None
    level = next(n for n in range(1, num_layers + 1) if _filled(rooms, n) >= num_layers)
    full = num_layers - _filled(rooms, level - 1)  # so many ranks reach the level, the first ones
    reach = [rank for rank, room in enumerate(rooms) if room >= level][:full]
    counts = [min(room, level - 1) + (rank in reach) for rank, room in enumerate(rooms)]
    return _joined(counts, num_chunks)


def _filled(rooms: Sequence[int], level: int) -> int:
    return sum(min(room, level) for room in rooms)


def balanced(num_layers: int, num_stages: int, seconds: StageSeconds, num_chunks: int = 1) -> Cut:
    """The cut whose slowest stage is quickest; a PlanError where no cut fits."""
    _check_enough(num_layers, num_stages, num_chunks)
    table = _Table(num_layers, num_stages, seconds, num_chunks)
    most = table.least_maximum()
    if most == inf:
        raise PlanError(
            f"no cut of {num_layers} layers into {num_stages} stages fits their memories; use more "
            "stages, or give them more memory"
        )
    return _joined(table.most_alike(most), num_chunks)


def _check_enough(num_layers: int, num_stages: int, num_chunks: int) -> None:
    if num_layers < num_stages * num_chunks:
        virtual = f" of {num_chunks} virtual stages each" if num_chunks > 1 else ""
        raise PolicyError(
            f"a model of {num_layers} layers cannot be cut into {num_stages} stages{virtual}; use "
            "fewer"
        )


def _dealt(num_layers: int, num_parts: int) -> Cut:
    each, rest = divmod(num_layers, num_parts)
    return tuple(each + (part < rest) for part in range(num_parts))


def _joined(counts: Sequence[int], num_chunks: int) -> Cut:
    """Each rank's layers dealt to its virtual stages."""
    chunks = [_dealt(count, num_chunks) for count in counts]
    return tuple(own[chunk] for chunk in range(num_chunks) for own in chunks)


class _Best(NamedTuple):
    """What the ranks from some one on come to at best, and the layers of the first of them."""

    cost: float
    num_layers: int


class _Table:
    """Seconds of every rank for every number of layers, and the cuts they allow."""

    def __init__(
        self, num_layers: int, num_stages: int, seconds: StageSeconds, num_chunks: int
    ) -> None:
        self._num_layers, self._num_stages, self._least = num_layers, num_stages, num_chunks
        most = num_layers - (num_stages - 1) * num_chunks  # every other rank needs some too
        self._counts = range(num_chunks, most + 1)
        self._seconds = [
            {count: seconds(rank, count) for count in self._counts} for rank in range(num_stages)
        ]

    def least_maximum(self) -> float:
        """Seconds of the slowest stage, at best."""
        return self._best(lambda took, rest: max(took, rest), inf)[0][self._num_layers].cost

    def most_alike(self, most_s: float) -> Cut:
        """Layers per rank with no stage slower than that, and squares of seconds least in sum."""
        best = self._best(lambda took, rest: took * took + rest, most_s)
        counts, left = [], self._num_layers
        for rank in range(self._num_stages):
            counts.append(best[rank][left].num_layers)
            left -= counts[-1]
        return tuple(counts)

    def _best(
        self, joined: Callable[[float, float], float], most_s: float
    ) -> list[dict[int, _Best]]:
        """For the ranks from each one on, by the layers left to them. Of equal cuts the one whose
        earlier stages have more layers."""
        after = {0: _Best(0.0, 0)}
        tables = []
        for rank in reversed(range(self._num_stages)):
            here: dict[int, _Best] = {}
            for count in reversed(self._counts):
                took = self._seconds[rank][count]
                for left, rest in after.items() if took <= most_s else ():
                    cost = joined(took, rest.cost)
                    known = here.get(left + count)
                    if known is None or cost < known.cost * _CLEARLY:
                        here[left + count] = _Best(cost, count)
            tables.append({left: one for left, one in here.items() if left <= self._num_layers})
            after = tables[-1]
        return [*reversed(tables)]
