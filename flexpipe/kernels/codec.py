"""Arithmetic of group-wise compression (`flexpipe.plan.codec` has the layout).

Compressing is rare or small, and plain torch. Widening happens in front of every product: on a CPU
by a kernel, elsewhere by torch's operations. Both give the same bits: a code of at most 8 bits
times a float16 step is exact in float32, so that nothing depends on how the sum is fused.

Shapes: M rows, N numbers in each, B bytes of a compressed row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flexpipe.kernels import team
from flexpipe.kernels.emit import BYTE, Emitter, Value
from flexpipe.plan.codec import Codec, Segment

__all__ = ["LARGEST", "compile_for", "compress", "widen"]

LARGEST = 65504.0  # of float16, which keeps a group's smallest number and step
_ROWS_AT_ONCE = 8  # that a thread takes
_MOST_LANES = 16
_PARAM_BYTES = 2


def compress(x_MN: Tensor, codec: Codec, out_MB: Tensor) -> None:
    """Codes, steps and smallest numbers of each row; numbers beyond float16's saturate.

    `x_MN` is of any floating dtype, `out_MB` is uint8 [M, codec.row_bytes(N)]. A number becomes
    one that differs by at most half its group's step; NaN makes its whole group NaN.
    """
    rows, size = x_MN.shape
    x_MN = x_MN.float().clamp(-LARGEST, LARGEST)
    whole = size // codec.group_size * codec.group_size
    parts = []
    if whole:
        parts.append(
            _codes(
                x_MN[:, :whole].view(rows, whole // codec.group_size, codec.group_size), codec.bits
            )
        )
    if whole < size:
        parts.append(_codes(x_MN[:, whole:].unsqueeze(1), codec.bits))
    codes = torch.cat([codes for codes, _ in parts], 1)
    params = torch.cat([params for _, params in parts], 1)
    out_MB[:, : codes.shape[1]] = codes
    out_MB[:, codes.shape[1] : codec.code_bytes(size)] = 0
    out_MB[:, codec.code_bytes(size) :] = params.view(torch.uint8)


def widen(rows_MB: Tensor, codec: Codec, out_MN: Tensor) -> None:
    """The numbers that compressed rows stand for; `out_MN` may have gaps between its rows.

    M may be several dimensions, of which all but the first lie without gaps.
    """
    assert out_MN.stride(-1) == 1 and rows_MB.stride(-1) == 1
    if not (out_MN.is_cpu and team.available()):
        _widen_by_torch(rows_MB, codec, out_MN)
    elif rows_MB.dim() == 2:
        _widen_by_kernel(rows_MB, codec, out_MN)
    else:
        for part_MB, part_MN in zip(rows_MB, out_MN, strict=True):
            _widen_by_kernel(_as_rows(part_MB), codec, _as_rows(part_MN))


def _as_rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _codes(x_MGS: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed codes [M, bytes] and (step, smallest) [M, 2 G], float16, for groups of one size."""
    smallest = _rounded_down(x_MGS.amin(2))
    step = _rounded_up((x_MGS.amax(2) - smallest.float()) / ((1 << bits) - 1))
    offset = x_MGS - smallest.float().unsqueeze(2)
    codes = offset.div_(step.float().unsqueeze(2)).nan_to_num_(0.0).round_()
    codes = codes.clamp_(0, (1 << bits) - 1).to(torch.uint8)
    if bits == 4:
        half = -(-codes.shape[2] // 2)
        high = codes[:, :, half:] << 4
        codes = codes[:, :, :half].clone()
        codes[:, :, : high.shape[2]] |= high
    return codes.flatten(1), torch.stack((step, smallest), 2).flatten(1)


def _rounded_down(x: Tensor) -> Tensor:
    """The largest float16 that is not above `x`."""
    near = x.to(torch.float16)
    bits = near.view(torch.int16)
    above = near.float() > x
    # one step towards -inf: away from zero below it, towards zero above, past zero at it
    lower = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -0x7FFF))
    return torch.where(above, lower.to(torch.int16), bits).view(torch.float16)


def _rounded_up(x: Tensor) -> Tensor:
    """The smallest float16 that is not below `x`, which is not negative."""
    near = x.to(torch.float16)
    below = near.float() < x
    return (near.view(torch.int16) + below).to(torch.int16).view(torch.float16)


def _widen_by_torch(rows_MB: Tensor, codec: Codec, out_MN: Tensor) -> None:
    """Whole groups in one go, then what is left."""
    size = out_MN.shape[-1]
    params = rows_MB[..., codec.code_bytes(size) :].contiguous().view(torch.float16).float()
    params = _split(params, (codec.num_groups(size), 1, 2))
    group, whole = codec.group_size, size // codec.group_size
    group_bytes = group * codec.bits // 8
    if whole:
        codes = rows_MB[..., : whole * group_bytes]
        target = out_MN[..., : whole * group]
        _widen_groups(
            _split(codes, (whole, group_bytes)),
            params[..., :whole, :, :],
            codec.bits,
            _split(target, (whole, group)),
        )
    if whole * group < size:
        codes = rows_MB[..., whole * group_bytes :][..., : _code_bytes(size % group, codec.bits)]
        target = out_MN[..., whole * group :].unsqueeze(-2)
        _widen_groups(codes.unsqueeze(-2), params[..., whole:, :, :], codec.bits, target)


def _split(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The last dimension as several."""
    return x.view(*x.shape[:-1], *shape)


def _widen_groups(codes: Tensor, params: Tensor, bits: int, out: Tensor) -> None:
    step, smallest = params[..., 0], params[..., 1]
    if bits == 8:
        out.copy_(codes * step + smallest)
        return
    half = codes.shape[-1]
    out[..., :half] = (codes & 15) * step + smallest
    out[..., half:] = ((codes >> 4) * step + smallest)[..., : out.shape[-1] - half]


def _code_bytes(size: int, bits: int) -> int:
    return size if bits == 8 else -(-size // 2)


def compile_for(codec: Codec, size: int, dtype: str) -> None:
    """Have the kernel at hand that widens rows of `size` numbers to `dtype`."""
    _kernel(codec, size, dtype)


def _widen_by_kernel(rows_MB: Tensor, codec: Codec, out_MN: Tensor) -> None:
    num_rows, size = out_MN.shape
    counter = torch.zeros(1, dtype=torch.int64)
    dtype = str(out_MN.dtype).removeprefix("torch.")
    _kernel(codec, size, dtype).run(
        [
            rows_MB.data_ptr(),
            out_MN.data_ptr(),
            counter.data_ptr(),
            rows_MB.stride(0),
            out_MN.stride(0) * out_MN.element_size(),
            num_rows,
            -(-num_rows // _ROWS_AT_ONCE),
        ]
    )


@functools.cache
def _kernel(codec: Codec, size: int, dtype: str) -> team.Kernel:
    return team.Kernel("widen", _Widen(codec, size, dtype).text())


class _Widen:
    """The loops of one kernel: rows, groups, vectors of a group's codes."""

    def __init__(self, codec: Codec, size: int, dtype: str) -> None:
        self._codec = codec
        self._size = size
        self._dtype = dtype
        edges = [edge for segment in codec.segments(size) for edge in (segment.start, segment.stop)]
        self._e = Emitter("widen", math.gcd(_MOST_LANES, *edges))
        self._item = 4 if dtype == "float32" else 2

    def text(self) -> str:
        e = self._e
        source, target, counter, source_stride, target_stride, num_rows, num_items = e.fields(7)
        with e.shared_items(e.pointer(counter), num_items) as item:
            first = e.linear((item, _ROWS_AT_ONCE))
            last = e.smaller(e.builder.add(first, e.number(_ROWS_AT_ONCE)), num_rows)
            with e.loop(first, last) as row:
                codes = e.at(e.pointer(source), e.builder.mul(row, source_stride), BYTE)
                numbers = e.at(e.pointer(target), e.builder.mul(row, target_stride), BYTE)
                self._row(codes, numbers)
        return e.text()

    def _row(self, codes: Value, numbers: Value) -> None:
        """Equal groups in a loop, the last one by itself where it is shorter."""
        e, codec = self._e, self._codec
        whole = self._size // codec.group_size
        params = e.at(codes, codec.code_bytes(self._size), BYTE)
        if whole:
            group_bytes = codec.group_size * codec.bits // 8
            with e.loop(e.number(0), e.number(whole)) as group:
                self._group(
                    e.at(codes, e.linear((group, group_bytes)), BYTE),
                    e.at(params, e.linear((group, 2 * _PARAM_BYTES)), BYTE),
                    e.at(numbers, e.linear((group, codec.group_size * self._item)), BYTE),
                    codec.group_size,
                )
        if whole * codec.group_size < self._size:
            done = whole * codec.group_size
            self._group(
                e.at(codes, done * codec.bits // 8, BYTE),
                e.at(params, whole * 2 * _PARAM_BYTES, BYTE),
                e.at(numbers, done * self._item, BYTE),
                self._size - done,
            )

    def _group(self, codes: Value, params: Value, numbers: Value, size: int) -> None:
        e = self._e
        step = e.splat(e.load_half(params))
        smallest = e.splat(e.load_half(e.at(params, _PARAM_BYTES, BYTE)))
        for segment, offset in self._vectors(size):
            place = e.at(codes, segment.byte + offset, BYTE)
            wide = e.load_codes(place, segment.shift, self._codec.bits)
            wide = e.multiply_add(wide, step, smallest)
            target = e.at(numbers, (segment.start + offset) * self._item, BYTE)
            e.store_floats(wide, target, self._dtype)

    def _vectors(self, size: int) -> Iterator[tuple[Segment, int]]:
        for segment in self._codec.segments(size):
            for offset in range(0, segment.stop - segment.start, self._e.width):
                yield segment, offset
