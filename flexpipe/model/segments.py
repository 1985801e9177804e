"""The math of a decoder, as functions over packed tokens.

A segment is a piece of a layer that one compute op may run: embed; qkv, attend, out, mlp; head. The
same functions serve every family: what a model has is read from its `ModelConfig`. Nothing here
knows tiers, lanes or streams; the caller has set inference mode, brought the weights and
given each run one tensor of its KV regions.

Weights may be in the dtype of the wire (`flexpipe.model.matmul`). Large temporaries come from the
`Workspace`. Hidden states are updated in place. Keys and values are always read back from the KV
cache, so its dtype or its compression shows in every token alike, whether a row was prefilled
whole, in chunks or step by step.

Of a model that is split, each shard runs these functions with the weights and heads it has. What a
half of a layer adds to the hidden states is then a sum over the shards: each leaves its part in
`partial_TH`, and whoever has summed the parts goes on with `after_attention` or `after_mlp`.

Shapes: T new tokens, H hidden size, E embedding width, N query heads, K KV heads, G = N / K, D head
dim, A = N * D, L region length, R rows, V vocabulary, O and I out and in features; X stands for D,
or for the bytes of a head's compressed numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpipe.kernels.attend import attend_rows
from flexpipe.kernels.codec import compress, widen
from flexpipe.model.batch import Batch, Piece, RopeTable, RowSpan
from flexpipe.model.config import ModelConfig
from flexpipe.model.cost import (
    COMPRESS_ELEMENTS,
    NORM_ELEMENTS,
    NORM_ROWS,
    RESULT_ROWS,
    WIDEN_ELEMENTS,
    WIDEN_ROOM,
)
from flexpipe.model.matmul import CompressedWeight, Weight, activated, convert, multiply
from flexpipe.model.workspace import Workspace
from flexpipe.plan.codec import Codec

__all__ = [
    "Batch",
    "EmbedWeights",
    "HeadWeights",
    "LayerWeights",
    "RopeTable",
    "RowSpan",
    "Workspace",
    "after_attention",
    "after_mlp",
    "append_kv",
    "attend",
    "attention_half",
    "decoder_layer",
    "embed",
    "head_input",
    "logits_slice",
    "mlp",
    "mlp_half",
    "norm",
    "out",
    "qkv",
    "turn",
]


@dataclass(slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer's tensors by role; a half that is not here is None."""

    attn_norm: Tensor | None = None
    attn_norm_bias: Tensor | None = None
    q_proj: Weight | None = None
    k_proj: Weight | None = None
    v_proj: Weight | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o_proj: Weight | None = None
    o_bias: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_norm_bias: Tensor | None = None
    gate_proj: Weight | None = None
    gate_bias: Tensor | None = None
    up_proj: Weight | None = None
    up_bias: Tensor | None = None
    down_proj: Weight | None = None
    down_bias: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class EmbedWeights:
    """What stands between embedding rows and the first layer."""

    embed_positions: Tensor | None = None
    project_in: Weight | None = None


@dataclass(slots=True, kw_only=True)
class HeadWeights:
    """What stands between the last layer and the vocabulary."""

    final_norm: Tensor | None = None
    final_norm_bias: Tensor | None = None
    project_out: Weight | None = None


def embed(
    rows_TE: Tensor | CompressedWeight,
    hidden_TH: Tensor,
    weights: EmbedWeights,
    batch: Batch,
    config: ModelConfig,
    ws: Workspace,
    absent_T: Tensor | None = None,
) -> None:
    """Writes the first hidden states from gathered embedding rows.

    `absent_T` marks tokens whose row another shard has; here they come to nothing, so that the
    hidden states are the sum over the shards.
    """
    mark = ws.mark()
    if config.has_projections:
        if isinstance(rows_TE, CompressedWeight) or rows_TE.dtype != hidden_TH.dtype:
            rows_TE = convert(rows_TE, ws.take(tuple(rows_TE.shape), hidden_TH.dtype))
        multiply(rows_TE, weights.project_in, None, hidden_TH, ws)
        ws.release(mark)
    else:
        convert(rows_TE, hidden_TH)
    if absent_T is not None:
        hidden_TH.masked_fill_(absent_T.unsqueeze(1), 0.0)
    if weights.embed_positions is not None:
        table = weights.embed_positions[config.position_offset :]
        positions_TH = ws.take(tuple(hidden_TH.shape), table.dtype)
        hidden_TH.add_(torch.index_select(table, 0, batch.positions_T, out=positions_TH))
    ws.release(mark)


def decoder_layer(
    hidden_TH: Tensor,
    weights: LayerWeights,
    batch: Batch,
    kvs: Sequence[Tensor],
    config: ModelConfig,
    layer: int,
    ws: Workspace,
) -> None:
    """One layer, whole; `kvs` holds one [R, L, 2, K, X] tensor per run of the batch."""
    attention_half(hidden_TH, weights, batch, kvs, config, layer, ws)
    mlp_half(hidden_TH, weights, config, ws)


def attention_half(
    hidden_TH: Tensor,
    weights: LayerWeights,
    batch: Batch,
    kvs: Sequence[Tensor],
    config: ModelConfig,
    layer: int,
    ws: Workspace,
    partial_TH: Tensor | None = None,
) -> None:
    if not batch.num_tokens:
        return
    mark = ws.mark()
    heads = config.num_heads + 2 * config.num_kv_heads
    both = ws.take((batch.num_tokens, heads, config.head_dim), hidden_TH.dtype)
    q_TND, kv_T2KD = qkv(hidden_TH, weights, batch, config, both, ws)
    append_kv(kv_T2KD, batch, kvs, ws)
    attn_TA = attend(q_TND, batch, kvs, config, layer, ws)
    out(attn_TA, hidden_TH, weights, config, ws, partial_TH)
    ws.release(mark)


def mlp_half(
    hidden_TH: Tensor,
    weights: LayerWeights,
    config: ModelConfig,
    ws: Workspace,
    partial_TH: Tensor | None = None,
) -> None:
    if hidden_TH.shape[0]:
        mlp(hidden_TH, weights, config, ws, partial_TH)


def qkv(
    hidden_TH: Tensor,
    weights: LayerWeights,
    batch: Batch,
    config: ModelConfig,
    both: Tensor,
    ws: Workspace,
) -> tuple[Tensor, Tensor]:
    """Queries [T, N, D] and keys-then-values [T, 2, K, D], ready for the cache.

    They are views of `both`, [T, N + 2 K, D], which they fill.
    """
    num_tokens = hidden_TH.shape[0]
    num_q, num_kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    flat = both.view(num_tokens, -1)
    q_end, k_end = num_q * dim, (num_q + num_kv) * dim
    mark = ws.mark()
    x_TH = hidden_TH
    if not config.post_norm:
        x_TH = ws.take(tuple(hidden_TH.shape), hidden_TH.dtype)
        norm(hidden_TH, weights.attn_norm, weights.attn_norm_bias, x_TH, config, ws)
    multiply(x_TH, weights.q_proj, weights.q_bias, flat[:, :q_end], ws)
    multiply(x_TH, weights.k_proj, weights.k_bias, flat[:, q_end:k_end], ws)
    multiply(x_TH, weights.v_proj, weights.v_bias, flat[:, k_end:], ws)
    ws.release(mark)
    q_TND = both[:, :num_q]
    if config.qk_norm:
        _rms_norm(q_TND, weights.q_norm, q_TND, config.norm_eps, ws)
        k_TKD = both[:, num_q : num_q + num_kv]
        _rms_norm(k_TKD, weights.k_norm, k_TKD, config.norm_eps, ws)
    if batch.cos_T1D is not None:
        turn(both[:, : num_q + num_kv], batch, ws)
    return q_TND, both[:, num_q:].view(num_tokens, 2, num_kv, dim)


def append_kv(kv_T2KD: Tensor, batch: Batch, kvs: Sequence[Tensor], ws: Workspace) -> None:
    """Stores the new tokens' keys and values behind each row's context, as the cache keeps them."""
    mark = ws.mark()
    codec = batch.kv_codec
    kv_T2KX = kv_T2KD if codec is None else _compressed(kv_T2KD, codec, ws)
    for write in batch.writes:
        kv_RL2KX = kvs[write.run][write.rows]
        new = kv_T2KX[write.tokens]
        if write.num_context is None:
            assert write.row_index_R is not None and write.position_R is not None
            kv_RL2KX.index_put_((write.row_index_R, write.position_R), new.to(kv_RL2KX.dtype))
        else:
            end = write.num_context + write.num_new
            place = kv_RL2KX[:, write.num_context : end]
            place.copy_(new.view(-1, write.num_new, *new.shape[1:]))
    ws.release(mark)


def attend(
    q_TND: Tensor,
    batch: Batch,
    kvs: Sequence[Tensor],
    config: ModelConfig,
    layer: int,
    ws: Workspace,
) -> Tensor:
    """Attention over each row's cache, [T, A]; the result takes the place of the queries."""
    for _, same_rows in groupby(batch.pieces[config.window(layer)], attrgetter("run", "rows")):
        pieces = tuple(same_rows)
        kv_RL2KX, ragged = kvs[pieces[0].run][pieces[0].rows], pieces[0].ragged
        if ragged is not None:
            attend_rows(q_TND[pieces[0].tokens], kv_RL2KX, ragged, batch.kv_codec)
        elif kv_RL2KX.dtype == q_TND.dtype:
            for piece in pieces:
                _attend_piece(q_TND[piece.tokens], kv_RL2KX[:, piece.keys], piece, config)
        else:
            _attend_widened(q_TND, kv_RL2KX, pieces, batch.kv_codec, config, ws)
    return q_TND.flatten(1)


def out(
    attn_TA: Tensor,
    hidden_TH: Tensor,
    weights: LayerWeights,
    config: ModelConfig,
    ws: Workspace,
    partial_TH: Tensor | None = None,
) -> None:
    """Adds the projected attention to the hidden states, or leaves it in `partial_TH`."""
    if partial_TH is not None:
        multiply(attn_TA, weights.o_proj, weights.o_bias, partial_TH, ws)
        return
    multiply(attn_TA, weights.o_proj, weights.o_bias, hidden_TH, ws, add=True)
    after_attention(hidden_TH, weights, config, ws)


def after_attention(
    hidden_TH: Tensor, weights: LayerWeights, config: ModelConfig, ws: Workspace
) -> None:
    """What the model does to the sum of hidden states and attention."""
    if config.post_norm:
        norm(hidden_TH, weights.attn_norm, weights.attn_norm_bias, hidden_TH, config, ws)


def mlp(
    hidden_TH: Tensor,
    weights: LayerWeights,
    config: ModelConfig,
    ws: Workspace,
    partial_TH: Tensor | None = None,
) -> None:
    """Adds the MLP of the hidden states to them, or leaves it in `partial_TH`.

    On a CPU a few tokens at a time, whose wide states then stay in the caches, unless that would
    convert the weights again and again.
    """
    num_tokens = hidden_TH.shape[0]
    assert weights.up_proj is not None
    stays = hidden_TH.is_cpu and weights.up_proj.dtype == hidden_TH.dtype
    step = RESULT_ROWS if stays else num_tokens
    for first in range(0, num_tokens, step):
        some = slice(first, first + step)
        partial = None if partial_TH is None else partial_TH[some]
        _mlp(hidden_TH[some], weights, config, ws, partial)


def after_mlp(hidden_TH: Tensor, weights: LayerWeights, config: ModelConfig, ws: Workspace) -> None:
    """What the model does to the sum of hidden states and MLP."""
    if config.post_norm:
        norm(hidden_TH, weights.mlp_norm, weights.mlp_norm_bias, hidden_TH, config, ws)


def _mlp(
    hidden_TH: Tensor,
    weights: LayerWeights,
    config: ModelConfig,
    ws: Workspace,
    partial_TH: Tensor | None,
) -> None:
    mark = ws.mark()
    x_TH = hidden_TH
    if not config.post_norm:
        x_TH = ws.take(tuple(hidden_TH.shape), hidden_TH.dtype)
        norm(hidden_TH, weights.mlp_norm, weights.mlp_norm_bias, x_TH, config, ws)
    if config.gated_mlp:
        wide = activated(x_TH, weights.gate_proj, weights.gate_bias, config.activation, ws)
        wide.mul_(activated(x_TH, weights.up_proj, weights.up_bias, None, ws))
    else:
        wide = activated(x_TH, weights.up_proj, weights.up_bias, config.activation, ws)
    if partial_TH is not None:
        multiply(wide, weights.down_proj, weights.down_bias, partial_TH, ws)
    else:
        multiply(wide, weights.down_proj, weights.down_bias, hidden_TH, ws, add=True)
        after_mlp(hidden_TH, weights, config, ws)
    ws.release(mark)


def head_input(
    hidden_TH: Tensor, index_R: Tensor, weights: HeadWeights, config: ModelConfig, ws: Workspace
) -> Tensor:
    """What meets the vocabulary, [R, E], for the tokens at `index_R`; stays in the workspace."""
    num_rows, dtype = index_R.shape[0], hidden_TH.dtype
    x_RE = ws.take((num_rows, config.hidden_size), dtype)
    torch.index_select(hidden_TH, 0, index_R, out=x_RE)
    if config.final_norm:
        norm(x_RE, weights.final_norm, weights.final_norm_bias, x_RE, config, ws)
    if config.has_projections:
        projected = ws.take((num_rows, config.input_size), dtype)
        multiply(x_RE, weights.project_out, None, projected, ws)
        return projected
    return x_RE


def logits_slice(x_RE: Tensor, lm_head_VE: Weight, out_RV: Tensor, ws: Workspace) -> None:
    """Logits for a slice of the vocabulary; `out_RV` may be a slice of columns."""
    multiply(x_RE, lm_head_VE, None, out_RV, ws)


def _attend_piece(q_TND: Tensor, kv_RL2KD: Tensor, piece: Piece, config: ModelConfig) -> None:
    """No key or value is copied: a group's query heads stand where fewer KV heads suffice."""
    k_RKLD, v_RKLD = kv_RL2KD.permute(2, 0, 3, 1, 4).unbind()
    num_kv, dim = config.num_kv_heads, config.head_dim
    if piece.num_new == 1:  # queries of one group share their keys like tokens of one row
        q_RKGD = q_TND.view(piece.num_rows, num_kv, -1, dim)
        q_RKGD.copy_(F.scaled_dot_product_attention(q_RKGD, k_RKLD, v_RKLD, piece.mask))
        return
    shape = (piece.num_rows, piece.num_new, config.num_heads, dim)
    q_RNTD = q_TND.view(shape)[:, piece.queries].transpose(1, 2)
    if piece.num_rows == 1:  # KV heads as the batch: a group reads one copy of its keys
        q_RNTD = q_RNTD.view(num_kv, -1, *q_RNTD.shape[2:])
        k_RKLD = k_RKLD.transpose(0, 1).expand(-1, q_RNTD.shape[1], -1, -1)
        v_RKLD = v_RKLD.transpose(0, 1).expand(-1, q_RNTD.shape[1], -1, -1)
    grouped = q_RNTD.shape[1] != k_RKLD.shape[1]
    attended = F.scaled_dot_product_attention(
        q_RNTD, k_RKLD, v_RKLD, piece.mask, is_causal=piece.causal, enable_gqa=grouped
    )
    q_RNTD.copy_(attended)


def _attend_widened(
    q_TND: Tensor,
    kv_RL2KX: Tensor,
    pieces: Sequence[Piece],
    codec: Codec | None,
    config: ModelConfig,
    ws: Workspace,
) -> None:
    """As many rows at a time as the room allows; their pieces share what was widened."""
    oldest = min(piece.keys.start for piece in pieces)
    num_keys = max(piece.keys.stop for piece in pieces) - oldest
    shape = (num_keys, 2, config.num_kv_heads, config.head_dim)
    num_rows, step = pieces[0].num_rows, max(1, WIDEN_ROOM // math.prod(shape))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        mark = ws.mark()
        wide_RL2KD = ws.take((last - first, *shape), q_TND.dtype)
        _widen(kv_RL2KX[first:last, oldest : oldest + num_keys], codec, wide_RL2KD)
        for piece in (_some_rows(piece, first, last) for piece in pieces):
            if piece.num_new == 1 and piece.mask is not None:
                # bytes behind a row's end may stand for no number, which no weight of 0 removes
                wide_RL2KD.masked_fill_((piece.mask < 0).view(-1, num_keys, 1, 1, 1), 0.0)
            keys = slice(piece.keys.start - oldest, piece.keys.stop - oldest)
            _attend_piece(q_TND[piece.tokens], wide_RL2KD[:, keys], piece, config)
        ws.release(mark)


def _some_rows(piece: Piece, first: int, last: int) -> Piece:
    """The part of a piece from its row `first` on, up to `last`."""
    row, token, mask = piece.rows.start, piece.tokens.start, piece.mask
    if mask is not None and piece.num_new == 1:  # one line per row; chunks share theirs
        mask = mask[first:last]
    return replace(
        piece,
        rows=slice(row + first, row + last),
        tokens=slice(token + first * piece.num_new, token + last * piece.num_new),
        mask=mask,
    )


def _compressed(kv_T2KD: Tensor, codec: Codec, ws: Workspace) -> Tensor:
    """[T, 2, K, X] in the workspace, made in slices of tokens: torch takes several times a
    slice's bytes."""
    num_tokens, dim = kv_T2KD.shape[0], kv_T2KD.shape[3]
    row_bytes = codec.row_bytes(dim)
    kv_T2KX = ws.take((*kv_T2KD.shape[:3], row_bytes), torch.uint8)
    step = max(1, COMPRESS_ELEMENTS // math.prod(kv_T2KD.shape[1:]))
    for first in range(0, num_tokens, step):
        part, target = kv_T2KD[first : first + step], kv_T2KX[first : first + step]
        compress(part.reshape(-1, dim), codec, target.view(-1, row_bytes))
    return kv_T2KX


def _widen(kv_RL2KX: Tensor, codec: Codec | None, wide_RL2KD: Tensor) -> None:
    """A cache in the compute dtype, in slices of tokens for torch's sake."""
    if codec is None:
        wide_RL2KD.copy_(kv_RL2KX)
        return
    step = max(1, WIDEN_ELEMENTS // wide_RL2KD[:, 0].numel())
    for first in range(0, wide_RL2KD.shape[1], step):
        part = slice(first, first + step)
        widen(kv_RL2KX[:, part], codec, wide_RL2KD[:, part])


def turn(x_TND: Tensor, batch: Batch, ws: Workspace) -> None:
    """Rotary positions in place: x cos + rotate_half(x) sin."""
    assert batch.cos_T1D is not None and batch.sin_T1D is not None
    mark = ws.mark()
    halves = x_TND.chunk(2, -1)
    swapped = ws.take(tuple(x_TND.shape), x_TND.dtype)
    torch.cat((halves[1], halves[0]), -1, out=swapped)
    x_TND.mul_(batch.cos_T1D).addcmul_(swapped, batch.sin_T1D)
    ws.release(mark)


def norm(
    x_TH: Tensor,
    weight_H: Tensor | None,
    bias_H: Tensor | None,
    out_TH: Tensor,
    config: ModelConfig,
    ws: Workspace,
) -> None:
    """The model's kind of norm; `out_TH` may be `x_TH` itself."""
    if config.norm == "rms":
        _rms_norm(x_TH, weight_H, out_TH, config.norm_eps, ws)
    else:
        _layer_norm(x_TH, weight_H, bias_H, out_TH, config.norm_eps)


def _rms_norm(x: Tensor, weight: Tensor | None, out: Tensor, eps: float, ws: Workspace) -> None:
    """Over the last dimension, in float32; faster than torch's own on a CPU, where a narrower
    dtype is widened in slices that stay in the caches."""
    assert weight is not None
    if x.is_cpu and x.dtype != torch.float32:
        for first in range(0, x.shape[0], NORM_ROWS):
            mark, part = ws.mark(), x[first : first + NORM_ROWS]
            wide = ws.take(tuple(part.shape), torch.float32).copy_(part)
            _divide_by_rms(wide, wide, eps, ws)
            out[first : first + NORM_ROWS].copy_(wide)
            ws.release(mark)
    else:
        _divide_by_rms(x, out, eps, ws)
    out.mul_(weight)


def _divide_by_rms(x: Tensor, out: Tensor, eps: float, ws: Workspace) -> None:
    mark = ws.mark()
    size = ws.take((*x.shape[:-1], 1), torch.float32)
    torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32, out=size)
    torch.addcmul(ws.constant(eps), size, size, value=1 / x.shape[-1], out=size).rsqrt_()
    torch.mul(x, size, out=out)
    ws.release(mark)


def _layer_norm(
    x_TH: Tensor, weight_H: Tensor | None, bias_H: Tensor | None, out_TH: Tensor, eps: float
) -> None:
    """In slices of tokens: torch allocates its result, and a small one costs no page faults."""
    assert weight_H is not None and bias_H is not None
    if weight_H.dtype != x_TH.dtype:
        weight_H, bias_H = weight_H.to(x_TH.dtype), bias_H.to(x_TH.dtype)
    size = x_TH.shape[1]
    step = max(1, NORM_ELEMENTS // size)
    for first in range(0, x_TH.shape[0], step):
        part = x_TH[first : first + step]
        out_TH[first : first + step].copy_(F.layer_norm(part, (size,), weight_H, bias_H, eps))
