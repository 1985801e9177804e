"""Every discrete choice that a policy leaves free, each with its shares and an estimated time.

A choice is a block's shape, where hidden rests, where decoding rows attend, what resident weights
are held in. For each, and for weights and KV cache resting or travelling, a linear programme gives
the shares and an optimistic time (`flexpipe.policy.shares`). A knob that is given stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import Any

from flexpipe.errors import PolicyError
from flexpipe.model.config import DTYPE_BYTES
from flexpipe.plan.block import Need
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.estimate import Demand
from flexpipe.policy.shares import (
    KINDS,
    Machine,
    SharesProgramme,
    Solution,
    Travels,
    all_on,
)

SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
COUNTS = (1, 2, 4, 8)
TOKENS = 2048
TRAVELS: tuple[Travels, ...] = ((False, False), (False, True), (True, False), (True, True))


@dataclass(frozen=True, slots=True)
class Choice:
    """Knobs but for the shares, the shares, and the estimated seconds."""

    knobs: Mapping[str, Any]
    solution: Solution

    @property
    def rows(self) -> int:
        return int(self.knobs["micro_batch_size"] * self.knobs["num_micro_batches"])


class Choices:
    """The choices of one stage, for one model, its requests and a machine."""

    def __init__(
        self,
        given: Mapping[str, Any],
        planner: Planner,
        needs: Sequence[Need],
        machine: Machine,
        *,
        max_latency_s: float | None = None,
        max_disk_writes: float | None = None,
        coarse: bool = False,
    ) -> None:
        """At most `max_disk_writes` bytes go to disk per 1,000 generated tokens. `coarse` leaves
        hidden beside the device."""
        self.given = given
        self.fixed = {name: given[name] for name in KINDS if name in given}
        self.demand = Demand.of(needs)
        self.num_choices = 0
        self._planner = planner
        self._num_rows = -(-len(needs) // planner.pipeline.num_blocks)
        self._machine = machine
        self._max_latency_s = max_latency_s
        self._coarse = coarse
        tokens = self.demand.num_requests * self.demand.output
        self._most_written = inf if max_disk_writes is None else max_disk_writes * tokens / 1000
        self._programmes: dict[object, SharesProgramme] = {}

    @property
    def is_given(self) -> bool:
        """Whether nothing is left to choose that an estimate could tell apart."""
        shape = {"micro_batch_size", "num_micro_batches", "weights", "kv_cache", "hidden"}
        return shape <= self.given.keys()

    def knobs(self) -> Iterator[dict[str, Any]]:
        """Every combination of the discrete choices that are free."""
        given, machine = self.given, self._machine
        on_accelerator = machine.device_tier == Tier.GPU
        hidden = machine.tiers[: 2 if on_accelerator and not self._coarse else 1]
        free: dict[str, Sequence[Any]] = {
            "hidden": [all_on(tier) for tier in hidden],
            "cpu_attention": (False, True) if on_accelerator else (False,),
            "resident_dtype": ("compute", "checkpoint") if self._dtypes_differ else ("compute",),
        }
        names = [name for name in free if name not in given]
        for size, count in self._shapes():
            for values in product(*(free[name] for name in names)):
                chosen = dict(zip(names, values, strict=True))
                shape = {"micro_batch_size": size, "num_micro_batches": count}
                tokens = {"max_batch_tokens": max(TOKENS, size)}
                yield {**tokens, **chosen, **shape, **given}

    def _shapes(self) -> Iterator[tuple[int, int]]:
        given, rows = self.given, self._num_rows
        most = given.get("max_batch_tokens")
        enough = min((size for size in SIZES if size >= rows), default=SIZES[0])
        sizes = [given["micro_batch_size"]] if "micro_batch_size" in given else SIZES
        counts = [given["num_micro_batches"]] if "num_micro_batches" in given else COUNTS
        for size, count in product(sizes, counts):
            fits = len(sizes) == 1 or (size <= enough and (most is None or size <= most))
            needed = len(counts) == 1 or count == 1 or size * (count // 2) < rows
            if fits and needed:
                yield size, count

    @property
    def _dtypes_differ(self) -> bool:
        """Whether weights are smaller in the checkpoint's dtype than in the compute dtype."""
        config, compute = self._planner.config, self._planner.compute_dtype
        return DTYPE_BYTES[config.dtype] < DTYPE_BYTES[compute]

    def estimated(self, all_knobs: Iterable[Mapping[str, Any]]) -> list[Choice]:
        """All choices that may fit, quickest first by estimate."""
        choices = [choice for knobs in all_knobs for choice in self.solved(knobs, self.fixed)]
        self.num_choices += len(choices)
        return sorted(choices, key=self.promise)

    def promise(self, choice: Choice) -> tuple[bool, float]:
        """What may keep the limits comes first, and of that the quickest."""
        most_s = self._max_latency_s
        return most_s is not None and choice.solution.latency_s > most_s, choice.solution.seconds

    def solved(self, knobs: Mapping[str, Any], fixed: Mapping[str, Shares]) -> Iterator[Choice]:
        """With weights, and KV cache, all at home beside the device or travelling."""
        programme = self._programme(knobs)
        device = all_on(self._machine.device_tier)
        for travels in TRAVELS:
            pairs = zip(KINDS, travels, strict=True)
            if any(kind in fixed and (fixed[kind] != device) != moves for kind, moves in pairs):
                continue
            if knobs["cpu_attention"] and "cpu_attention" not in self.given and not travels[1]:
                continue  # the same as without
            try:
                solution = programme.solve(fixed, travels=travels)
            except PolicyError:  # no whole tensor meets a given share, or the profile lacks a rate
                if self.is_given:
                    raise
                continue
            if solution is not None:
                yield Choice(knobs, solution)
                if not any(travels):
                    return  # nothing that moves is faster than what rests

    def _programme(self, knobs: Mapping[str, Any]) -> SharesProgramme:
        """That of these knobs, whose shares do not count; each is made once."""
        key = frozenset((name, value) for name, value in knobs.items() if name not in KINDS)
        if key not in self._programmes:
            how = self._planner, self._machine, self.demand, knobs, self._most_written
            self._programmes[key] = SharesProgramme(*how)
        return self._programmes[key]
