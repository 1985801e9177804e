"""Schedules of all stages of a pipeline, for the same steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st

from flexpipe.model.config import Shard, shard_config
from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import STRATEGIES, percent_shares
from flexpipe.schedule.op import Op
from flexpipe.schedule.step import MicroBatch, Row
from tests.schedule.plans import MicroBatches, ops_of, tiny_config, tiny_plan

RESIDENT = (100, 0, 100, 0, 100, 0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a pipeline decides its messages; two layers per virtual stage."""

    num_stages: int = 4
    num_shards: int = 1
    num_blocks: int = 4
    num_micro_batches: int = 1
    num_chunks: int = 1
    strategy: str = "event"
    async_comm: bool = True
    percent: tuple[int, ...] = RESIDENT

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(
            layers=(1,) * self.num_stages * self.num_chunks,
            num_stages=self.num_stages,
            num_blocks=self.num_blocks,
            async_comm=self.async_comm,
        )

    @property
    def plans(self) -> tuple[Plan, ...]:
        return _plans(self)


@cache
def _plans(shape: Shape) -> tuple[Plan, ...]:
    """One per rank, those of a stage's shards in a row, of a place per micro-batch."""
    config = tiny_config(num_hidden_layers=shape.num_stages * shape.num_chunks, vocab_size=97)
    knobs: dict[str, Any] = percent_shares(shape.percent)
    count = shape.num_micro_batches
    return tuple(
        tiny_plan(
            config=shard_config(config, Shard(index, shape.num_shards)),
            needs=[Need(9, 6)] * (shape.num_blocks * count),
            pipeline=shape.pipeline,
            rank=rank,
            micro_batch_size=1,
            num_micro_batches=count,
            strategy=shape.strategy,
            **knobs,
        )
        for rank in range(shape.num_stages)
        for index in range(shape.num_shards)
    )


@st.composite
def shapes(
    draw: st.DrawFn, *, most_stages: int = 8, most_shards: int = 1, percents: Any = None
) -> Shape:
    num_stages = draw(st.integers(1, most_stages))
    return Shape(
        num_stages=num_stages,
        num_shards=draw(st.sampled_from([size for size in (1, 1, 2, 4) if size <= most_shards])),
        num_blocks=draw(st.integers(1, 2 * num_stages + 1)),
        num_micro_batches=draw(st.integers(1, 3)),
        num_chunks=draw(st.integers(1, 3)) if num_stages > 1 else 1,
        strategy=draw(st.sampled_from(STRATEGIES)),
        async_comm=draw(st.booleans()),
        percent=draw(st.just(RESIDENT) if percents is None else percents),
    )


def random_steps(shape: Shape, num_steps: int, seed: int) -> list[MicroBatches]:
    """Blocks that end, micro-batches that are empty or sample nothing, prompts among tokens."""
    rng, plan = random.Random(seed), shape.plans[0]
    ends = [rng.randint(0, 2 * num_steps) for _ in plan.blocks]
    made = []
    for index in range(num_steps):
        block = index % len(plan.blocks)
        alive = index < ends[block]
        places = plan.blocks[block] if alive else range(0)
        made.append(tuple(_batch(mb, rng) for mb in places if rng.random() < 0.8))
    return made


def full_steps(shape: Shape, num_steps: int) -> list[MicroBatches]:
    """Every row decodes in every step."""
    plan = shape.plans[0]
    return [
        tuple(
            MicroBatch(mb, (Row(mb, 0, 5, (7,), True),))
            for mb in plan.blocks[index % len(plan.blocks)]
        )
        for index in range(num_steps)
    ]


def ranks_of(shape: Shape, steps: Sequence[MicroBatches]) -> list[list[Op]]:
    """The schedule of each rank."""
    return [ops_of(plan, steps) for plan in shape.plans]


def _batch(mb: int, rng: random.Random) -> MicroBatch:
    num_new = rng.choice([1, 1, 3, 5])
    return MicroBatch(mb, (Row(mb, 0, 4, tuple(range(num_new)), rng.random() < 0.7),))
