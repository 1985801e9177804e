"""How long a rank would take for so many layers: the linear programme's estimate, here and there.

An estimate costs a plan of that stage and a few linear programmes, too much for every number of
layers. Some are estimated, and how many layers a rank can hold is found by halving; between them
the times lie on lines. Whoever chooses by these times has what was chosen estimated, and chooses
again, until nothing new comes up. Ranks on machines alike share their estimates.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from math import inf

from flexpipe.policy.partition import Cut, balanced

Estimate = Callable[[int, int], float]  # of a rank with so many layers; inf where nothing fits
_MOST_ROUNDS = 8


class StageTimes:
    """Seconds of every rank by its decoder layers, from an estimate that costs something.

    `alike` names what decides a rank's times; `usual` is a number of layers that is worth knowing.
    """

    def __init__(
        self, estimate: Estimate, alike: Sequence[Hashable], least: int, usual: int, most: int
    ) -> None:
        self._estimate = estimate
        self._alike = alike
        self._range = least, most
        self._usual = usual
        self._known: dict[Hashable, dict[int, float]] = {}
        self._limits: dict[Hashable, int] = {}

    def __call__(self, rank: int, num_layers: int) -> float:
        """As estimated, or between the nearest estimates."""
        if num_layers > self._limit(rank):
            return inf
        known = self._known[self._alike[rank]]
        if num_layers in known:
            return known[num_layers]
        counts = sorted(count for count in known if known[count] < inf)
        above = min(max(1, bisect_left(counts, num_layers)), len(counts) - 1)
        low, high = counts[above - 1], counts[above]
        slope = (known[high] - known[low]) / (high - low)
        return known[low] + slope * (num_layers - low)

    def exact(self, rank: int, num_layers: int) -> float:
        known = self._known.setdefault(self._alike[rank], {})
        if num_layers not in known:
            known[num_layers] = self._estimate(rank, num_layers)
        return known[num_layers]

    def _limit(self, rank: int) -> int:
        """The most layers that the rank can hold; 0 where it can hold none."""
        key = self._alike[rank]
        if key not in self._limits:
            least, most = self._range
            fits, fails = least - 1, most + 1
            tried = most
            while fits + 1 < fails:
                if self.exact(rank, tried) < inf:
                    fits = tried
                else:
                    fails = tried
                tried = self._usual if fits < self._usual < fails else (fits + fails) // 2
            self._limits[key] = fits
            for count in (least, self._usual):  # two points make a line
                self.exact(rank, count)
        return self._limits[key]


def balanced_by(times: StageTimes, num_layers: int, num_stages: int, num_chunks: int) -> Cut:
    """The cut whose slowest stage is quickest, every stage of it estimated."""
    for _ in range(_MOST_ROUNDS):
        cut = balanced(num_layers, num_stages, times, num_chunks)
        counts = [sum(cut[rank::num_stages]) for rank in range(num_stages)]
        guessed = [times(rank, count) for rank, count in enumerate(counts)]
        if guessed == [times.exact(rank, count) for rank, count in enumerate(counts)]:
            break
    return cut
