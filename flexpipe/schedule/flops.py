"""Floating-point operations of COMPUTE, as the emulated accelerator and the cost model count them.

Products and attention count; norms, rotations and the looking up of tokens do not.
"""

from __future__ import annotations

from flexpipe.model.cost import (
    attend_flops,
    head_flops,
    mlp_flops,
    num_attended,
    out_flops,
    qkv_flops,
)
from flexpipe.plan.layer import LayerKind, Piece
from flexpipe.plan.plan import Plan
from flexpipe.schedule.op import Op, pieces_of

_PRODUCTS = {Piece.QKV: qkv_flops, Piece.OUT: out_flops, Piece.MLP: mlp_flops}


def compute_flops(plan: Plan, op: Op, *, num_new: int, num_sampled: int, attended: int) -> int:
    """Of one COMPUTE; `attended` is how many keys its new tokens see, summed."""
    layer, config = plan.layers[op.layer], plan.config
    if layer.kind == LayerKind.EMBED:
        return 0
    if layer.kind == LayerKind.HEAD:
        assert layer.vocab is not None
        first, stop = layer.vocab
        return head_flops(config, num_sampled) * (stop - first) // len(config.vocab_rows)
    pieces = pieces_of(layer, op.segment)
    products = (_PRODUCTS[piece](config, num_new) for piece in pieces if piece in _PRODUCTS)
    return sum(products) + attend_flops(config, attended)


def num_attended_by(plan: Plan, op: Op) -> int:
    """Keys that the new tokens of a COMPUTE's rows see in it; the CPU's rows see theirs there."""
    layer, batch = plan.layers[op.layer], op.batch
    if batch is None or Piece.ATTEND not in pieces_of(layer, op.segment):
        return 0
    window = plan.config.window(layer.decoder)
    return sum(
        num_attended(row.num_context, row.num_new, window)
        for row in batch.rows
        if not plan.row_attends_on_cpu(batch.index, row.place, row.num_new)
    )
