"""The math of a decoder, as functions over packed tokens.

A segment is a piece of a layer that one compute op may run: embed; qkv, attend, out, mlp; head. The
same functions serve every family: what a model has is read from its `ModelConfig`. Nothing here
knows tiers, lanes or streams; the caller has set inference mode, brought the weights and
given each run one tensor of its KV regions.

Weights may be in the dtype of the wire (`flexpipe.model.matmul`). Large temporaries come from the
`Workspace`. Hidden states are updated in place. Keys and values are always read back from the KV
cache, so its dtype shows in every token alike, whether a row was prefilled whole, in chunks or step
by step.

Shapes: T new tokens, H hidden size, E embedding width, N query heads, K KV heads, G = N / K, D head
dim, A = N * D, L region length, R rows, V vocabulary, O and I out and in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpipe.kernels.attend import attend_rows
from flexpipe.model.batch import Batch, Piece, RopeTable, RowSpan
from flexpipe.model.config import ModelConfig
from flexpipe.model.cost import NORM_ELEMENTS, NORM_ROWS, RESULT_ROWS
from flexpipe.model.matmul import CompressedWeight, Weight, activated, convert, multiply
from flexpipe.model.workspace import Workspace

__all__ = [
    "Batch",
    "EmbedWeights",
    "HeadWeights",
    "LayerWeights",
    "RopeTable",
    "RowSpan",
    "Workspace",
    "append_kv",
    "attend",
    "attention_half",
    "decoder_layer",
    "embed",
    "head_input",
    "logits_slice",
    "mlp",
    "mlp_half",
    "out",
    "qkv",
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
) -> None:
    """Writes the first hidden states from gathered embedding rows."""
    mark = ws.mark()
    if config.has_projections:
        if isinstance(rows_TE, CompressedWeight) or rows_TE.dtype != hidden_TH.dtype:
            rows_TE = convert(rows_TE, ws.take(tuple(rows_TE.shape), hidden_TH.dtype))
        multiply(rows_TE, weights.project_in, None, hidden_TH, ws)
        ws.release(mark)
    else:
        convert(rows_TE, hidden_TH)
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
    """One layer, whole; `kvs` holds one [R, L, 2, K, D] tensor per run of the batch."""
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
) -> None:
    if not batch.num_tokens:
        return
    mark = ws.mark()
    heads = config.num_heads + 2 * config.num_kv_heads
    both = ws.take((batch.num_tokens, heads, config.head_dim), hidden_TH.dtype)
    q_TND, kv_T2KD = qkv(hidden_TH, weights, batch, config, both, ws)
    append_kv(kv_T2KD, batch, kvs)
    out(attend(q_TND, batch, kvs, config, layer, ws), hidden_TH, weights, config, ws)
    ws.release(mark)


def mlp_half(hidden_TH: Tensor, weights: LayerWeights, config: ModelConfig, ws: Workspace) -> None:
    if hidden_TH.shape[0]:
        mlp(hidden_TH, weights, config, ws)


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
        _norm(hidden_TH, weights.attn_norm, weights.attn_norm_bias, x_TH, config, ws)
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
        _turn(both[:, : num_q + num_kv], batch, ws)
    return q_TND, both[:, num_q:].view(num_tokens, 2, num_kv, dim)


def append_kv(kv_T2KD: Tensor, batch: Batch, kvs: Sequence[Tensor]) -> None:
    """Stores the new tokens' keys and values behind each row's context, in the cache's dtype."""
    for write in batch.writes:
        kv_RL2KD = kvs[write.run][write.rows]
        new = kv_T2KD[write.tokens]
        if write.num_context is None:
            assert write.row_index_R is not None and write.position_R is not None
            kv_RL2KD.index_put_((write.row_index_R, write.position_R), new.to(kv_RL2KD.dtype))
        else:
            end = write.num_context + write.num_new
            place = kv_RL2KD[:, write.num_context : end]
            place.copy_(new.view(-1, write.num_new, *new.shape[1:]))


def attend(
    q_TND: Tensor,
    batch: Batch,
    kvs: Sequence[Tensor],
    config: ModelConfig,
    layer: int,
    ws: Workspace,
) -> Tensor:
    """Attention over each row's cache, [T, A]; the result takes the place of the queries."""
    for piece in batch.pieces[config.window(layer)]:
        if piece.ragged is not None:
            attend_rows(q_TND[piece.tokens], kvs[piece.run][piece.rows], piece.ragged, None)
            continue
        kv_RL2KD = kvs[piece.run][piece.rows, piece.keys]
        if kv_RL2KD.dtype == q_TND.dtype:
            _attend_piece(q_TND[piece.tokens], kv_RL2KD, piece, config)
        else:
            _attend_converted(q_TND[piece.tokens], kv_RL2KD, piece, config, ws)
    return q_TND.flatten(1)


def out(
    attn_TA: Tensor, hidden_TH: Tensor, weights: LayerWeights, config: ModelConfig, ws: Workspace
) -> None:
    """Adds the projected attention to the hidden states."""
    multiply(attn_TA, weights.o_proj, weights.o_bias, hidden_TH, ws, add=True)
    if config.post_norm:
        _norm(hidden_TH, weights.attn_norm, weights.attn_norm_bias, hidden_TH, config, ws)


def mlp(hidden_TH: Tensor, weights: LayerWeights, config: ModelConfig, ws: Workspace) -> None:
    """Adds the MLP of the hidden states to them.

    On a CPU a few tokens at a time, whose wide states then stay in the caches, unless that would
    convert the weights again and again.
    """
    num_tokens = hidden_TH.shape[0]
    assert weights.up_proj is not None
    stays = hidden_TH.is_cpu and weights.up_proj.dtype == hidden_TH.dtype
    step = RESULT_ROWS if stays else num_tokens
    for first in range(0, num_tokens, step):
        _mlp(hidden_TH[first : first + step], weights, config, ws)


def _mlp(hidden_TH: Tensor, weights: LayerWeights, config: ModelConfig, ws: Workspace) -> None:
    mark = ws.mark()
    x_TH = hidden_TH
    if not config.post_norm:
        x_TH = ws.take(tuple(hidden_TH.shape), hidden_TH.dtype)
        _norm(hidden_TH, weights.mlp_norm, weights.mlp_norm_bias, x_TH, config, ws)
    if config.gated_mlp:
        wide = activated(x_TH, weights.gate_proj, weights.gate_bias, config.activation, ws)
        wide.mul_(activated(x_TH, weights.up_proj, weights.up_bias, None, ws))
    else:
        wide = activated(x_TH, weights.up_proj, weights.up_bias, config.activation, ws)
    multiply(wide, weights.down_proj, weights.down_bias, hidden_TH, ws, add=True)
    if config.post_norm:
        _norm(hidden_TH, weights.mlp_norm, weights.mlp_norm_bias, hidden_TH, config, ws)
    ws.release(mark)


def head_input(
    hidden_TH: Tensor, index_R: Tensor, weights: HeadWeights, config: ModelConfig, ws: Workspace
) -> Tensor:
    """What meets the vocabulary, [R, E], for the tokens at `index_R`; stays in the workspace."""
    num_rows, dtype = index_R.shape[0], hidden_TH.dtype
    x_RE = ws.take((num_rows, config.hidden_size), dtype)
    torch.index_select(hidden_TH, 0, index_R, out=x_RE)
    if config.final_norm:
        _norm(x_RE, weights.final_norm, weights.final_norm_bias, x_RE, config, ws)
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


def _attend_converted(
    q_TND: Tensor, kv_RL2KD: Tensor, piece: Piece, config: ModelConfig, ws: Workspace
) -> None:
    """Row by row, so that no more than one row's cache stands in the compute dtype."""
    for row, (q, kv) in enumerate(zip(torch.split(q_TND, piece.num_new), kv_RL2KD, strict=True)):
        mark = ws.mark()
        converted = ws.take(tuple(kv.shape), q_TND.dtype).copy_(kv)
        _attend_piece(q, converted.unsqueeze(0), _one_row(piece, row), config)
        ws.release(mark)


def _one_row(piece: Piece, row: int) -> Piece:
    mask = piece.mask
    if mask is not None and piece.num_new == 1:  # one line per row; chunks share theirs
        mask = mask[row : row + 1]
    return replace(piece, rows=slice(row, row + 1), mask=mask)


def _turn(x_TND: Tensor, batch: Batch, ws: Workspace) -> None:
    """Rotary positions in place: x cos + rotate_half(x) sin."""
    assert batch.cos_T1D is not None and batch.sin_T1D is not None
    mark = ws.mark()
    halves = x_TND.chunk(2, -1)
    swapped = ws.take(tuple(x_TND.shape), x_TND.dtype)
    torch.cat((halves[1], halves[0]), -1, out=swapped)
    x_TND.mul_(batch.cos_T1D).addcmul_(swapped, batch.sin_T1D)
    ws.release(mark)


def _norm(
    x_TH: Tensor,
    weight_H: Tensor | None,
    bias_H: Tensor | None,
    out_TH: Tensor,
    config: ModelConfig,
    ws: Workspace,
) -> None:
    """`out_TH` may be `x_TH` itself."""
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
