"""The layers of a stage: what each computes, which of its tensors rest, which travel.

A layer is what one load of weights serves: the embedding, a decoder layer or its halves, the head
or a slice of its vocabulary. A head that rests elsewhere comes in slices, each no larger than the
largest other load, so that one size of slot serves all. Where hidden comes from another stage or
goes to one, the first or last layer of a chunk is the message, which has no weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from flexpipe.model.config import (
    ModelConfig,
    attention_tensors,
    embed_tensors,
    head_tensors,
    mlp_tensors,
)
from flexpipe.plan.layout import Part, SlotLayout, slot_layout
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import Placement, is_shared, meets_vocabulary
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier


class LayerKind(StrEnum):
    """What a layer of the stage computes."""

    EMBED = "embed"
    DECODER = "decoder"
    ATTENTION = "attention"
    MLP = "mlp"
    HEAD = "head"
    RECEIVE = "receive"  # hidden from the stage before
    SEND = "send"  # hidden to the stage after


class Piece(StrEnum):
    """What of a decoder layer may be computed by itself."""

    QKV = "qkv"
    ATTEND = "attend"
    OUT = "out"
    MLP = "mlp"


_ATTENTION = frozenset({Piece.QKV, Piece.ATTEND, Piece.OUT})
_PIECES = {
    LayerKind.DECODER: frozenset(Piece),
    LayerKind.ATTENTION: _ATTENTION,
    LayerKind.MLP: frozenset({Piece.MLP}),
}


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer of the stage: its parts, and how those that travel lie in a slot.

    `layer` is the decoder layer it belongs to. The head may come in slices of the vocabulary:
    `vocab` is the range [start, stop) this one computes, counted from the shard's first row.
    """

    position: int
    kind: LayerKind
    resident: tuple[Part, ...]
    streamed: SlotLayout
    layer: int | None = None
    vocab: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        if self.kind == LayerKind.HEAD and self.vocab is not None:
            return f"head [{self.vocab[0]}:{self.vocab[1]}]"
        if self.layer is None:
            return self.kind.value
        half = "" if self.kind == LayerKind.DECODER else f" {self.kind.value}"
        return f"decoder {self.layer}{half}"

    @property
    def decoder(self) -> int:
        """The decoder layer, of layers that are part of one."""
        assert self.layer is not None
        return self.layer

    @property
    def has_kv_cache(self) -> bool:
        return self.kind in (LayerKind.DECODER, LayerKind.ATTENTION)

    @property
    def pieces(self) -> frozenset[Piece]:
        """Those of a decoder layer that are its."""
        return _PIECES.get(self.kind, frozenset())

    @property
    def reads_disk(self) -> bool:
        return bool(self.streamed.extents)

    @property
    def is_streamed(self) -> bool:
        return bool(self.streamed.parts)

    @property
    def takes_hidden(self) -> bool:
        """Whether it needs the hidden of the layer before (all but the first and later heads)."""
        if self.kind == LayerKind.HEAD:
            return self.vocab is not None and self.vocab[0] == 0
        return not self.begins_chunk

    @property
    def leaves_hidden(self) -> bool:
        return self.kind not in (LayerKind.HEAD, LayerKind.SEND)

    @property
    def begins_chunk(self) -> bool:
        """Whether hidden begins there, in this stage's eyes."""
        return self.kind in (LayerKind.EMBED, LayerKind.RECEIVE)

    @cached_property
    def likeness(self) -> str:
        """The same for layers that ask the same of lanes and links, wherever they stand."""
        here, moves = self.resident, self.streamed
        width = self.vocab and (self.vocab[0] == 0, self.vocab[1] - self.vocab[0])
        sizes = moves.pack_bytes, moves.read_bytes, len(moves.extents)
        what = self.kind, width, sizes, [_matter(part) for part in here]
        return sys.intern(repr((*what, [_matter(part) for part in moves.parts])))


def _matter(part: Part) -> tuple[object, ...]:
    """What of a tensor decides how long it takes."""
    return part.shape, part.tensor.spec.role, part.tensor.dtype, part.tensor.codec


def stage_layers(
    config: ModelConfig,
    policy: Policy,
    placement: Placement,
    device_tier: Tier,
    pipeline: Pipeline,
    rank: int,
) -> tuple[LayerPlan, ...]:
    """The layers of a stage in the order hidden passes them, chunk after chunk."""
    layers: list[LayerPlan] = []

    def add(kind: LayerKind, parts: Sequence[Part], **where: object) -> None:
        resident = tuple(part for part in parts if part.tensor.home == device_tier)
        streamed = slot_layout([part for part in parts if part.tensor.home != device_tier])
        layers.append(
            LayerPlan(
                position=len(layers),
                kind=kind,
                resident=resident,
                streamed=streamed,
                **where,  # type: ignore[arg-type]
            )
        )

    def add_decoder(layer: int) -> None:
        attention = [Part(placement.tensors[s.name]) for s in attention_tensors(config, layer)]
        mlp = [Part(placement.tensors[s.name]) for s in mlp_tensors(config, layer)]
        if policy.separate_layers:
            add(LayerKind.ATTENTION, attention, layer=layer)
            add(LayerKind.MLP, mlp, layer=layer)
        else:
            add(LayerKind.DECODER, [*attention, *mlp], layer=layer)

    for chunk, decoders in enumerate(pipeline.chunks(rank)):
        if chunk == 0 and pipeline.embeds(rank):
            add(LayerKind.EMBED, _embed_parts(config, placement, device_tier))
        else:
            add(LayerKind.RECEIVE, ())
        for layer in decoders:
            add_decoder(layer)
        if chunk + 1 == pipeline.num_chunks and pipeline.has_head(rank):
            for vocab, parts in _head_slices(config, placement, device_tier, layers):
                add(LayerKind.HEAD, parts, vocab=vocab)
        else:
            add(LayerKind.SEND, ())
    return tuple(layers)


def _embed_parts(config: ModelConfig, placement: Placement, device_tier: Tier) -> list[Part]:
    """Rows of an embedding elsewhere are fetched, not streamed as a layer."""
    parts = [Part(placement.tensors[spec.name]) for spec in embed_tensors(config)]
    return [
        part
        for part in parts
        if part.tensor.spec.role != "embed_tokens" or part.tensor.home == device_tier
    ]


def _head_slices(
    config: ModelConfig, placement: Placement, device_tier: Tier, layers: Sequence[LayerPlan]
) -> list[tuple[tuple[int, int], list[Part]]]:
    """The head in slices no larger than the largest streamed layer; whole where it is at home."""
    specs = head_tensors(config)
    head = placement.tensors[specs[-1].name]
    first = [Part(placement.tensors[spec.name]) for spec in specs[:-1]]
    vocab = len(config.vocab_rows)
    if head.home == device_tier:
        return [((0, vocab), [*first, Part(head)])]
    # what the vocabulary meets does not count: an embedding elsewhere is fetched row by row
    largest_matrix = max(
        placed.num_bytes
        for placed in placement.tensors.values()
        if is_shared(placed.spec) and not meets_vocabulary(placed.spec)
    )
    room = max(largest_matrix, *(layer.streamed.num_bytes for layer in layers))
    num_slices = -(-head.num_bytes // room)
    rows = -(-vocab // num_slices)
    starts = range(0, vocab, rows)
    slices = []
    for start in starts:
        stop = min(start + rows, vocab)
        slices.append(((start, stop), [*(first if start == 0 else ()), Part(head, start, stop)]))
    return slices
