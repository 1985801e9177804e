"""All that is known before a byte moves: homes, layers, pools, budgets.

The pools sized here are the pools the runtime takes, to the byte. A plan that does not fit its
budgets is refused before anything is loaded, with the shortfall per tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

from flexpipe.errors import PlanError
from flexpipe.model.config import (
    DTYPE_BYTES,
    HELD_BYTES,
    ModelConfig,
)
from flexpipe.model.cost import (
    batch_bytes,
    cpu_attention_bytes,
    transient_bytes,
    widen_bytes,
    workspace_bytes,
)
from flexpipe.plan.block import KV_PAGE, MicroBatchPlan, Need, Queue, block_ranges, block_shape
from flexpipe.plan.codec import Codec
from flexpipe.plan.layer import LayerKind, LayerPlan, stage_layers
from flexpipe.plan.layout import PACK_ALIGN, round_up
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import (
    FormOf,
    PlacedTensor,
    Placement,
    Stored,
    place_weights,
    stage_tensors,
)
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier
from flexpipe.units import MIB, format_bytes

NUM_KV_SLOTS = 3  # one loading, one in use, one being stored
NUM_HIDDEN_SLOTS = 3
NUM_STAGES = 2  # host buffers on the way between disk and accelerator: one fills, one drains
NUM_EMBED_SLOTS = 2
NUM_ATTENTION_SLOTS = 2  # one micro-batch attends on the CPU, another one on the device
NUM_PARTIAL_SLOTS = 3  # of a micro-batch's two halves, and of another one's that computes meanwhile
# What the process takes beside the pools; 0 to 75 MiB were seen. While loading: two buffers of 32
# MiB and the bounce ring (16 MiB). Later BLAS's packing buffers and the holes that prompts of many
# lengths leave in the allocator's heaps.
PROCESS_SLACK = 88 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPlan:
    """Bytes taken once, at start: `num_slots` equal slots on a tier."""

    name: str
    tier: Tier
    slot_bytes: int
    num_slots: int = 1

    @property
    def num_bytes(self) -> int:
        return self.slot_bytes * self.num_slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Bytes each tier may spend in this run; on disk only what the run itself writes.

    `overhead` is what the process held on the cpu tier before the plan was made.
    """

    gpu: int
    cpu: int
    disk: int
    overhead: int = 0

    def of(self, tier: Tier) -> int:
        num_bytes: int = getattr(self, tier.value)
        return num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBytes:
    """What a stage's layers come to, whatever the block: bytes at home beside the device, the
    largest slot and the largest read, and host memory that weights travel from, by owner.

    A layer's tensors are one slab, so that its load is one move. What the head's slices or the
    embedding use is a slab per tensor, by tensor name: a tied one serves both.
    `max_convert_elements` is the size of the largest weight that meets a product in another dtype
    than its own, `wire_bytes` the width of the widest number, and some may be compressed.
    """

    resident: int
    slot: int
    stage: int
    host_slabs: Mapping[str, int]
    max_convert_elements: int
    wire_bytes: int
    is_compressed: bool

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerPlan],
        placement: Placement,
        embedding: PlacedTensor | None,
        device: Tier,
        compute_dtype: str,
    ) -> LayerBytes:
        resident = {
            part.tensor.spec.name: round_up(part.tensor.num_bytes, PACK_ALIGN)
            for layer in layers
            for part in layer.resident
        }
        convert = [
            part.tensor.spec.num_elements // part.tensor.spec.shape[0] * part.shape[0]
            for layer in layers
            for part in (*layer.resident, *layer.streamed.parts)
            if part.tensor.dtype != compute_dtype
            # looked up row by row; the head multiplies by all of it where it is tied
            and (layer.kind == LayerKind.HEAD or part.tensor.spec.role != "embed_tokens")
        ]
        return cls(
            resident=sum(resident.values()),
            slot=max(layer.streamed.num_bytes for layer in layers),
            stage=max(layer.streamed.read_bytes for layer in layers),
            host_slabs=_host_slabs(layers, embedding, device),
            max_convert_elements=max(convert, default=0),
            wire_bytes=max(HELD_BYTES[placed.dtype] for placed in placement.tensors.values()),
            is_compressed=any(placed.codec for placed in placement.tensors.values()),
        )


def _host_slabs(
    layers: Sequence[LayerPlan], embedding: PlacedTensor | None, device: Tier
) -> dict[str, int]:
    slabs = {}
    for layer in layers:
        if layer.kind != LayerKind.HEAD:
            slabs[layer.name] = layer.streamed.pack_bytes
            continue
        for part in layer.streamed.parts:
            if part.tensor.home == Tier.CPU:
                name = part.tensor.spec.name
                slabs[name] = round_up(part.tensor.num_bytes, PACK_ALIGN)
    if device != Tier.CPU and embedding is not None and embedding.home == Tier.CPU:
        slabs[embedding.spec.name] = round_up(embedding.num_bytes, PACK_ALIGN)
    return {name: num_bytes for name, num_bytes in slabs.items() if num_bytes}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A policy resolved for one stage, one model and one set of requests.

    `micro_batches` are those of all blocks in flight, block by block.
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
    budgets: Budgets

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

    @cached_property
    def pools(self) -> tuple[PoolPlan, ...]:
        """Every byte the runtime will take, pool by pool."""
        made = [
            *self._weight_pools(),
            *self._kv_pools(),
            *self._hidden_pools(),
            *self._attention_pools(),
            *self._compute_pools(),
            *self._message_pools(),
            *self._sum_pools(),
        ]
        return tuple(pool for pool in made if pool.num_bytes)

    def tier_bytes(self, tier: Tier) -> int:
        """Planned peak on a tier, the process's own overhead included."""
        total = sum(pool.num_bytes for pool in self.pools if pool.tier == tier)
        if tier == self.device_tier:
            total += self.transient_bytes
        if tier == Tier.CPU:
            total += self.budgets.overhead + PROCESS_SLACK
        if tier == Tier.DISK:
            total += self.placement.new_bytes
        return total

    def shortfalls(self) -> dict[Tier, int]:
        """Bytes missing per tier; empty when the plan fits."""
        missing = {tier: self.tier_bytes(tier) - self.budgets.of(tier) for tier in Tier}
        return {tier: num_bytes for tier, num_bytes in missing.items() if num_bytes > 0}

    def describe(self, tier: Tier) -> str:
        """What the tier would hold, largest first, for messages."""
        parts = sorted(
            ((pool.num_bytes, pool.name) for pool in self.pools if pool.tier == tier), reverse=True
        )
        if tier == self.device_tier:
            parts.append((self.transient_bytes, "temporaries"))
        if tier == Tier.CPU:
            parts.append((self.budgets.overhead + PROCESS_SLACK, "process"))
        if tier == Tier.DISK and self.placement.new_bytes:
            parts.append((self.placement.new_bytes, "weights to compress or repack"))
        return ", ".join(f"{name} {format_bytes(size)}" for size, name in parts)

    def _weight_pools(self) -> list[PoolPlan]:
        device = self.device_tier
        sizes = self.layer_bytes
        pools = [
            PoolPlan(name="weights", tier=device, slot_bytes=sizes.resident),
            PoolPlan(
                name="weight slots",
                tier=device,
                slot_bytes=sizes.slot,
                num_slots=self.num_weight_slots,
            ),
        ]
        if self.streams_to_device:
            pools += [
                PoolPlan(name="weights", tier=Tier.CPU, slot_bytes=sum(sizes.host_slabs.values())),
                PoolPlan(
                    name="weight staging",
                    tier=Tier.CPU,
                    slot_bytes=sizes.stage,
                    num_slots=NUM_STAGES,
                ),
            ]
        return pools

    def _kv_pools(self) -> list[PoolPlan]:
        layers, token_bytes = self.num_decoder_layers, self.token_bytes
        pools = []
        for tier in Tier:
            rooms = (
                mb.num_places_on(tier) * mb.region_bytes(tier, token_bytes)
                for mb in self.micro_batches
            )
            pools.append(PoolPlan(name="KV cache", tier=tier, slot_bytes=layers * sum(rooms)))
        slot = max(
            (mb.num_places - mb.num_places_on(self.device_tier)) * self.slot_region_bytes(mb)
            for mb in self.micro_batches
        )
        on_disk = sum(mb.num_places_on(Tier.DISK) for mb in self.micro_batches)
        stage = max(
            mb.num_places_on(Tier.DISK) * self.slot_region_bytes(mb) for mb in self.micro_batches
        )
        pools += [
            PoolPlan(
                name="KV slots", tier=self.device_tier, slot_bytes=slot, num_slots=NUM_KV_SLOTS
            ),
            PoolPlan(name="KV tail pages", tier=Tier.CPU, slot_bytes=on_disk * layers * KV_PAGE),
        ]
        if self.streams_to_device:
            pools.append(
                PoolPlan(
                    name="KV staging", tier=Tier.CPU, slot_bytes=stage, num_slots=2 * NUM_STAGES
                )
            )
        return pools

    def hidden_bytes(self, mb: MicroBatchPlan) -> int:
        """Room of one micro-batch's hidden, in whole blocks of the disk."""
        return round_up(mb.max_new_tokens * self.config.hidden_size * self.compute_bytes, 4096)

    def _hidden_pools(self) -> list[PoolPlan]:
        pools = []
        for tier in Tier:
            sizes = [self.hidden_bytes(mb) for mb in self.micro_batches if mb.hidden_home == tier]
            pools.append(PoolPlan(name="hidden", tier=tier, slot_bytes=sum(sizes)))
        off = [
            self.hidden_bytes(m) for m in self.micro_batches if m.hidden_home != self.device_tier
        ]
        disk = [self.hidden_bytes(m) for m in self.micro_batches if m.hidden_home == Tier.DISK]
        if off:
            pools.append(
                PoolPlan(
                    name="hidden slots",
                    tier=self.device_tier,
                    slot_bytes=max(off),
                    num_slots=NUM_HIDDEN_SLOTS,
                )
            )
        if disk and self.streams_to_device:
            pools.append(
                PoolPlan(
                    name="hidden staging",
                    tier=Tier.CPU,
                    slot_bytes=max(disk),
                    num_slots=2 * NUM_STAGES,
                )
            )
        return pools

    @cached_property
    def reorders_messages(self) -> bool:
        """Whether rows may lie in another order here than in messages, where places ascend."""
        if not self.pipeline.is_cut:
            return False
        return self.attends_on_cpu or any(len(set(mb.kv_homes)) > 1 for mb in self.micro_batches)

    def _message_pools(self) -> list[PoolPlan]:
        """Where hidden is put in order: one message that leaves, one that came."""
        if not self.reorders_messages:
            return []
        largest = max(self.hidden_bytes(mb) for mb in self.micro_batches)
        return [
            PoolPlan(name="messages", tier=self.device_tier, slot_bytes=largest, num_slots=2),
        ]

    def _sum_pools(self) -> list[PoolPlan]:
        """Where a shard leaves its part of what is added to hidden."""
        if not self.config.is_split:
            return []
        return [
            PoolPlan(
                name="partial sums",
                tier=self.device_tier,
                slot_bytes=max(self.hidden_bytes(mb) for mb in self.micro_batches),
                num_slots=NUM_PARTIAL_SLOTS,
            )
        ]

    @property
    def query_bytes(self) -> int:
        """Query, key and value of one token, as attention on the CPU takes them."""
        heads = self.config.num_heads + 2 * self.config.num_kv_heads
        return heads * self.config.head_dim * self.compute_bytes

    def _attention_pools(self) -> list[PoolPlan]:
        """What attention on the CPU needs between a layer's segments."""
        if not self.attends_on_cpu:
            return []
        tokens = max(mb.max_new_tokens for mb in self.micro_batches)
        rows = max(mb.num_places_on(Tier.CPU) for mb in self.micro_batches)
        return [
            PoolPlan(
                name="attention slots",
                tier=self.device_tier,
                slot_bytes=round_up((tokens + rows) * self.query_bytes, PACK_ALIGN),
                num_slots=NUM_ATTENTION_SLOTS,
            ),
            PoolPlan(
                name="query staging",
                tier=Tier.CPU,
                slot_bytes=round_up(rows * self.query_bytes, PACK_ALIGN),
                num_slots=NUM_STAGES,
            ),
            PoolPlan(
                name="attention workspace",
                tier=Tier.CPU,
                slot_bytes=cpu_attention_bytes(
                    self.config,
                    num_rows=rows,
                    max_length=max(mb.region_tokens for mb in self.micro_batches),
                    compute_bytes=self.compute_bytes,
                    kv_codec=self.policy.cache_codec,
                ),
            ),
        ]

    @property
    def embed_slot_bytes(self) -> int:
        """Room for the embedding rows of the largest micro-batch, as they travel."""
        if not self.embed_streams:
            return 0
        tokens = max(mb.max_new_tokens for mb in self.micro_batches)
        return round_up(tokens * self.embedding.row_bytes, 64)

    @property
    def workspace_bytes(self) -> int:
        """Temporaries of the largest compute op."""
        return workspace_bytes(
            self.config,
            num_tokens=max(mb.max_new_tokens for mb in self.micro_batches),
            num_rows=max(mb.num_places for mb in self.micro_batches),
            compute_bytes=self.compute_bytes,
            max_convert_elements=self.layer_bytes.max_convert_elements,
            kv_codec=self.policy.cache_codec,
            max_length=max(mb.region_tokens for mb in self.micro_batches),
            wire_bytes=self.layer_bytes.wire_bytes,
        )

    @property
    def transient_bytes(self) -> int:
        """What torch takes and frees itself: masks, positions of a step, kernels' temporaries."""
        num_tokens = max(mb.max_new_tokens for mb in self.micro_batches)
        num_rows = max(mb.num_places for mb in self.micro_batches)
        length = max(mb.region_tokens for mb in self.micro_batches)
        kept = sum(
            batch_bytes(
                self.config,
                num_tokens=mb.max_new_tokens,
                num_rows=mb.num_places,
                max_length=mb.region_tokens,
                compute_bytes=self.compute_bytes,
            )
            for mb in self.micro_batches
        )
        return kept + max(
            transient_bytes(
                self.config,
                num_tokens=num_tokens,
                num_rows=num_rows,
                max_length=length,
                compute_bytes=self.compute_bytes,
                kv_codec=self.policy.cache_codec,
            ),
            self._widen_bytes(num_tokens),
        )

    def _widen_bytes(self, num_tokens: int) -> int:
        """What widening compressed weights takes, a slice at a time, or all embedding rows."""
        sizes = self.layer_bytes
        multiplied = widen_bytes(sizes.max_convert_elements if sizes.is_compressed else 0)
        if not self.embeds or not self.embedding.codec:
            return multiplied
        looked_up = widen_bytes(num_tokens * self.config.input_size, in_slices=False)
        gathered = 0 if self.embed_streams else num_tokens * self.embedding.row_bytes
        return max(multiplied, gathered + looked_up)

    @property
    def num_logits(self) -> int:
        """Logits buffers: one, unless a sliced head fills several micro-batches' in turn."""
        return 1 if self.num_head_layers == 1 else self.num_head_inputs

    @property
    def num_head_inputs(self) -> int:
        """One for each micro-batch of a block that meets the head."""
        return len(self.blocks[0]) if self.has_head else 0

    def _compute_pools(self) -> list[PoolPlan]:
        device, rows = self.device_tier, max(mb.num_places for mb in self.micro_batches)
        pools = [
            PoolPlan(name="workspace", tier=device, slot_bytes=self.workspace_bytes),
            PoolPlan(
                name="logits",
                tier=device,
                slot_bytes=round_up(rows * self.config.vocab_size * self.compute_bytes, 64),
                num_slots=self.num_logits,
            ),
            PoolPlan(
                name="head input",
                tier=device,
                slot_bytes=round_up(rows * self.config.input_size * self.compute_bytes, 64),
                num_slots=self.num_head_inputs,
            ),
            PoolPlan(
                name="embedding slots",
                tier=device,
                slot_bytes=self.embed_slot_bytes,
                num_slots=NUM_EMBED_SLOTS,
            ),
        ]
        if self.streams_to_device:
            pools.append(
                PoolPlan(
                    name="embedding staging",
                    tier=Tier.CPU,
                    slot_bytes=self.embed_slot_bytes,
                    num_slots=NUM_STAGES,
                )
            )
        return pools


def kv_token_bytes(config: ModelConfig, dtype: str, codec: Codec | None = None) -> int:
    """Keys and values of one token in one layer; each head's are compressed by themselves."""
    dim = config.head_dim
    head_bytes = dim * DTYPE_BYTES[dtype] if codec is None else codec.row_bytes(dim)
    return 2 * config.num_kv_heads * head_bytes


class Planner:
    """Resolves policies for one model, one set of requests and one device.

    A search asks for many: what depends on the weights' knobs alone, or on the block's alone, is
    made once.
    """

    def __init__(
        self,
        config: ModelConfig,
        needs: Sequence[Need] | Queue,
        stored: Mapping[str, Stored],
        budgets: Budgets,
        *,
        device_tier: Tier,
        compute_dtype: str,
        form_of: FormOf | None = None,
        pipeline: Pipeline | None = None,
        rank: int = 0,
    ) -> None:
        """`form_of` tells where weights in another form lie, for policies that ask for them. Plans
        are those of stage `rank` of `pipeline`; without one they are of the whole model."""
        self._config = config
        self._pipeline = pipeline or Pipeline.whole(config.num_layers)
        self._rank = rank
        self._queue = needs if isinstance(needs, Queue) else Queue.of(needs)
        self._stored = stored
        self._budgets = budgets
        self._device_tier = device_tier
        self._compute_dtype = compute_dtype
        self._form_of = form_of
        self._placements: dict[object, Placement] = {}
        self._layers: dict[object, tuple[tuple[LayerPlan, ...], LayerBytes]] = {}
        self._blocks: dict[object, tuple[MicroBatchPlan, ...]] = {}

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def pipeline(self) -> Pipeline:
        return self._pipeline

    @property
    def compute_dtype(self) -> str:
        return self._compute_dtype

    def __call__(self, policy: Policy) -> Plan:
        """The plan for `policy`; raises PolicyError where a share cannot be met."""
        return Plan(
            config=self._config,
            policy=policy,
            pipeline=self._pipeline,
            rank=self._rank,
            device_tier=self._device_tier,
            compute_dtype=self._compute_dtype,
            placement=self._placement(policy),
            layers=self._layers_of(policy)[0],
            layer_bytes=self._layers_of(policy)[1],
            micro_batches=self._block(policy),
            budgets=self._budgets,
        )

    def _placement(self, policy: Policy) -> Placement:
        key = _weight_knobs(policy)
        if key not in self._placements:
            self._placements[key] = place_weights(
                stage_tensors(self._config, self._pipeline, self._rank),
                policy.weights,
                self._stored,
                device_tier=self._device_tier,
                compute_dtype=self._compute_dtype,
                resident_dtype=policy.resident_dtype,
                weight_codec=policy.weight_codec,
                vocabulary_codec=policy.vocabulary_codec,
                form_of=self._form_of,
            )
        return self._placements[key]

    def _layers_of(self, policy: Policy) -> tuple[tuple[LayerPlan, ...], LayerBytes]:
        key = (*_weight_knobs(policy), policy.separate_layers)
        if key not in self._layers:
            placement = self._placement(policy)
            layers = stage_layers(
                self._config, policy, placement, self._device_tier, self._pipeline, self._rank
            )
            looked_up = self._config.tensor_names["embed_tokens"]
            embeds = self._pipeline.embeds(self._rank)
            embedding = placement.tensors[looked_up] if embeds else None
            sizes = LayerBytes.of(
                layers, placement, embedding, self._device_tier, self._compute_dtype
            )
            self._layers[key] = layers, sizes
        return self._layers[key]

    def _block(self, policy: Policy) -> tuple[MicroBatchPlan, ...]:
        rows = (policy.micro_batch_size, policy.num_micro_batches, policy.max_batch_tokens)
        codec = policy.cache_codec
        key = (*rows, policy.kv_cache, policy.hidden, codec)
        if key not in self._blocks:
            self._blocks[key] = block_shape(
                policy,
                self._queue,
                token_bytes=kv_token_bytes(self._config, self._compute_dtype, codec),
                hidden_bytes=self._config.hidden_size * DTYPE_BYTES[self._compute_dtype],
                num_blocks=self._pipeline.num_blocks,
            )
        return self._blocks[key]


def _weight_knobs(policy: Policy) -> tuple[object, ...]:
    codecs = policy.weight_codec, policy.vocabulary_codec
    return policy.weights, policy.resident_dtype, *codecs


def check_fits(plan: Plan, advice: str) -> None:
    """Raise PlanError with the shortfall per tier, and what would fit."""
    missing = plan.shortfalls()
    if not missing:
        return
    lines = [
        f"{tier.value} needs {format_bytes(plan.tier_bytes(tier))}, {format_bytes(num_bytes)} more "
        f"than its budget of {format_bytes(plan.budgets.of(tier))} ({plan.describe(tier)})"
        for tier, num_bytes in missing.items()
    ]
    raise PlanError("the plan does not fit: " + "; ".join(lines) + f". {advice}")
