"""The model's weights: resident ones, packs that travel from host memory, reads from checkpoints.

Everything is read past the page cache, straight from the safetensors files, or from the files of
`flexpipe.memory.form`, which loading makes where they are missing. Loading takes two bounded
buffers beside the pools; on a CPU, matrices that stay are packed for its kernels, unless they are
compressed. A layer's streamed tensors are views of a slot, made once per (layer, slot).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexpipe.memory.checkpoint import StoredTensor
from flexpipe.memory.disk import DiskReader, StopFlag, aligned_buffer
from flexpipe.memory.form import TensorForm, provide, read_rows
from flexpipe.memory.tier import POISON, TierMemory, torch_dtype, typed
from flexpipe.model.config import HELD_BYTES
from flexpipe.model.matmul import PACK_BYTES, CompressedWeight, PackedWeight, Weight, packs
from flexpipe.model.segments import EmbedWeights, HeadWeights, LayerWeights
from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.layout import PACK_ALIGN, round_up
from flexpipe.plan.placement import PlacedTensor
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.units import format_bytes

_CHUNK_BYTES = 32 * 2**20  # bytes read at a time while loading

log = logging.getLogger("flexpipe")

Copy = Callable[[Tensor, Tensor], None]
LayerTensors = LayerWeights | EmbedWeights | HeadWeights


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A layer's tensors: its weights by role, and the matrix the vocabulary meets."""

    weights: LayerTensors
    embed_tokens: Tensor | CompressedWeight | None = None
    lm_head: Weight | None = None


class WeightStore:
    """Homes and slots of the weights of one stage."""

    def __init__(self, plan: Plan, memory: TierMemory, reader: DiskReader) -> None:
        self._plan = plan
        self._reader = reader
        self._resident: dict[str, Weight] = {}
        self._host: dict[str, Tensor] = {}
        self._views: dict[tuple[int, int | None], LayerParts] = {}
        self.form_bytes = 0  # written to files that were missing or damaged
        pools = {(pool.name, pool.tier): pool for pool in plan.pools}
        self._take_resident(memory)
        for owner, num_bytes in plan.layer_bytes.host_slabs.items():
            self._host[owner] = memory.take_on_host(num_bytes, f"weights of {owner}")
        slots = pools.get(("weight slots", plan.device_tier))
        self._slots = [
            memory.take_on_device(slots.slot_bytes, slots.name)
            for _ in range(slots.num_slots if slots else 0)
            if slots
        ]
        staging = pools.get(("weight staging", Tier.CPU))
        self._stages = [
            memory.take_on_host(staging.slot_bytes, staging.name)
            for _ in range(staging.num_slots if staging else 0)
            if staging
        ]

    def load(self, progress: Callable[[int], None], stop: StopFlag | None = None) -> None:
        """Fill every home in memory; `progress` is told the bytes read."""
        buffer = torch.from_numpy(aligned_buffer(_CHUNK_BYTES))
        self._provide_forms(buffer, progress, stop)
        for name, target in self._resident.items():
            placed = self._plan.placement.tensors[name]
            assert isinstance(target, Tensor)
            self._fill(placed, target, buffer, progress)
        self._pack(buffer, progress)
        for layer in self._plan.layers:
            for part, offset in zip(layer.streamed.parts, layer.streamed.offsets, strict=True):
                if part.tensor.home == Tier.CPU and layer.kind != LayerKind.HEAD:
                    self._fill_host(part.tensor, self._host[layer.name], offset, buffer, progress)
        for name, placed in self._plan.placement.tensors.items():
            if name in self._host:
                self._fill_host(placed, self._host[name], 0, buffer, progress)

    def read(self, layer: LayerPlan, *, slot: int | None, stage: int | None) -> int:
        """READ_WEIGHT: the layer's extents into a slot, or into a stage on the way to one."""
        base = 0 if stage is None else layer.streamed.pack_bytes
        target = (
            self._slots[slot] if stage is None and slot is not None else self._stages[stage or 0]
        )
        layout = layer.streamed
        for extent in layout.extents:
            start = extent.slot_offset - base
            view = target[start : start + extent.num_bytes].numpy()
            file = self._reader.file(Path(str(extent.path)))
            file.read(view, extent.file_offset, needed=layout.needed_bytes(extent))
        return layout.read_bytes

    def load_layer(self, layer: LayerPlan, slot: int, stage: int | None, copy: Copy) -> int:
        """LOAD_WEIGHT: host memory to a slot, in as few moves as the layer has homes."""
        target, layout = self._slots[slot], layer.streamed
        if layout.pack_bytes and layer.kind != LayerKind.HEAD:
            copy(target[: layout.pack_bytes], self._host[layer.name])
        elif layout.pack_bytes:
            for part, offset in zip(layout.parts, layout.offsets, strict=True):
                if part.tensor.home == Tier.CPU:
                    source = self._host[part.tensor.spec.name]
                    piece = source[part.byte_offset : part.byte_offset + part.num_bytes]
                    copy(target[offset : offset + part.num_bytes], piece)
        if stage is not None:
            staged = self._stages[stage][: layout.read_bytes]
            copy(target[layout.pack_bytes : layout.num_bytes], staged)
        return layout.num_bytes

    def layer(self, layer: LayerPlan, slot: int | None) -> LayerParts:
        """The layer's tensors, as COMPUTE wants them."""
        key = (layer.position, slot)
        parts = self._views.get(key)
        if parts is None:
            parts = self._views[key] = self._make_views(layer, slot)
        return parts

    def embedding_rows(self, ids_T: Tensor, out_TE: Tensor) -> int:
        """READ_EMBED: the rows of an embedding that rests off the device, as they lie at home.

        `ids_T` is int64 on the host. Returns the bytes read from disk.
        """
        placed = self._plan.embedding
        if placed.home == Tier.CPU:
            table = typed(self._host[placed.spec.name], torch_dtype(placed.dtype), placed.shape)
            torch.index_select(table, 0, ids_T, out=out_TE)
            return 0
        unique, inverse = torch.unique(ids_T, return_inverse=True)
        first = torch.full_like(unique, -1)
        first.scatter_(0, inverse, torch.arange(len(ids_T)))
        row_bytes = placed.row_bytes
        rows = out_TE.view(torch.uint8)
        spans = [
            (placed.stored.offset + int(token) * row_bytes, row_bytes, rows[int(place)].numpy())
            for token, place in zip(unique, first, strict=True)
        ]
        self._reader.file(Path(str(placed.stored.path))).read_spans(spans)
        out_TE.copy_(out_TE[first[inverse]])
        return row_bytes * len(spans)

    def poison(self, *, slot: int | None = None, stage: int | None = None) -> None:
        """Overwrite a slot or a stage, so that a reader who comes too early or too late shows."""
        for slabs, index in ((self._slots, slot), (self._stages, stage)):
            if index is not None:
                slabs[index].fill_(POISON)

    def poison_all(self) -> None:
        for slab in (*self._slots, *self._stages):
            slab.fill_(POISON)

    def _take_resident(self, memory: TierMemory) -> None:
        parts = {
            part.tensor.spec.name: part.tensor
            for layer in self._plan.layers
            for part in layer.resident
        }
        sizes = {name: round_up(placed.num_bytes, PACK_ALIGN) for name, placed in parts.items()}
        self._to_pack = _matrices(self._plan, parts, memory.device)
        memory.count_on_device(sum(sizes.pop(name) for name in self._to_pack))
        slab = memory.take_on_device(sum(sizes.values()), "weights")
        offset = 0
        for name in sizes:
            placed = parts[name]
            dtype = torch_dtype(placed.dtype)
            self._resident[name] = typed(slab, dtype, placed.shape, offset)
            offset += sizes[name]

    def _provide_forms(
        self, buffer: Tensor, progress: Callable[[int], None], stop: StopFlag | None
    ) -> None:
        """Have the file of every tensor that is compressed or repacked."""
        stored = (placed.stored for placed in self._plan.placement.tensors.values())
        forms = {form.path: form for form in stored if isinstance(form, TensorForm)}
        for verb in sorted({form.verb for form in forms.values()}):
            missing = [form for form in forms.values() if form.new_bytes and form.verb == verb]
            if missing:
                num_bytes = format_bytes(sum(form.new_bytes for form in missing))
                folder = missing[0].path.parent
                log.info("%sing %d weights into %s: %s", verb, len(missing), folder, num_bytes)
        for form in forms.values():
            self.form_bytes += provide(form, self._reader, buffer, progress, stop)

    def _pack(self, buffer: Tensor, progress: Callable[[int], None]) -> None:
        if not self._to_pack:
            return
        room = torch.from_numpy(aligned_buffer(PACK_BYTES))
        for name, placed in self._to_pack.items():
            num_out, num_in = placed.spec.shape

            def fill(rows: slice, plain: Tensor, placed: PlacedTensor = placed) -> None:
                first = rows.start * placed.spec.shape[1]
                self._fill(placed, plain, buffer, progress, first)

            dtype = torch_dtype(placed.dtype)
            self._resident[name] = PackedWeight.make((num_out, num_in), dtype, room, fill)

    def _fill_host(
        self,
        placed: PlacedTensor,
        slab: Tensor,
        offset: int,
        buffer: Tensor,
        progress: Callable[[int], None],
    ) -> None:
        target = typed(slab, torch_dtype(placed.dtype), placed.shape, offset)
        self._fill(placed, target, buffer, progress)

    def _fill(
        self,
        placed: PlacedTensor,
        target: Tensor,
        buffer: Tensor,
        progress: Callable[[int], None],
        start: int = 0,
    ) -> None:
        """Read a tensor, or what follows its element `start`, chunk by chunk and convert it."""
        stored, flat = placed.stored, target.view(-1)
        if stored.stride is not None:
            assert isinstance(stored, StoredTensor)
            self._fill_parts(stored, flat, buffer, progress, start)
            return
        file = self._reader.file(Path(str(stored.path)))
        direct = stored.dtype == placed.dtype and target.device.type == "cpu"
        step = _CHUNK_BYTES // HELD_BYTES[stored.dtype]
        for first in range(0, flat.numel(), step):
            place = flat[first : first + step]
            num_bytes = place.numel() * HELD_BYTES[stored.dtype]
            offset = stored.offset + (start + first) * HELD_BYTES[stored.dtype]
            if direct:
                file.read_into(place.view(torch.uint8).numpy(), offset)
            else:
                chunk = buffer[:num_bytes]
                file.read_into(chunk.numpy(), offset)
                place.copy_(chunk.view(torch_dtype(stored.dtype)))
            progress(num_bytes)

    def _fill_parts(
        self,
        stored: StoredTensor,
        flat: Tensor,
        buffer: Tensor,
        progress: Callable[[int], None],
        start: int,
    ) -> None:
        """The same where rows are parts of longer ones, which are read whole."""
        size, stride = stored.shape[1], stored.stride
        assert stride is not None
        rows_MI, step = flat.view(-1, size), _CHUNK_BYTES // stride
        for first in range(0, len(rows_MI), step):
            place = rows_MI[first : first + step]
            place.copy_(read_rows(stored, start // size + first, len(place), buffer, self._reader))
            progress(place.numel() * HELD_BYTES[stored.dtype])

    def _make_views(self, layer: LayerPlan, slot: int | None) -> LayerParts:
        tensors: dict[str, Weight] = {}
        for part in layer.resident:
            home = self._resident[part.tensor.spec.name]
            tensors[part.tensor.spec.role] = _as_weight(part.tensor, home)
        if slot is not None:
            for part, offset in zip(layer.streamed.parts, layer.streamed.offsets, strict=True):
                dtype = torch_dtype(part.tensor.dtype)
                view = typed(self._slots[slot], dtype, part.shape, offset)
                tensors[part.tensor.spec.role] = _as_weight(part.tensor, view)
        embed_tokens = tensors.pop("embed_tokens", None)
        lm_head = tensors.pop("lm_head", None)
        if layer.kind == LayerKind.HEAD and lm_head is None:
            lm_head, embed_tokens = embed_tokens, None  # tied
        holder: Any = {LayerKind.EMBED: EmbedWeights, LayerKind.HEAD: HeadWeights}.get(
            layer.kind, LayerWeights
        )
        assert not isinstance(embed_tokens, PackedWeight)
        return LayerParts(holder(**tensors), embed_tokens, lm_head)


def _as_weight(placed: PlacedTensor, home: Weight) -> Weight:
    """What lies at home or in a slot, as a product takes it."""
    if placed.codec is None:
        return home
    assert isinstance(home, Tensor)
    return CompressedWeight(home, placed.codec, placed.spec.shape[1])


def _matrices(
    plan: Plan, resident: Mapping[str, PlacedTensor], device: torch.device
) -> dict[str, PlacedTensor]:
    """Resident weights that only ever meet a product, and are worth packing for it."""
    looked_up = plan.embedding.spec.name if plan.embeds else None
    return {
        name: placed
        for name, placed in resident.items()
        if name != looked_up
        and placed.dtype == plan.compute_dtype
        and packs(placed.spec.shape, torch_dtype(placed.dtype), device)
    }
