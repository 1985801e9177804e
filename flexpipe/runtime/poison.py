"""Rubbish in slots, for tests: whoever comes before they are filled, or too late, finds it."""

from __future__ import annotations

import torch

from flexpipe.memory.tier import POISON
from flexpipe.runtime.layout import rows_of
from flexpipe.runtime.stores import Stores
from flexpipe.schedule.op import Kind, Op, Segment

_LEAVES_PARTIAL = (Segment.ATTENTION, Segment.PROJECT, Segment.MLP)


def poison_all(stores: Stores) -> None:
    stores.weights.poison_all()
    stores.kv_cache.poison_all()
    stores.hidden.poison_all()
    stores.queries.poison_all()
    stores.buffers.poison_all()


def poison_ahead(stores: Stores, op: Op, *, has_streams: bool) -> None:
    """Into the slot or stage that `op` is about to fill, unless a stream fills it later."""
    kind, stage, buffers = op.kind, op.stage_slot, stores.buffers
    if kind in (Kind.READ_WEIGHT, Kind.LOAD_WEIGHT):
        filled = None if kind == Kind.LOAD_WEIGHT else stage
        stores.weights.poison(slot=op.weight_slot, stage=filled)
    elif kind == Kind.READ_EMBED and stage is not None:
        rows_TE = buffers.staged_embed_rows(rows_of(op).num_new, stage)
        rows_TE.view(torch.uint8).fill_(POISON)
    elif kind in (Kind.READ_EMBED, Kind.LOAD_EMBED):
        rows_TE = buffers.embed_rows(rows_of(op).num_new, op.embed_slot)
        rows_TE.view(torch.uint8).fill_(POISON)
    elif kind in (Kind.READ_CACHE, Kind.LOAD_CACHE):
        filled = None if kind == Kind.LOAD_CACHE else stage
        stores.kv_cache.poison(slot=op.kv_slot, read_stage=filled)
    elif kind in (Kind.READ_HIDDEN, Kind.LOAD_HIDDEN, Kind.RECEIVE_HIDDEN):
        filled = stage if kind == Kind.READ_HIDDEN else None
        stores.hidden.poison(slot=op.hidden_slot, read_stage=filled)
    elif kind == Kind.COMPUTE and op.segment == Segment.QKV:
        assert op.attention_slot is not None
        stores.queries.poison(slot=op.attention_slot)
    elif kind == Kind.COMPUTE and op.segment in _LEAVES_PARTIAL:
        buffers.poison_partial(op.partial_slot)
    elif has_streams:
        return  # host memory is filled later than this is called
    elif kind == Kind.STORE_CACHE:
        stores.kv_cache.poison(write_stage=stage)
    elif kind == Kind.STORE_HIDDEN:
        stores.hidden.poison(write_stage=stage)
    elif kind == Kind.MOVE_QUERY:
        stores.queries.poison(stage=stage)
