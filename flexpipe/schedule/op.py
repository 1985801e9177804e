"""The items a schedule is made of.

An op says what happens (`kind`), on which lane, for which step, layer and micro-batch, in which
slots, what it reads and writes, and which earlier ops it waits for. It holds no tensor.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from flexpipe.plan.layer import LayerPlan, Piece
from flexpipe.schedule.step import MicroBatch


class Kind(StrEnum):
    """What an op does; a move is named for its one hop."""

    READ_WEIGHT = "read_weight"  # disk -> host
    LOAD_WEIGHT = "load_weight"  # host -> device
    READ_EMBED = "read_embed"  # the embedding rows a micro-batch needs: cpu or disk -> host slot
    LOAD_EMBED = "load_embed"
    READ_CACHE = "read_cache"  # KV cache of the rows whose home is the disk
    LOAD_CACHE = "load_cache"
    STORE_CACHE = "store_cache"  # new tokens only
    WRITE_CACHE = "write_cache"
    READ_HIDDEN = "read_hidden"
    LOAD_HIDDEN = "load_hidden"
    STORE_HIDDEN = "store_hidden"
    WRITE_HIDDEN = "write_hidden"
    MOVE_QUERY = "move_query"  # new queries, keys and values of rows that attend on the CPU
    ATTEND_CPU = "attend_cpu"
    MOVE_OUTPUT = "move_output"
    COMPUTE = "compute"
    SAMPLE = "sample"
    FETCH_TOKENS = "fetch_tokens"
    RECEIVE_HIDDEN = "receive_hidden"  # from the stage before
    SEND_HIDDEN = "send_hidden"
    RECEIVE_TOKENS = "receive_tokens"  # of a whole step, from the last stage to the first
    SEND_TOKENS = "send_tokens"
    ALL_REDUCE = "all_reduce"  # what the shards of a stage have each computed a part of
    COMMIT = "commit"
    BARRIER = "barrier"


class Segment(StrEnum):
    """The piece of a layer that a COMPUTE runs where attention on the CPU or a sum over the shards
    of a stage parts it."""

    QKV = "qkv"
    ATTEND = "attend"  # of the rows that attend on the device
    OUT = "out"  # and what follows it in the layer
    # of a shard, which leaves its part of a sum
    ATTENTION = "attention"
    PROJECT = "project"  # only what is left of attention where some rows attend on the CPU
    AFTER_ATTENTION = "after_attention"  # of the sum
    MLP = "mlp"
    AFTER_MLP = "after_mlp"


_PIECES: dict[Segment | None, frozenset[Piece]] = {
    None: frozenset(Piece),
    Segment.QKV: frozenset({Piece.QKV}),
    Segment.ATTEND: frozenset({Piece.ATTEND}),
    Segment.OUT: frozenset({Piece.OUT, Piece.MLP}),
    Segment.ATTENTION: frozenset({Piece.QKV, Piece.ATTEND, Piece.OUT}),
    Segment.PROJECT: frozenset({Piece.OUT}),
    Segment.MLP: frozenset({Piece.MLP}),
}


def pieces_of(layer: LayerPlan, segment: Segment | None) -> frozenset[Piece]:
    """What of a decoder layer a COMPUTE of `segment` computes."""
    return layer.pieces & _PIECES.get(segment, frozenset())


class Lane(StrEnum):
    """An in-order queue of ops."""

    COMPUTE = "compute"
    ATTEND_CPU = "attend_cpu"
    LOAD_WEIGHT = "load_weight"
    LOAD_CACHE = "load_cache"
    STORE_CACHE = "store_cache"
    READ_WEIGHT = "read_weight"
    READ_CACHE = "read_cache"
    DISK_WRITE = "disk_write"
    SEND = "send"
    RECEIVE = "receive"
    REDUCE = "reduce"
    HOST = "host"


MESSAGE_LANES = (Lane.SEND, Lane.RECEIVE)  # of stages that have neighbours
PEER_LANES = (*MESSAGE_LANES, Lane.REDUCE)  # whose ops take place on several ranks at once

LANE_OF: dict[Kind, Lane] = {
    Kind.READ_WEIGHT: Lane.READ_WEIGHT,
    Kind.LOAD_WEIGHT: Lane.LOAD_WEIGHT,
    Kind.READ_EMBED: Lane.READ_CACHE,
    Kind.LOAD_EMBED: Lane.LOAD_CACHE,
    Kind.READ_CACHE: Lane.READ_CACHE,
    Kind.LOAD_CACHE: Lane.LOAD_CACHE,
    Kind.STORE_CACHE: Lane.STORE_CACHE,
    Kind.WRITE_CACHE: Lane.DISK_WRITE,
    Kind.READ_HIDDEN: Lane.READ_CACHE,
    Kind.LOAD_HIDDEN: Lane.LOAD_CACHE,
    Kind.STORE_HIDDEN: Lane.STORE_CACHE,
    Kind.WRITE_HIDDEN: Lane.DISK_WRITE,
    Kind.MOVE_QUERY: Lane.STORE_CACHE,
    Kind.ATTEND_CPU: Lane.ATTEND_CPU,
    Kind.MOVE_OUTPUT: Lane.LOAD_CACHE,
    Kind.COMPUTE: Lane.COMPUTE,
    Kind.SAMPLE: Lane.COMPUTE,
    Kind.FETCH_TOKENS: Lane.COMPUTE,
    Kind.RECEIVE_HIDDEN: Lane.RECEIVE,
    Kind.SEND_HIDDEN: Lane.SEND,
    Kind.RECEIVE_TOKENS: Lane.RECEIVE,
    Kind.SEND_TOKENS: Lane.SEND,
    Kind.ALL_REDUCE: Lane.REDUCE,
    Kind.COMMIT: Lane.HOST,
    Kind.BARRIER: Lane.HOST,
}


class Pool(StrEnum):
    """What ops hand to each other; together with indices, a resource of the schedule."""

    WEIGHT_SLOT = "weight_slot"  # streamed weights where compute reads them
    WEIGHT_STAGE = "weight_stage"  # on their way from disk to an accelerator
    EMBED_SLOT = "embed_slot"
    EMBED_STAGE = "embed_stage"
    KV = "kv"  # home of a micro-batch's rows in one layer on one tier
    KV_SLOT = "kv_slot"
    KV_READ_STAGE = "kv_read_stage"
    KV_WRITE_STAGE = "kv_write_stage"
    ATTENTION_SLOT = "attention_slot"  # a micro-batch's queries between a layer's segments
    QUERY_STAGE = "query_stage"  # those of rows that attend on the CPU, there
    PARTIAL_SLOT = "partial_slot"  # a shard's part of what is added to a micro-batch's hidden
    HIDDEN = "hidden"  # home of a micro-batch's hidden
    HIDDEN_SLOT = "hidden_slot"
    HIDDEN_READ_STAGE = "hidden_read_stage"
    HIDDEN_WRITE_STAGE = "hidden_write_stage"
    HEAD_INPUT = "head_input"
    LOGITS = "logits"
    TOKENS = "tokens"
    HOST_TOKENS = "host_tokens"
    ROWS = "rows"
    ORDER = "order"  # of ops that meet others' on a lane: each one "writes" what the next one does


Resource = tuple[Pool, int | str, int, int]


class Wait(NamedTuple):
    """One dependency: the op waited for, and why, like "produced:weight_slot" or "order:send"."""

    op: int
    why: str


class Op(NamedTuple):
    """One item of the schedule; an op appears after everything it waits for.

    `layer` is the position in the stage's layers. `reads` and `writes` are what it touches (a
    write may read too); a slot that the op uses is named by its index in the field of its pool.
    """

    id: int
    kind: Kind
    step: int
    layer: int
    batch: MicroBatch | None
    waits_for: tuple[Wait, ...]
    reads: tuple[Resource, ...] = ()
    writes: tuple[Resource, ...] = ()
    weight_slot: int | None = None
    kv_slot: int | None = None
    hidden_slot: int | None = None
    embed_slot: int | None = None
    stage_slot: int | None = None
    attention_slot: int | None = None
    segment: Segment | None = None  # None: the whole layer
    batches: tuple[MicroBatch, ...] = ()  # of a message that is about several
    partial_slot: int | None = None

    @property
    def lane(self) -> Lane:
        return LANE_OF[self.kind]

    @property
    def mb(self) -> int | None:
        """Index of its micro-batch, if it has one."""
        return None if self.batch is None else self.batch.index

    def __str__(self) -> str:
        mb = "" if self.batch is None else f", micro-batch {self.batch.index}"
        part = "" if self.segment is None else f" {self.segment.value}"
        return f"{self.kind.value}{part} (step {self.step}, layer {self.layer}{mb})"
