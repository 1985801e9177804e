"""How steps pass the stages of a pipeline, each a box that takes its time.

A block's step visits the stages in order; a stage takes its visits in order, one after the other;
a block's next step begins when its tokens are back and committed, or, where a strategy drains,
when those of the whole round are. A stage begins with a block's first micro-batch while the one
before still works at the last: layers are passed by all micro-batches of the block, so hidden comes
out of the last one only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexpipe.plan.pipeline import Pipeline

FloatArray = npt.NDArray[np.float64]


class StepShape(NamedTuple):
    """What of a step matters here: its block, and its micro-batches."""

    block: int
    num_micro_batches: int


class Flow(NamedTuple):
    """When each step began on the first stage, and when its tokens were back."""

    begins_s: FloatArray
    ends_s: FloatArray

    @property
    def took_s(self) -> FloatArray:
        """What each step added to the time of the job."""
        return np.diff(self.ends_s, prepend=0.0)


def flow(
    pipeline: Pipeline,
    steps: Sequence[StepShape],
    seconds: FloatArray,
    message_s: FloatArray,
    return_s: FloatArray,
    *,
    drains: bool,
) -> Flow:
    """`seconds[rank, step]` is what the rank alone takes for a step, all its chunks together;
    `message_s[step]` what the hidden of one of its micro-batches takes to the next rank,
    `return_s[step]` what its tokens take from the last rank to the step that follows."""
    begins_s, ends_s = np.zeros(len(steps)), np.zeros(len(steps))
    free_s = [0.0] * pipeline.num_stages
    back_s = [0.0] * pipeline.num_blocks
    for round in _rounds(steps):
        ready_s = [max(back_s) if drains else back_s[steps[index].block] for index in round]
        heads_s, tails_s = [*ready_s], [*ready_s]
        for chunk in range(pipeline.num_chunks):
            for at, index in enumerate(round):
                for rank in range(pipeline.num_stages):
                    took_s = float(seconds[rank, index]) / pipeline.num_chunks
                    layers = pipeline.layers[chunk * pipeline.num_stages + rank]
                    count = steps[index].num_micro_batches
                    lead_s = took_s * (1 - (count - 1) / (count * layers))
                    begin_s = max(heads_s[at], free_s[rank])
                    free_s[rank] = max(begin_s + took_s, tails_s[at] + lead_s)
                    if chunk == rank == 0:
                        begins_s[index] = begin_s
                    heads_s[at] = begin_s + lead_s + float(message_s[index])
                    tails_s[at] = free_s[rank] + float(message_s[index])
        for at, index in enumerate(round):
            ends_s[index] = tails_s[at] - message_s[index]  # the last one sends no hidden
            back_s[steps[index].block] = ends_s[index] = ends_s[index] + return_s[index]
    return Flow(begins_s, ends_s)


def _rounds(steps: Sequence[StepShape]) -> Iterator[list[int]]:
    """Steps by turns of the blocks; a block that has none is passed over."""
    round: list[int] = []
    for index, step in enumerate(steps):
        if round and step.block <= steps[round[-1]].block:
            yield round
            round = []
        round.append(index)
    if round:
        yield round
