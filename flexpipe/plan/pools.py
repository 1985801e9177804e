"""Every pool that a stage takes, to the byte, and what torch takes and frees beside them.

The pools sized here are the pools the runtime takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexpipe.model.cost import (
    batch_bytes,
    cpu_attention_bytes,
    transient_bytes,
    widen_bytes,
    workspace_bytes,
)
from flexpipe.plan.block import KV_PAGE
from flexpipe.plan.layout import PACK_ALIGN, round_up
from flexpipe.plan.stage import StagePlan
from flexpipe.plan.tier import Tier

NUM_KV_SLOTS = 3  # one loading, one in use, one being stored
NUM_HIDDEN_SLOTS = 3
NUM_STAGES = 2  # host buffers on the way between disk and accelerator: one fills, one drains
NUM_EMBED_SLOTS = 2
NUM_ATTENTION_SLOTS = 2  # one micro-batch attends on the CPU, another one on the device
NUM_PARTIAL_SLOTS = 3  # of a micro-batch's two halves, and of another one's that computes meanwhile


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


def stage_pools(stage: StagePlan) -> tuple[PoolPlan, ...]:
    """Every byte the runtime will take, pool by pool."""
    made = [
        *_weight_pools(stage),
        *_kv_pools(stage),
        *_hidden_pools(stage),
        *_attention_pools(stage),
        *_compute_pools(stage),
        *_message_pools(stage),
        *_sum_pools(stage),
    ]
    return tuple(pool for pool in made if pool.num_bytes)


def _weight_pools(stage: StagePlan) -> list[PoolPlan]:
    device = stage.device_tier
    sizes = stage.layer_bytes
    pools = [
        PoolPlan(name="weights", tier=device, slot_bytes=sizes.resident),
        PoolPlan(
            name="weight slots",
            tier=device,
            slot_bytes=sizes.slot,
            num_slots=stage.num_weight_slots,
        ),
    ]
    if stage.streams_to_device:
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


def _kv_pools(stage: StagePlan) -> list[PoolPlan]:
    layers, token_bytes = stage.num_decoder_layers, stage.token_bytes
    pools = []
    for tier in Tier:
        rooms = (
            mb.num_places_on(tier) * mb.region_bytes(tier, token_bytes)
            for mb in stage.micro_batches
        )
        pools.append(PoolPlan(name="KV cache", tier=tier, slot_bytes=layers * sum(rooms)))
    slot = max(
        (mb.num_places - mb.num_places_on(stage.device_tier)) * stage.slot_region_bytes(mb)
        for mb in stage.micro_batches
    )
    on_disk = sum(mb.num_places_on(Tier.DISK) for mb in stage.micro_batches)
    staged = max(
        mb.num_places_on(Tier.DISK) * stage.slot_region_bytes(mb) for mb in stage.micro_batches
    )
    pools += [
        PoolPlan(name="KV slots", tier=stage.device_tier, slot_bytes=slot, num_slots=NUM_KV_SLOTS),
        PoolPlan(name="KV tail pages", tier=Tier.CPU, slot_bytes=on_disk * layers * KV_PAGE),
    ]
    if stage.streams_to_device:
        pools.append(
            PoolPlan(name="KV staging", tier=Tier.CPU, slot_bytes=staged, num_slots=2 * NUM_STAGES)
        )
    return pools


def _hidden_pools(stage: StagePlan) -> list[PoolPlan]:
    pools = []
    for tier in Tier:
        sizes = [stage.hidden_bytes(mb) for mb in stage.micro_batches if mb.hidden_home == tier]
        pools.append(PoolPlan(name="hidden", tier=tier, slot_bytes=sum(sizes)))
    off = [stage.hidden_bytes(m) for m in stage.micro_batches if m.hidden_home != stage.device_tier]
    disk = [stage.hidden_bytes(m) for m in stage.micro_batches if m.hidden_home == Tier.DISK]
    if off:
        pools.append(
            PoolPlan(
                name="hidden slots",
                tier=stage.device_tier,
                slot_bytes=max(off),
                num_slots=NUM_HIDDEN_SLOTS,
            )
        )
    if disk and stage.streams_to_device:
        pools.append(
            PoolPlan(
                name="hidden staging",
                tier=Tier.CPU,
                slot_bytes=max(disk),
                num_slots=2 * NUM_STAGES,
            )
        )
    return pools


def _message_pools(stage: StagePlan) -> list[PoolPlan]:
    """Where hidden is put in order: one message that leaves, one that came."""
    if not stage.reorders_messages:
        return []
    largest = max(stage.hidden_bytes(mb) for mb in stage.micro_batches)
    return [
        PoolPlan(name="messages", tier=stage.device_tier, slot_bytes=largest, num_slots=2),
    ]


def _sum_pools(stage: StagePlan) -> list[PoolPlan]:
    """Where a shard leaves its part of what is added to hidden."""
    if not stage.config.is_split:
        return []
    return [
        PoolPlan(
            name="partial sums",
            tier=stage.device_tier,
            slot_bytes=max(stage.hidden_bytes(mb) for mb in stage.micro_batches),
            num_slots=NUM_PARTIAL_SLOTS,
        )
    ]


def _attention_pools(stage: StagePlan) -> list[PoolPlan]:
    """What attention on the CPU needs between a layer's segments."""
    if not stage.attends_on_cpu:
        return []
    tokens = max(mb.max_new_tokens for mb in stage.micro_batches)
    rows = max(mb.num_places_on(Tier.CPU) for mb in stage.micro_batches)
    return [
        PoolPlan(
            name="attention slots",
            tier=stage.device_tier,
            slot_bytes=round_up((tokens + rows) * stage.query_bytes, PACK_ALIGN),
            num_slots=NUM_ATTENTION_SLOTS,
        ),
        PoolPlan(
            name="query staging",
            tier=Tier.CPU,
            slot_bytes=round_up(rows * stage.query_bytes, PACK_ALIGN),
            num_slots=NUM_STAGES,
        ),
        PoolPlan(
            name="attention workspace",
            tier=Tier.CPU,
            slot_bytes=cpu_attention_bytes(
                stage.config,
                num_rows=rows,
                max_length=max(mb.region_tokens for mb in stage.micro_batches),
                compute_bytes=stage.compute_bytes,
                kv_codec=stage.policy.cache_codec,
            ),
        ),
    ]


def _compute_pools(stage: StagePlan) -> list[PoolPlan]:
    device, rows = stage.device_tier, max(mb.num_places for mb in stage.micro_batches)
    pools = [
        PoolPlan(name="workspace", tier=device, slot_bytes=_workspace_bytes(stage)),
        PoolPlan(
            name="logits",
            tier=device,
            slot_bytes=round_up(rows * stage.config.vocab_size * stage.compute_bytes, 64),
            num_slots=stage.num_logits,
        ),
        PoolPlan(
            name="head input",
            tier=device,
            slot_bytes=round_up(rows * stage.config.input_size * stage.compute_bytes, 64),
            num_slots=stage.num_head_inputs,
        ),
        PoolPlan(
            name="embedding slots",
            tier=device,
            slot_bytes=stage.embed_slot_bytes,
            num_slots=NUM_EMBED_SLOTS,
        ),
    ]
    if stage.streams_to_device:
        pools.append(
            PoolPlan(
                name="embedding staging",
                tier=Tier.CPU,
                slot_bytes=stage.embed_slot_bytes,
                num_slots=NUM_STAGES,
            )
        )
    return pools


def _workspace_bytes(stage: StagePlan) -> int:
    """Temporaries of the largest compute op."""
    return workspace_bytes(
        stage.config,
        num_tokens=max(mb.max_new_tokens for mb in stage.micro_batches),
        num_rows=max(mb.num_places for mb in stage.micro_batches),
        compute_bytes=stage.compute_bytes,
        max_convert_elements=stage.layer_bytes.max_convert_elements,
        kv_codec=stage.policy.cache_codec,
        max_length=max(mb.region_tokens for mb in stage.micro_batches),
        wire_bytes=stage.layer_bytes.wire_bytes,
    )


def stage_transient_bytes(stage: StagePlan) -> int:
    """What torch takes and frees itself: masks, positions of a step, kernels' temporaries."""
    num_tokens = max(mb.max_new_tokens for mb in stage.micro_batches)
    num_rows = max(mb.num_places for mb in stage.micro_batches)
    length = max(mb.region_tokens for mb in stage.micro_batches)
    kept = sum(
        batch_bytes(
            stage.config,
            num_tokens=mb.max_new_tokens,
            num_rows=mb.num_places,
            max_length=mb.region_tokens,
            compute_bytes=stage.compute_bytes,
        )
        for mb in stage.micro_batches
    )
    return kept + max(
        transient_bytes(
            stage.config,
            num_tokens=num_tokens,
            num_rows=num_rows,
            max_length=length,
            compute_bytes=stage.compute_bytes,
            kv_codec=stage.policy.cache_codec,
        ),
        _widen_bytes(stage, num_tokens),
    )


def _widen_bytes(stage: StagePlan, num_tokens: int) -> int:
    """What widening compressed weights takes, a slice at a time, or all embedding rows."""
    sizes = stage.layer_bytes
    multiplied = widen_bytes(sizes.max_convert_elements if sizes.is_compressed else 0)
    if not stage.embeds or not stage.embedding.codec:
        return multiplied
    looked_up = widen_bytes(num_tokens * stage.config.input_size, in_slices=False)
    gathered = 0 if stage.embed_streams else num_tokens * stage.embedding.row_bytes
    return max(multiplied, gathered + looked_up)
