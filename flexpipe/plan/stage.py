"""A policy resolved for one stage: what rests where, which layers it has, which rows are in flight.

Which pools this takes follows in `flexpipe.plan.pools`, whether a machine has them in
`flexpipe.plan.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

from flexpipe.model.config import DTYPE_BYTES, ModelConfig
from flexpipe.model.cost import ONEDNN_ELEMENTS
from flexpipe.plan.block import MicroBatchPlan, block_ranges
from flexpipe.plan.codec import Codec
from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.layer_bytes import LayerBytes
from flexpipe.plan.layout import round_up
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import PlacedTensor, Placement
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Homes, layers and micro-batches of one stage, for one model and one set of requests.

    `micro_batches` are those of all blocks in flight, block by block. Where requests are unlike,
    their new tokens may come in `num_row_counts` numbers, else in a few.
    """

    config: ModelConfig
    policy: Policy
    pipeline: Pipeline
    rank: int
    device_tier: Tier
    compute_dtype: str
    placement: Placement
    layers: tuple[LayerPlan, ...]
    layer_bytes: LayerBytes
    micro_batches: tuple[MicroBatchPlan, ...]
    num_row_counts: int

    @property
    def streams_to_device(self) -> bool:
        """Whether an accelerator computes, so that host memory is a hop away."""
        return self.device_tier == Tier.GPU

    @property
    def compute_bytes(self) -> int:
        return DTYPE_BYTES[self.compute_dtype]

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return kv_token_bytes(self.config, self.compute_dtype, self.policy.cache_codec)

    @property
    def embeds(self) -> bool:
        return self.pipeline.embeds(self.rank)

    @property
    def has_head(self) -> bool:
        return self.pipeline.has_head(self.rank)

    @property
    def embedding(self) -> PlacedTensor:
        """The table that tokens are looked up in, where the stage embeds."""
        assert self.embeds
        return self.placement.tensors[self.config.tensor_names["embed_tokens"]]

    @property
    def embed_home(self) -> Tier:
        return self.embedding.home

    @property
    def embed_streams(self) -> bool:
        """Whether embedding rows are fetched one micro-batch at a time."""
        return self.embeds and self.embed_home != self.device_tier

    @property
    def num_head_layers(self) -> int:
        return sum(layer.kind == LayerKind.HEAD for layer in self.layers)

    @cached_property
    def chunks(self) -> tuple[tuple[LayerPlan, ...], ...]:
        """The layers of each range that hidden passes in one go."""
        starts = [layer.position for layer in self.layers if layer.begins_chunk]
        return tuple(
            self.layers[start:stop] for start, stop in pairwise([*starts, len(self.layers)])
        )

    @cached_property
    def decoder_layers(self) -> tuple[int, ...]:
        """The model's decoder layers that are this stage's."""
        return tuple(chain.from_iterable(self.pipeline.chunks(self.rank)))

    @property
    def num_decoder_layers(self) -> int:
        return len(self.decoder_layers)

    @cached_property
    def num_product_shapes(self) -> int:
        """Products that a CPU makes a kernel for, for every number of rows: by the shape of their
        weight, and whether they activate what they make."""
        parts = (
            part
            for layer in self.layers
            if layer.kind != LayerKind.EMBED
            for part in (*layer.resident, *layer.streamed.parts)
        )
        return len(
            {
                (part.shape, part.tensor.spec.role == "gate_proj")
                for part in parts
                if len(part.shape) == 2 and part.shape[0] * part.shape[1] >= ONEDNN_ELEMENTS
            }
        )

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """Indices of each block's micro-batches; step s works on block s modulo their number."""
        return block_ranges(len(self.micro_batches), self.pipeline.num_blocks)

    @cached_property
    def ranks_in_block(self) -> tuple[int, ...]:
        """Each micro-batch's index within its block."""
        return tuple(index for block in self.blocks for index in range(len(block)))

    @cached_property
    def streamed_layers(self) -> tuple[LayerPlan, ...]:
        """Layers whose weights travel, in the order of use."""
        return tuple(layer for layer in self.layers if layer.is_streamed)

    @property
    def num_weight_slots(self) -> int:
        """One for the streamed layer in use, and one for each that is loaded ahead."""
        return min(self.policy.prefetch_depth + 1, len(self.streamed_layers))

    @cached_property
    def attends_on_cpu(self) -> bool:
        """Whether some rows' queries go to their KV cache, not the cache to the accelerator."""
        wanted = self.policy.cpu_attention and self.streams_to_device
        return wanted and any(mb.places(Tier.CPU) for mb in self.micro_batches)

    def row_attends_on_cpu(self, mb: int, place: int, num_new: int) -> bool:
        """Whether the row at `place` of a micro-batch does, having `num_new` tokens to compute."""
        decodes = self.attends_on_cpu and num_new == 1
        return decodes and self.micro_batches[mb].kv_homes[place] == Tier.CPU

    def slot_places(self, mb: MicroBatchPlan) -> tuple[int, ...]:
        """Places whose KV cache passes through a slot, in the order they lie there."""
        off_device = (tier for tier in Tier if tier != self.device_tier)
        return tuple(place for tier in off_device for place in mb.places(tier))

    def slot_region_bytes(self, mb: MicroBatchPlan) -> int:
        """Distance between two rows in a KV slot."""
        return mb.region_bytes(Tier.DISK, self.token_bytes)

    def hidden_bytes(self, mb: MicroBatchPlan) -> int:
        """Room of one micro-batch's hidden, in whole blocks of the disk."""
        return round_up(mb.max_new_tokens * self.config.hidden_size * self.compute_bytes, 4096)

    @property
    def query_bytes(self) -> int:
        """Query, key and value of one token, as attention on the CPU takes them."""
        heads = self.config.num_heads + 2 * self.config.num_kv_heads
        return heads * self.config.head_dim * self.compute_bytes

    @property
    def embed_slot_bytes(self) -> int:
        """Room for the embedding rows of the largest micro-batch, as they travel."""
        if not self.embed_streams:
            return 0
        tokens = max(mb.max_new_tokens for mb in self.micro_batches)
        return round_up(tokens * self.embedding.row_bytes, 64)

    @cached_property
    def reorders_messages(self) -> bool:
        """Whether rows may lie in another order here than in messages, where places ascend."""
        if not self.pipeline.is_cut:
            return False
        return self.attends_on_cpu or any(len(set(mb.kv_homes)) > 1 for mb in self.micro_batches)

    @property
    def num_logits(self) -> int:
        """Logits buffers: one, unless a sliced head fills several micro-batches' in turn."""
        return 1 if self.num_head_layers == 1 else self.num_head_inputs

    @property
    def num_head_inputs(self) -> int:
        """One for each micro-batch of a block that meets the head."""
        return len(self.blocks[0]) if self.has_head else 0


def kv_token_bytes(config: ModelConfig, dtype: str, codec: Codec | None = None) -> int:
    """Keys and values of one token in one layer; each head's are compressed by themselves."""
    dim = config.head_dim
    head_bytes = dim * DTYPE_BYTES[dtype] if codec is None else codec.row_bytes(dim)
    return 2 * config.num_kv_heads * head_bytes
