"""What one trip of a block through the layers works on.

A step is formed by the job, micro-batch by micro-batch, as tokens come back; the schedule only asks
which rows have tokens behind them and where their KV cache rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpipe.model.draw import Draw


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence in a step: its place, the tokens behind it and the tokens to compute.

    `place` is the row's index within its micro-batch and decides where its KV cache lies. `tokens`
    are the ids to compute now; `sampled` says whether the last of them asks for a next token
    (false for all but the last chunk of a prompt), `draw` how; None takes the likeliest.
    """

    request: int
    place: int
    num_context: int
    tokens: Sequence[int]
    sampled: bool
    draw: Draw | None = None

    @property
    def num_new(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one step that pass through a layer together, by ascending place."""

    index: int
    rows: tuple[Row, ...]

    @property
    def num_new(self) -> int:
        return sum(row.num_new for row in self.rows)

    @property
    def num_sampled(self) -> int:
        return sum(row.sampled for row in self.rows)
