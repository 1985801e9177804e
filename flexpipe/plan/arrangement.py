"""How a user wants a model shared among ranks, before anything is known of model or machines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from flexpipe.errors import PolicyError
from flexpipe.plan.pipeline import Pipeline

Partition = Literal["balanced", "even"]
PARTITIONS: tuple[Partition, ...] = get_args(Partition)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """Stages, and ranks that serve each of them; blocks in flight (None: one per stage), virtual
    stages of a rank, and who cuts: `partition`, or `layers` of every virtual stage by hand."""

    num_stages: int = 1
    num_shards: int = 1
    num_blocks: int | None = None
    num_chunks: int = 1
    async_comm: bool = True
    partition: Partition = "balanced"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        counts = (self.num_stages, self.num_shards, self.num_chunks)
        if min(counts) < 1 or (self.num_blocks is not None and self.num_blocks < 1):
            raise PolicyError(f"counts of an arrangement start at 1, got {self}")
        if self.partition not in PARTITIONS:
            known = ", ".join(PARTITIONS)
            raise PolicyError(f"--partition is one of {known}, got {self.partition!r}")
        if self.layers is not None and self.partition == "even":
            raise PolicyError("--layers-per-stage and --partition exclude each other; drop one")
        if self.num_chunks > 1 and self.num_stages == 1:
            raise PolicyError("--virtual-stages needs --pipeline-parallel-size 2 or more")

        if self.layers is not None and self.num_stages == 1:
            raise PolicyError(
                f"--layers-per-stage names {len(self.layers)} stages, but --pipeline-parallel-size "
                "is 1; make the two equal"
            )

    @property
    def num_ranks(self) -> int:
        """Processes that work together."""
        return self.num_stages * self.num_shards

    @property
    def num_blocks_in_flight(self) -> int:
        return self.num_blocks or self.num_stages

    @property
    def is_searched(self) -> bool:
        """Whether the cut follows from what stages would take."""
        return self.layers is None and self.partition == "balanced" and self.num_stages > 1

    def of_stages(self, num_stages: int, layers: tuple[int, ...] | None) -> Arrangement:
        """The same for so many stages, cut so where nothing else is asked."""
        if self.num_stages not in (1, num_stages):
            raise PolicyError(
                f"--pipeline-parallel-size is {self.num_stages}, but the policy file has "
                f"{num_stages} stages; make the two equal"
            )
        if layers is None or self.layers is not None or self.partition == "even":
            return replace(self, num_stages=num_stages)
        num_chunks = len(layers) // num_stages
        return replace(self, num_stages=num_stages, num_chunks=num_chunks, layers=layers)

    def pipeline(self, cut: tuple[int, ...]) -> Pipeline:
        """A model in so many stages, with so many layers in each virtual one."""
        return Pipeline(
            layers=cut,
            num_stages=self.num_stages,
            num_blocks=self.num_blocks_in_flight,
            async_comm=self.async_comm,
        )

    @classmethod
    def parse_layers(cls, text: str) -> tuple[int, ...]:
        """`10,14,8` as layers per stage."""
        try:
            return tuple(int(word) for word in text.split(","))
        except ValueError:
            raise PolicyError(
                f"cannot read {text!r} as layers per stage; write it like 10,14,8"
            ) from None
