"""Products with a weight: the fastest kernel where the tensors lie, and conversion on the way.

On a CPU torch multiplies float32 matrices with MKL, whose rate falls off below some 256 rows.
oneDNN, which torch carries too, keeps its rate down to 64 rows and is up to twice as fast below
(benchmarks/matmul.py), so weights of some size go there, in blocks of rows: oneDNN cannot write
into a tensor that exists, and a small result comes from memory that the process has touched before.
A weight that stays may be packed into oneDNN's own layout once, which spares it the work of doing
so in every product: a tenth at 64 rows, half at 8. In bfloat16 torch.mm is oneDNN's already.

A weight in the dtype of the wire is converted slice by slice into one scratch that stays in the
caches, never as a whole; so is a compressed one, in the lane that multiplies.

Shapes: T tokens, I in features, O out features, B bytes of a compressed row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpipe.kernels.codec import widen
from flexpipe.model.cost import (
    CONVERT_ELEMENTS,
    CONVERT_STEP,
    ONEDNN_ELEMENTS,
    RESULT_COLUMNS,
    RESULT_ROWS,
)
from flexpipe.model.workspace import Workspace
from flexpipe.plan.codec import Codec

# a packed weight's blocks are made from one buffer of this size, and suit any number of rows
PACK_BYTES = 32 * 2**20
_FUSED = {
    None: ("none", ""),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
_PACK_STEP, _PACK_ROWS = 64, 64


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [O, I] in oneDNN's layout, in blocks of out features."""

    shape: tuple[int, int]
    dtype: torch.dtype
    blocks: tuple[tuple[slice, Tensor], ...]

    @classmethod
    def make(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        buffer: Tensor,
        fill: Callable[[slice, Tensor], object],
    ) -> PackedWeight:
        """Pack a weight that `fill` writes, some out features at a time, into a view of `buffer`.

        `buffer` holds `PACK_BYTES`, uint8; nothing of it is kept.
        """
        num_out, num_in = shape
        room = buffer.view(dtype)
        step = max(_PACK_STEP, room.numel() // num_in // _PACK_STEP * _PACK_STEP)
        blocks = []
        for rows in _blocks(num_out, step):
            plain = room[: (rows.stop - rows.start) * num_in].view(-1, num_in)
            fill(rows, plain)
            packed = torch.ops.mkldnn._reorder_linear_weight(plain, _PACK_ROWS)
            blocks.append((rows, packed))
        return cls(shape, dtype, tuple(blocks))


@dataclass(frozen=True, slots=True)
class CompressedWeight:
    """A weight [O, I], or rows of one, in its compressed form."""

    rows_OB: Tensor
    codec: Codec
    num_in: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows_OB.shape[0], self.num_in

    @property
    def dtype(self) -> torch.dtype:
        """Of the bytes it has: never one to compute in."""
        return self.rows_OB.dtype

    def __getitem__(self, rows: slice) -> CompressedWeight:
        return CompressedWeight(self.rows_OB[rows], self.codec, self.num_in)

    def take(self, index_T: Tensor) -> CompressedWeight:
        """The rows at `index_T`, copied."""
        rows_TB = torch.index_select(self.rows_OB, 0, index_T)
        return CompressedWeight(rows_TB, self.codec, self.num_in)


Weight = Tensor | PackedWeight | CompressedWeight


def packs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight that stays where it is computed with should be packed."""
    if not _HAS_ONEDNN or device.type != "cpu" or dtype not in _packable() or len(shape) != 2:
        return False
    fits = _PACK_STEP * shape[1] * dtype.itemsize <= PACK_BYTES
    return fits and shape[0] * shape[1] >= ONEDNN_ELEMENTS


def convert(weight_OI: Tensor | CompressedWeight, out_OI: Tensor) -> Tensor:
    """A weight's numbers in the dtype of `out_OI`, which may have gaps between its rows."""
    if isinstance(weight_OI, CompressedWeight):
        widen(weight_OI.rows_OB, weight_OI.codec, out_OI)
    else:
        out_OI.copy_(weight_OI)
    return out_OI


def multiply(
    x_TI: Tensor,
    weight_OI: Weight | None,
    bias_O: Tensor | None,
    out_TO: Tensor,
    ws: Workspace,
    *,
    add: bool = False,
) -> None:
    """x weight^T + bias into `out_TO`, or added to it; `out_TO` may be a slice of columns."""
    assert weight_OI is not None
    dtype = x_TI.dtype
    if bias_O is not None and bias_O.dtype != dtype:
        bias_O = bias_O.to(dtype)
    if isinstance(weight_OI, PackedWeight):
        for columns, packed in weight_OI.blocks:
            bias = None if bias_O is None else bias_O[columns]
            _multiply_in_rows(x_TI, packed, bias, out_TO[:, columns], add=add)
        return
    if isinstance(weight_OI, Tensor) and weight_OI.dtype == dtype:
        _multiply(x_TI, weight_OI, bias_O, out_TO, add=add)
        return
    mark = ws.mark()
    num_out, num_in = weight_OI.shape
    step = _convert_step(num_out, num_in)
    scratch = ws.take((step, num_in), dtype)
    for columns in _blocks(num_out, step):
        converted = convert(weight_OI[columns], scratch[: columns.stop - columns.start])
        bias = None if bias_O is None else bias_O[columns]
        _multiply(x_TI, converted, bias, out_TO[:, columns], add=add)
    ws.release(mark)


def activated(
    x_TI: Tensor,
    weight_OI: Weight | None,
    bias_O: Tensor | None,
    activation: str | None,
    ws: Workspace,
) -> Tensor:
    """The activation of x weight^T + bias, [T, O], good until the workspace's mark is released.

    It lies where the kernel puts it, if that is one small block, activated on the way; else in the
    workspace. `activation` is one of `ModelConfig`'s, or None.
    """
    assert weight_OI is not None
    num_tokens, num_out = x_TI.shape[0], weight_OI.shape[0]
    whole = _in_one_block(x_TI, weight_OI)
    if whole is not None:
        name, variant = _FUSED[activation]
        bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
        linear = torch.ops.mkldnn._linear_pointwise
        made: Tensor = linear(x_TI, whole, bias_O, name, [], variant)
        return made
    out = ws.take((num_tokens, num_out), x_TI.dtype)
    multiply(x_TI, weight_OI, bias_O, out, ws)
    match activation:
        case "silu":
            F.silu(out, inplace=True)
        case "relu":
            out.relu_()
        case "gelu":
            torch.ops.aten.gelu_(out, approximate="none")
        case "gelu_tanh":
            torch.ops.aten.gelu_(out, approximate="tanh")
    return out


def _in_one_block(x_TI: Tensor, weight_OI: Weight) -> Tensor | None:
    """The weight as oneDNN takes it, if the product is a single small block of its."""
    if x_TI.shape[0] > RESULT_ROWS or weight_OI.shape[0] > RESULT_COLUMNS:
        return None
    if isinstance(weight_OI, PackedWeight):
        return weight_OI.blocks[0][1] if len(weight_OI.blocks) == 1 else None
    if not isinstance(weight_OI, Tensor) or weight_OI.dtype != x_TI.dtype:
        return None
    return weight_OI if _suits_onednn(x_TI, weight_OI) else None


def _convert_step(num_out: int, num_in: int) -> int:
    """Out features converted at a time; kernels like them in whole blocks."""
    step = CONVERT_ELEMENTS // num_in
    return min(num_out, max(1, step // CONVERT_STEP * CONVERT_STEP or step))


def _multiply(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor, *, add: bool
) -> None:
    if _suits_onednn(x_TI, weight_OI):
        for columns in _blocks(weight_OI.shape[0], RESULT_COLUMNS):
            bias = None if bias_O is None else bias_O[columns]
            _multiply_in_rows(x_TI, weight_OI[columns], bias, out_TO[:, columns], add=add)
    elif add:
        out_TO.addmm_(x_TI, weight_OI.t())
        if bias_O is not None:
            out_TO.add_(bias_O)
    elif bias_O is not None:
        torch.addmm(bias_O, x_TI, weight_OI.t(), out=out_TO)
    else:
        torch.mm(x_TI, weight_OI.t(), out=out_TO)


def _suits_onednn(x_TI: Tensor, weight_OI: Tensor) -> bool:
    large = weight_OI.numel() >= ONEDNN_ELEMENTS
    return _HAS_ONEDNN and large and x_TI.is_cpu and x_TI.dtype == torch.float32


def _multiply_in_rows(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor, *, add: bool
) -> None:
    """With oneDNN; the weight may be packed."""
    for rows in _blocks(x_TI.shape[0], RESULT_ROWS):
        made = torch.ops.mkldnn._linear_pointwise(x_TI[rows], weight_OI, bias_O, "none", [], "")
        place = out_TO[rows]
        place.add_(made) if add else place.copy_(made)


def _blocks(size: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, size)) for first in range(0, size, step))


@functools.cache
def _packable() -> tuple[torch.dtype, ...]:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def _onednn_works() -> bool:
    """Whether this build of torch has oneDNN's linear, and it does what its name says."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight = torch.ones(2, 3), torch.arange(12.0).view(4, 3)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 2)
        made = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(made, x @ weight.t())


_HAS_ONEDNN = _onednn_works()
