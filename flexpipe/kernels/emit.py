"""Words for writing a loop over vectors as LLVM IR.

A kernel is one function `void f(int64 *fields)`: addresses, strides and counts. This module knows
vectors, loops and arithmetic on them; what a kernel computes is its own module's business. Offsets
count elements of the type they are given with.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

try:
    from llvmlite import ir
except ImportError:  # `flexpipe.kernels.team` says so, and nobody builds a kernel
    ir = None
if TYPE_CHECKING:
    from llvmlite.ir import Value
else:
    Value = getattr(ir, "Value", None)

__all__ = ["BYTE", "F32", "I32", "I64", "Emitter", "Value"]


def _types() -> tuple[Any, ...]:
    if ir is None:
        return (None,) * 6
    integers = (ir.IntType(8), ir.IntType(32), ir.IntType(64))
    return (*integers, ir.FloatType(), ir.PointerType(), ir.VoidType())


BYTE, I32, I64, F32, _PTR, _VOID = _types()
# 2^x on [-1/2, 1/2], the Taylor series: its error is below that of rounding to float32
_EXP2 = [
    1.0,
    0.6931471805599453,
    0.2402265069591007,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.00015403530393381608,
]
_IN_CACHE = 2  # prefetch into the second level: the first is too small to wait in


class Emitter:
    """Builds one kernel. `width` lanes of float32 to a vector."""

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self.width = width
        self.module = ir.Module(name)
        function = ir.Function(self.module, ir.FunctionType(_VOID, [_PTR]), name)
        self.vector = ir.VectorType(F32, width)
        entry = function.append_basic_block()
        self.builder = ir.IRBuilder(entry)
        body = function.append_basic_block()
        self.builder.branch(body)
        self.builder.position_at_end(body)
        self._function = function

    # whole kernel

    def fields(self, count: int) -> list[Value]:
        """The first `count` integers of the argument."""
        argument = self._function.args[0]
        return [self.load(self.at(argument, index, I64), I64) for index in range(count)]

    def text(self) -> str:
        """The finished kernel's IR."""
        self.builder.ret_void()
        return str(self.module)

    @contextmanager
    def shared_items(self, counter: Value, count: Value) -> Iterator[Value]:
        """The numbers below `count` that this thread draws from the team's `counter`."""
        draw, work, done = (self._function.append_basic_block() for _ in range(3))
        self.builder.branch(draw)
        self.builder.position_at_end(draw)
        item = self.builder.atomic_rmw("add", counter, self.number(1), "monotonic")
        self.builder.cbranch(self.builder.icmp_signed("<", item, count), work, done)
        self.builder.position_at_end(work)
        yield item
        self.builder.branch(draw)
        self.builder.position_at_end(done)

    @contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        before = self.builder.block
        head, body, after = (self._function.append_basic_block() for _ in range(3))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        index.add_incoming(start, before)
        self.builder.cbranch(self.builder.icmp_signed("<", index, stop), body, after)
        self.builder.position_at_end(body)
        yield index
        following = self.builder.add(index, self.number(step))
        index.add_incoming(following, self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    # integers and addresses

    def number(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def linear(self, *terms: tuple[Value, int]) -> Value:
        """The sum of values, each times a constant."""
        total = self.number(0)
        for value, factor in terms:
            total = self.builder.add(total, self.builder.mul(value, self.number(factor)))
        return total

    def smaller(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def pointer(self, address: Value) -> Value:
        return self.builder.inttoptr(address, _PTR)

    def at(self, pointer: Value, offset: Value | int, item: ir.Type) -> Value:
        index = self.number(offset) if isinstance(offset, int) else offset
        place = self.builder.gep(pointer, [index], source_etype=item)
        place.type = _PTR  # llvmlite still names the item here, which its stores then insist on
        return place

    def load(self, pointer: Value, item: ir.Type) -> Value:
        """No alignment is promised beyond that of one byte; hardware does not mind."""
        return self.builder.load(pointer, align=1, typ=item)

    def store(self, value: Value, pointer: Value) -> None:
        self.builder.store(value, pointer, align=1)

    def room(self, item: ir.Type, count: int = 1) -> Value:
        """Scratch of this thread, on its stack."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(item, ir.Constant(I64, count))
            place.align = 64
            return self.builder.bitcast(place, _PTR)

    def prefetch(self, pointer: Value) -> None:
        function = self._declared("llvm.prefetch.p0", _VOID, [_PTR, I32, I32, I32])
        self.builder.call(function, [pointer, *(ir.Constant(I32, v) for v in (0, _IN_CACHE, 1))])

    # vectors

    def constant(self, value: float) -> Value:
        return ir.Constant(self.vector, [_rounded(value)] * self.width)

    def lanes(self) -> Value:
        """0, 1, 2, …"""
        return ir.Constant(ir.VectorType(I64, self.width), list(range(self.width)))

    def splat(self, value: Value) -> Value:
        undefined = ir.Constant(ir.VectorType(value.type, self.width), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.shuffle(first, undefined, [0] * self.width)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, b, mask)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        return self._elementwise("llvm.fma", a, b, c)

    def larger(self, a: Value, b: Value) -> Value:
        return self._elementwise("llvm.maxnum", a, b)

    def largest(self, x: Value) -> Value:
        """Of the lanes; a scalar."""
        return self._across("llvm.vector.reduce.fmax", x)

    def total(self, x: Value) -> Value:
        """Of the lanes; a scalar."""
        return self._across("llvm.vector.reduce.fadd", ir.Constant(F32, 0.0), x)

    def any_lane(self, lanes: Value) -> Value:
        """Of a vector of booleans; a boolean."""
        name = f"llvm.vector.reduce.or.v{self.width}i1"
        return self.builder.call(self._declared(name, ir.IntType(1), [lanes.type]), [lanes])

    def exp2(self, x: Value) -> Value:
        """2^x, 0 to within 2^-126 below, NaN of what is not finite; x must not exceed 127."""
        nothing = self.builder.fsub(x, x)
        x = self.larger(x, self.constant(-126.0))
        whole = self._elementwise("llvm.rint", x)
        part = self.builder.fsub(x, whole)
        power = self.constant(_EXP2[-1])
        for factor in reversed(_EXP2[:-1]):
            power = self.multiply_add(power, part, self.constant(factor))
        integers = ir.VectorType(I32, self.width)
        exponent = self.builder.shl(self.builder.fptosi(whole, integers), self._bits(23))
        bits = self.builder.add(self.builder.bitcast(power, integers), exponent)
        return self.builder.fadd(self.builder.bitcast(bits, self.vector), nothing)

    def transposed(self, rows: Sequence[Value]) -> list[Value]:
        """The columns of `width` rows: log2(width) perfect shuffles."""
        half = self.width // 2
        low = list(itertools.chain(*zip(range(half), range(self.width, self.width + half))))  # noqa: B905
        high = [lane + half for lane in low]
        for _ in range(self.width.bit_length() - 1):
            pairs = list(zip(rows[:half], rows[half:], strict=True))
            rows = [self.shuffle(a, b, lanes) for a, b in pairs for lanes in (low, high)]
        return list(rows)

    def totals(self, vectors: Sequence[Value]) -> Value:
        """The sums of the lanes of `width` vectors, as the lanes of one."""
        unit = min(4, self.width)  # shuffles within so many lanes are the cheap ones
        for _ in range(unit.bit_length() - 1):
            firsts = range(0, self.width, unit)
            picks = [
                [side * self.width + first + lane for first in firsts for side in (0, 1)
                 for lane in range(odd, unit, 2)]
                for odd in (0, 1)
            ]  # fmt: skip
            vectors = self._added(vectors, picks)
        while len(vectors) > 1:
            chunks = range(0, 2 * self.width, 2 * unit)
            picks = [
                [first + odd * unit + lane for first in chunks for lane in range(unit)]
                for odd in (0, 1)
            ]
            vectors = self._added(vectors, picks)
        return vectors[0]

    def _added(self, vectors: Sequence[Value], picks: Sequence[Sequence[int]]) -> list[Value]:
        """Of each two neighbours, the sum of two picks of their lanes."""
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        return [self.builder.fadd(*(self.shuffle(a, b, pick) for pick in picks)) for a, b in pairs]

    def joined(self, vectors: Sequence[Value], first: int, count: int) -> Value:
        """The `count` lanes from `first` on of each of some vectors, side by side."""
        parts = [self.shuffle(x, x, range(first, first + count)) for x in vectors]
        while len(parts) > 1:
            width = parts[0].type.count
            parts = [
                self.shuffle(a, b, range(2 * width))
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    # number formats in memory

    def load_floats(self, pointer: Value, dtype: str) -> Value:
        """A vector of float32, bfloat16 or float16 numbers, widened."""
        if dtype == "float32":
            return self.load(pointer, self.vector)
        bits = self.load(pointer, ir.VectorType(ir.IntType(16), self.width))
        if dtype == "float16":
            halves = self.builder.bitcast(bits, ir.VectorType(ir.HalfType(), self.width))
            return self.builder.fpext(halves, self.vector)
        assert dtype == "bfloat16"
        wide = self.builder.zext(bits, ir.VectorType(I32, self.width))
        return self.builder.bitcast(self.builder.shl(wide, self._bits(16)), self.vector)

    def load_half(self, pointer: Value) -> Value:
        """One float16 number, widened."""
        return self.builder.fpext(self.load(pointer, ir.HalfType()), F32)

    def store_floats(self, x: Value, pointer: Value, dtype: str) -> None:
        """A vector as float32, bfloat16 or float16, rounded to the nearest even."""
        if dtype == "float16":
            x = self.builder.fptrunc(x, ir.VectorType(ir.HalfType(), self.width))
        elif dtype == "bfloat16":
            bits = self.builder.bitcast(x, ir.VectorType(I32, self.width))
            odd = self.builder.and_(self.builder.lshr(bits, self._bits(16)), self._bits(1))
            bits = self.builder.add(bits, self.builder.add(odd, self._bits(0x7FFF)))
            short = ir.VectorType(ir.IntType(16), self.width)
            x = self.builder.trunc(self.builder.lshr(bits, self._bits(16)), short)
        else:
            assert dtype == "float32"
        self.store(x, pointer)

    def load_codes(self, pointer: Value, shift: int, bits: int) -> Value:
        """A vector of unsigned numbers of `bits` bits, one in each byte from bit `shift` on."""
        wide = self.builder.zext(
            self.load(pointer, ir.VectorType(BYTE, self.width)), ir.VectorType(I32, self.width)
        )
        if shift:
            wide = self.builder.lshr(wide, self._bits(shift))
        if shift + bits < 8:
            wide = self.builder.and_(wide, self._bits((1 << bits) - 1))
        return self.builder.sitofp(wide, self.vector)

    def _bits(self, value: int) -> Value:
        return ir.Constant(ir.VectorType(I32, self.width), [value] * self.width)

    def _elementwise(self, name: str, *values: Value) -> Value:
        types = [value.type for value in values]
        return self.builder.call(
            self._declared(f"{name}.v{self.width}f32", self.vector, types), values
        )

    def _across(self, name: str, *values: Value) -> Value:
        types = [value.type for value in values]
        function = self._declared(f"{name}.v{self.width}f32", F32, types)
        return self.builder.call(function, values, fastmath=("reassoc",))

    def _declared(self, name: str, result: ir.Type, types: Sequence[ir.Type]) -> Value:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, types), name)


def _rounded(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
