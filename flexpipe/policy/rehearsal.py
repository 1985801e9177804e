"""A job's steps as counts, and which of them are alike.

The steps follow from the requests (`flexpipe.schedule.places`) before anything is priced. Of a long
job every so manieth request is taken. Kinds of steps are told apart by what they cost: new tokens,
keys that decoding rows see, rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import numpy.typing as npt

from flexpipe.model.cost import RESULT_ROWS
from flexpipe.plan.block import Need
from flexpipe.plan.plan import Plan
from flexpipe.schedule.places import Counts, IntArray, Part, Places
from flexpipe.schedule.step import MicroBatch, Row

FULL_BLOCKS = 4  # a job of more blocks than this is counted with every so manieth request
_GRAINS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # in powers of two of tokens

StepCounts = Mapping[int, Counts]  # by micro-batch


@dataclass(slots=True)
class Rehearsal:
    """What each micro-batch computes in each step, and how often a step like it comes.

    `stays` are the first and last step of each request.
    """

    steps: list[dict[int, Counts]]
    weights: list[float]
    stays: list[tuple[int, int]]

    @classmethod
    def of(cls, plan: Plan, needs: Sequence[Need]) -> Rehearsal:
        """Of all requests, or of every so manieth: then steps of the steady state, in which rows
        leave and others wait, stand for so many more as make the tokens right."""
        num_places = sum(mb.num_places for mb in plan.micro_batches)
        every = max(1, len(needs) // (FULL_BLOCKS * num_places))
        made = _Rehearse(plan, needs[::every]).run()
        made._stretch(sum(need.output for need in needs))
        return made

    def count_ops(self, plan: Plan) -> float:
        """About how many ops a stage of the job has."""
        pairs = zip(self.steps, self.weights, strict=True)
        batches = sum(weight * len(step) for step, weight in pairs)
        per_layer = 1 + 2 * any(plan.slot_places(mb) for mb in plan.micro_batches)
        per_layer += 2 * any(mb.hidden_home != plan.device_tier for mb in plan.micro_batches)
        streams = 2 * len(plan.streamed_layers) * len(self.steps)
        return batches * (per_layer * len(plan.layers) + 3) + streams

    def kinds(self, most: int) -> tuple[IntArray, IntArray]:
        """Steps almost alike: of each kind the most typical one, and for every step its kind."""
        features = np.array([step_features(step) for step in self.steps])
        for grain in _GRAINS:
            kinds, kind_of = np.unique(np.round(features / grain), axis=0, return_inverse=True)
            kind_of = kind_of.reshape(-1)
            if len(kinds) <= most:
                break
        typical = []
        for kind in range(len(kinds)):
            members = np.flatnonzero(kind_of == kind)
            tokens = 2.0 ** features[members]  # what a step costs is linear in tokens
            gaps = np.abs(tokens / tokens.mean(0) - 1).sum(1)
            typical.append(members[gaps.argmin()])
        return np.array(typical), kind_of

    def num_new_rows(self) -> tuple[int, int]:
        """How often a product meets a number of rows for the first time: in steps that prefill, and
        in others."""
        known: set[int] = set()
        firsts = [0, 0]
        for step in self.steps:
            rows = [int(parts.num_new.sum()) for parts in step.values()]
            met = {RESULT_ROWS for count in rows if count >= RESULT_ROWS}
            met |= {count % RESULT_ROWS for count in rows if count % RESULT_ROWS}
            firsts[all(parts.decodes.all() for parts in step.values())] += len(met - known)
            known |= met
        return firsts[0], firsts[1]

    def _stretch(self, num_tokens: int) -> None:
        """Weigh the steady steps so that all steps together sample `num_tokens`."""
        sampled = np.array([sum(p.sampled.sum() for p in s.values()) for s in self.steps])
        steady = np.array(self.weights) == 0
        rest = float(sampled[~steady].sum())
        factor = (num_tokens - rest) / max(1.0, float(sampled[steady].sum()))
        self.weights = np.where(steady, factor, 1.0).tolist()


class _Rehearse:
    """Goes through a job's steps without costs; every micro-batch comes back at once. What is
    steady has the weight 0."""

    def __init__(self, plan: Plan, needs: Sequence[Need]) -> None:
        self._left = [np.zeros(mb.num_places, np.int64) for mb in plan.micro_batches]
        self._since = [np.zeros(mb.num_places, np.int64) for mb in plan.micro_batches]
        self._blocks = plan.blocks
        self._places: Places[Need] = Places(plan, needs, self._seat, row_of)
        self._made = Rehearsal([], [], [])

    def run(self) -> Rehearsal:
        made = self._made
        for block in cycle(self._blocks):
            if self._places.is_done:
                break
            is_steady = bool(made.stays) and not self._places.is_tail
            step: dict[int, Counts] = {}
            for mb in block:
                parts = self._places.form(mb)
                if parts is not None:
                    step[mb] = parts
                    self._take(mb, parts)
            if step:
                made.steps.append(step)
                made.weights.append(0.0 if is_steady else 1.0)
        return made

    def _take(self, mb: int, parts: Counts) -> None:
        self._places.advance(mb, parts)
        sampled = parts.place[parts.sampled]
        left = self._left[mb]
        left[sampled] -= 1
        ended = sampled[left[sampled] == 0]
        self._places.go_on(mb, sampled)
        if len(ended):
            self._places.leave(mb, ended)
            now = len(self._made.steps)
            self._made.stays += [(int(first), now) for first in self._since[mb][ended]]

    def _seat(self, mb: int, place: int, need: Need) -> int:
        self._left[mb][place], self._since[mb][place] = need.output, len(self._made.steps)
        return need.prompt


def row_of(mb: int, part: Part) -> Row:
    """A row that has a part in a step, of no request in particular."""
    return Row(0, part.place, part.num_context, range(part.num_new), part.sampled)


def batches_of(step: StepCounts) -> dict[int, MicroBatch]:
    """The micro-batches of a step."""
    return {
        mb: MicroBatch(mb, tuple(map(partial(row_of, mb), parts.parts)))
        for mb, parts in step.items()
    }


def unlike(steps: Sequence[StepCounts], count: int) -> tuple[list[int], IntArray]:
    """So many steps unlike each other, and for every step the one of them that is most like it."""
    features = np.array([step_features(step) for step in steps])
    chosen = [0]
    distance = _distances(features, chosen[0])
    while len(chosen) < min(count, len(features)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, _distances(features, chosen[-1]))
    to_each = np.stack([_distances(features, index) for index in chosen])
    return chosen, to_each.argmin(0)


def step_features(step: StepCounts) -> tuple[float, ...]:
    """On logarithmic axes: new tokens, keys that decoding rows see, and rows that are sampled."""
    new = sum(int(parts.num_new.sum()) for parts in step.values())
    seen = sum(int(parts.num_context.sum()) for parts in step.values())
    sampled = sum(int(parts.sampled.sum()) for parts in step.values())
    return float(np.log2(1 + new)), float(np.log2(64 + seen)), float(np.log2(1 + sampled))


def _distances(features: npt.NDArray[np.float64], index: int) -> IntArray:
    gaps: IntArray = np.abs(features - features[index]).sum(1)
    return gaps
