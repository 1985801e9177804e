"""What a stage's layers come to in bytes, whatever the block: homes, slots and host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpipe.model.config import HELD_BYTES
from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.layout import PACK_ALIGN, round_up
from flexpipe.plan.placement import PlacedTensor, Placement
from flexpipe.plan.tier import Tier


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
