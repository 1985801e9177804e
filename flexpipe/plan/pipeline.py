"""How ranks share a model's layers, and how many blocks are on their way among them.

Hidden passes the virtual stages one after the other, and the ranks form a ring: virtual stage i
belongs to rank i mod N, the first one embeds, the last one has the head. Usually a rank has one
chunk of layers; with several (virtual stages), hidden goes round the ring as often.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from flexpipe.errors import PolicyError


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """The cuts of a model, and what flows through them.

    `layers` counts the decoder layers of each virtual stage in the order hidden passes them.
    `num_blocks` are in flight. Without `async_comm` a rank's messages come one after the other.
    """

    layers: tuple[int, ...]
    num_stages: int = 1
    num_blocks: int = 1
    async_comm: bool = True

    def __post_init__(self) -> None:
        if self.num_stages < 1 or self.num_blocks < 1:
            raise PolicyError(
                f"a pipeline has at least one stage and one block in flight, got "
                f"{self.num_stages} and {self.num_blocks}"
            )
        if not self.layers or len(self.layers) % self.num_stages:
            raise PolicyError(
                f"{self.num_stages} stages take as many groups of layers each, "
                f"got {len(self.layers)} groups"
            )
        if min(self.layers) < 1:
            raise PolicyError(
                f"every stage has at least one layer, got {', '.join(map(str, self.layers))}; "
                "use fewer stages"
            )
        if self.num_stages == 1 and len(self.layers) > 1:
            raise PolicyError("virtual stages need more than one stage to take turns")

    @classmethod
    def whole(cls, num_layers: int, *, num_blocks: int = 1) -> Pipeline:
        """One stage that has all layers."""
        return cls(layers=(num_layers,), num_blocks=num_blocks)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return sum(self.layers)

    @property
    def num_chunks(self) -> int:
        """Ranges of layers per rank."""
        return len(self.layers) // self.num_stages

    @property
    def is_cut(self) -> bool:
        """Whether hidden passes from rank to rank."""
        return self.num_stages > 1

    def chunk(self, rank: int, chunk: int) -> range:
        """Decoder layers of one of a rank's chunks."""
        stage = chunk * self.num_stages + rank
        end = list(accumulate(self.layers))[stage]
        return range(end - self.layers[stage], end)

    def chunks(self, rank: int) -> tuple[range, ...]:
        """Decoder layers of a rank, chunk by chunk."""
        return tuple(self.chunk(rank, chunk) for chunk in range(self.num_chunks))

    def embeds(self, rank: int) -> bool:
        """Whether tokens become hidden there."""
        return rank == 0

    def has_head(self, rank: int) -> bool:
        """Whether hidden becomes tokens there."""
        return rank == self.num_stages - 1
