"""Attention of decoding rows over their KV cache, in place, on a CPU.

One query token per row: every key and value is read once, so the memory's bandwidth is the bound.
torch's kernel reads a group's keys once for each of its query heads and gets a fraction of it
(benchmarks/decode_attention.py). Here a thread takes a row, or neighbouring heads of one, and goes
through its cache block by block, a block being as many tokens as a vector has lanes: the next block
is prefetched while this one is worked on, one vector holds the scores of a block, the softmax is
the running one of Milakov and Gimelshein (arXiv 1805.02867), moved to a new maximum only when
scores outgrow the old one by 2^8, and all query heads of a group share what was read.

A score is a sum over head_dim. Where few query heads share the keys, vectors run along head_dim and
their lanes are added up at the end; where many do, the keys are transposed in registers first,
which costs the same for any number of heads.

Arithmetic is float32 whatever the dtype of the cache. Compressed caches are widened on the fly.

Shapes: R rows, L tokens of a row's region, K KV heads, G query heads to each, D head_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpipe.kernels import team
from flexpipe.kernels.emit import BYTE, F32, I64, Emitter, Value
from flexpipe.plan.codec import Codec, Segment

__all__ = ["KvRows", "attend_rows", "compile_for", "runs_here"]

_MOST_LANES = 16
_ACCUMULATORS = 16  # vectors that stay in registers
_HEADS_AT_ONCE = 8
_SLACK = 8.0  # scores may exceed the running maximum by this power of two
_NOTHING = -1e30
_CACHE_LINE = 64
_CHUNK_BYTES = 4096  # of a token's keys: two blocks of them and of values stay in the caches


@dataclass(frozen=True, slots=True)
class KvRows:
    """Which part of which rows' caches is attended, for one kernel call.

    `kv_RL2K` is the cache of R rows [R, L, 2, K, D], or compressed [R, L, 2, K, row bytes], uint8.
    Row r sees `count_R[r]` tokens from `first_R[r]` on, at least one; `order_R` is the order in
    which threads take the rows: the longest first. All three are int64 on the CPU.
    """

    first_R: Tensor
    count_R: Tensor
    order_R: Tensor


def runs_here(device: torch.device) -> bool:
    """Whether `attend_rows` serves a compute device."""
    return device.type == "cpu" and team.available()


def attend_rows(q_RND: Tensor, kv_RL2K: Tensor, rows: KvRows, codec: Codec | None) -> None:
    """Replaces each row's queries by what they attend to.

    `q_RND` may have gaps between its rows, `kv_RL2K` too; heads and tokens are packed.
    """
    num_rows, num_q, dim = q_RND.shape
    num_kv = kv_RL2K.shape[3]
    shape = _Shape(
        num_kv_heads=num_kv,
        group=num_q // num_kv,
        head_dim=dim,
        q_dtype=_name(q_RND),
        kv_dtype=None if codec else _name(kv_RL2K),
        codec=codec,
    )
    assert q_RND.stride()[1:] == (dim, 1)
    assert kv_RL2K[0].is_contiguous(), "a row's tokens must lie side by side"
    counter = torch.zeros(1, dtype=torch.int64)
    _kernel(shape).run(
        [
            q_RND.data_ptr(),
            kv_RL2K.data_ptr(),
            rows.first_R.data_ptr(),
            rows.count_R.data_ptr(),
            rows.order_R.data_ptr(),
            counter.data_ptr(),
            q_RND.stride(0) * q_RND.element_size(),
            kv_RL2K.stride(0) * kv_RL2K.element_size(),
            num_rows,
        ]
    )


def compile_for(
    *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, codec: Codec | None
) -> None:
    """Have the kernel at hand for queries and caches in `dtype`, or caches in `codec`'s form."""
    _kernel(
        _Shape(
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            head_dim=head_dim,
            q_dtype=dtype,
            kv_dtype=None if codec else dtype,
            codec=codec,
        )
    )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What a kernel is compiled for."""

    num_kv_heads: int
    group: int
    head_dim: int
    q_dtype: str
    kv_dtype: str | None  # None if compressed
    codec: Codec | None

    @property
    def item_bytes(self) -> int:
        return 1 if self.codec else {"float32": 4}.get(self.kv_dtype or "", 2)

    @property
    def q_bytes(self) -> int:
        return 4 if self.q_dtype == "float32" else 2

    @property
    def head_bytes(self) -> int:
        if self.codec:
            return self.codec.row_bytes(self.head_dim)
        return self.head_dim * self.item_bytes

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_bytes

    @property
    def heads_together(self) -> int:
        """KV heads that a thread takes of a row: neighbours, but few enough for its caches."""
        num = self.num_kv_heads
        fitting = [n for n in range(1, num + 1) if num % n == 0]
        return max((n for n in fitting if n * self.head_bytes <= _CHUNK_BYTES), default=1)

    @property
    def segments(self) -> tuple[Segment, ...]:
        if self.codec:
            return self.codec.segments(self.head_dim)
        return (Segment(start=0, stop=self.head_dim, byte=0, shift=0, group=0),)

    @property
    def lanes(self) -> int:
        """A power of two that divides all segments."""
        edges = [edge for segment in self.segments for edge in (segment.start, segment.stop)]
        return math.gcd(_MOST_LANES, *edges)


@functools.cache
def _kernel(shape: _Shape) -> team.Kernel:
    return team.Kernel("attend", _Attend(shape).text())


class _Attend:
    """The loops of one kernel; methods are its parts, from the outside in."""

    def __init__(self, shape: _Shape) -> None:
        self._shape = shape
        self._e = e = Emitter("attend", shape.lanes)
        self._chunk = shape.heads_together
        heads, dim = self._chunk * shape.group, shape.head_dim
        self._num_heads = heads
        self._queries = e.room(F32, heads * dim)
        self._sums = e.room(F32, heads * dim)
        self._largest = e.room(F32, heads)
        self._weight = e.room(e.vector, heads)  # of the softmax, lane by lane
        self._scores = e.room(e.vector, shape.group)
        self._offsets = e.room(I64, e.width)

    def text(self) -> str:
        e, shape = self._e, self._shape
        q, kv, first, count, order, counter, q_stride, kv_stride, num_rows = e.fields(9)
        chunks = e.number(shape.num_kv_heads // self._chunk)
        with e.shared_items(e.pointer(counter), e.builder.mul(num_rows, chunks)) as item:
            row = e.load(e.at(e.pointer(order), e.builder.udiv(item, chunks), I64), I64)
            head = e.linear((e.builder.urem(item, chunks), self._chunk))
            start = e.load(e.at(e.pointer(first), row, I64), I64)
            num_tokens = e.load(e.at(e.pointer(count), row, I64), I64)
            query = e.at(e.pointer(q), e.builder.mul(row, q_stride), BYTE)
            group_bytes = shape.group * shape.head_dim * shape.q_bytes
            query = e.at(query, e.linear((head, group_bytes)), BYTE)
            cache = e.at(e.pointer(kv), e.builder.mul(row, kv_stride), BYTE)
            past = e.linear((start, shape.token_bytes), (head, shape.head_bytes))
            cache = e.at(cache, past, BYTE)
            self._prefetch_first(cache, e.smaller(num_tokens, e.number(e.width)))
            self._begin(query)
            with e.loop(e.number(0), num_tokens, e.width) as token:
                block = e.at(cache, e.linear((token, shape.token_bytes)), BYTE)
                left = e.builder.sub(num_tokens, token)
                # behind the last block nothing is asked for but what the caches hold
                is_last = e.builder.icmp_signed("<=", left, e.number(e.width))
                ahead = e.number(e.width * shape.token_bytes)
                self._ahead = e.builder.select(is_last, e.number(0), ahead)
                self._block(block, e.smaller(left, e.number(e.width)))
            self._finish(query)
        return e.text()

    def _begin(self, query: Value) -> None:
        """Scaled queries in float32; nothing attended yet. Scores are powers of two."""
        e, size = self._e, self._num_heads * self._shape.head_dim
        scale = e.constant(math.log2(math.e) / math.sqrt(self._shape.head_dim))
        with e.loop(e.number(0), e.number(size), e.width) as index:
            place = e.at(query, e.linear((index, self._shape.q_bytes)), BYTE)
            wide = e.load_floats(place, self._shape.q_dtype)
            e.store(e.builder.fmul(wide, scale), e.at(self._queries, index, F32))
            e.store(e.constant(0.0), e.at(self._sums, index, F32))
        with e.loop(e.number(0), e.number(self._num_heads)) as head:
            e.store(F32(_NOTHING), e.at(self._largest, head, F32))
            e.store(e.constant(0.0), e.at(self._weight, head, e.vector))

    def _finish(self, query: Value) -> None:
        e, dim = self._e, self._shape.head_dim
        with e.loop(e.number(0), e.number(self._num_heads)) as head:
            weight = e.total(e.load(e.at(self._weight, head, e.vector), e.vector))
            inverse = e.splat(e.builder.fdiv(F32(1.0), weight))
            with e.loop(e.number(0), e.number(dim), e.width) as index:
                place = e.linear((head, dim), (index, 1))
                mean = e.builder.fmul(e.load(e.at(self._sums, place, F32), e.vector), inverse)
                target = e.at(query, e.linear((place, self._shape.q_bytes)), BYTE)
                e.store_floats(mean, target, self._shape.q_dtype)

    def _block(self, block: Value, num_tokens: Value) -> None:
        """`width` tokens of all heads, or the `num_tokens` that are left."""
        e, shape = self._e, self._shape
        last = e.builder.sub(num_tokens, e.number(1))
        for lane in range(e.width):  # lanes without a token read the last one again
            token = e.smaller(e.number(lane), last)
            e.store(e.linear((token, shape.token_bytes)), e.at(self._offsets, lane, I64))
        with e.loop(e.number(0), e.number(self._chunk)) as head:
            keys = e.at(block, e.linear((head, shape.head_bytes)), BYTE)
            values = e.at(keys, shape.num_kv_heads * shape.head_bytes, BYTE)
            for heads in self._heads_at_once():
                score = self._score_across if self._is_across(heads) else self._score_transposed
                scores = score(keys, block, head, heads)
                visible = e.builder.icmp_signed("<", e.lanes(), e.splat(num_tokens))
                for query, found in scores.items():
                    found = e.builder.select(visible, found, e.constant(_NOTHING))
                    self._weigh(head, query, found)
                self._add_values(values, block, head, heads, num_tokens)

    def _heads_at_once(self) -> Iterator[range]:
        group = self._shape.group
        for first in range(0, group, _HEADS_AT_ONCE):
            yield range(first, min(first + _HEADS_AT_ONCE, group))

    def _is_across(self, heads: range) -> bool:
        """Whether sums of lanes cost less than transposing the keys, which heads would share."""
        width = self._e.width
        return len(heads) <= width and len(heads) * width <= self._shape.head_dim

    def _score_across(
        self, keys: Value, block: Value, head: Value, heads: range
    ) -> dict[int, Value]:
        """Scores of a block for some query heads, one lane per token: lanes are summed up."""
        width = self._e.width
        together = 1 << ((width // len(heads)).bit_length() - 1)  # tokens
        found = [
            self._products(keys, block, head, heads, range(first, first + together))
            for first in range(0, width, together)
        ]
        return {
            query: self._e.joined(found, place * together, together)
            for place, query in enumerate(heads)
        }

    def _products(
        self, keys: Value, block: Value, head: Value, heads: range, lanes: range
    ) -> Value:
        """Scores of some tokens: those of the first query head, those of the next, and so on."""
        e, dim = self._e, self._shape.head_dim
        num_steps = e.width // len(lanes) * (dim // e.width)
        sums = {(query, lane): e.room(e.vector) for query in heads for lane in lanes}
        for room in sums.values():
            e.store(e.constant(0.0), room)
        tokens = {lane: self._token(keys, lane) for lane in lanes}
        for segment in self._shape.segments:
            params = {lane: self._params(tokens[lane], segment) for lane in lanes}
            with e.loop(e.number(0), e.number(segment.stop - segment.start), e.width) as index:
                if heads.start == 0:
                    done = lanes.start // len(lanes) * dim + segment.start
                    self._prefetch(block, 0, head, self._step(done, index), num_steps)
                rows = {
                    lane: self._numbers(tokens[lane], segment, index, params[lane])
                    for lane in lanes
                }
                for query in heads:
                    factor = e.load(self._query(head, query, segment.start, index), e.vector)
                    for lane, row in rows.items():
                        room = sums[query, lane]
                        e.store(e.multiply_add(row, factor, e.load(room, e.vector)), room)
        vectors = [e.load(room, e.vector) for room in sums.values()]
        return e.totals([*vectors, *vectors[:1] * (e.width - len(vectors))])

    def _score_transposed(
        self, keys: Value, block: Value, head: Value, heads: range
    ) -> dict[int, Value]:
        """The same for many query heads, from keys whose lanes are tokens."""
        e, dim = self._e, self._shape.head_dim
        sums = {query: e.room(e.vector) for query in heads}
        for room in sums.values():
            e.store(e.constant(0.0), room)
        for segment in self._shape.segments:
            params = [self._params(self._token(keys, lane), segment) for lane in range(e.width)]
            with e.loop(e.number(0), e.number(segment.stop - segment.start), e.width) as index:
                rows = [
                    self._numbers(self._token(keys, lane), segment, index, params[lane])
                    for lane in range(e.width)
                ]
                columns = e.transposed(rows)
                if heads.start == 0:
                    step = self._step(segment.start, index)
                    self._prefetch(block, 0, head, step, dim // e.width)
                added = {query: e.load(room, e.vector) for query, room in sums.items()}
                for place, column in enumerate(columns):
                    for query in heads:
                        at = self._query(head, query, segment.start + place, index)
                        factor = e.splat(e.load(at, F32))
                        added[query] = e.multiply_add(column, factor, added[query])
                for query, room in sums.items():
                    e.store(added[query], room)
        return {query: e.load(room, e.vector) for query, room in sums.items()}

    def _step(self, done: int, index: Value, at_once: int = 1) -> Value:
        """How many times `at_once` vectors are done, after so many numbers."""
        e = self._e
        return e.builder.udiv(e.builder.add(index, e.number(done)), e.number(at_once * e.width))

    def _query(self, head: Value, query: int, fixed: int, index: Value) -> Value:
        """Where a query head's number `fixed` + `index` lies."""
        e, dim = self._e, self._shape.head_dim
        at = e.linear((head, self._shape.group * dim), (index, 1))
        return e.at(self._queries, e.builder.add(at, e.number(query * dim + fixed)), F32)

    def _prefetch(self, block: Value, part: int, head: Value, step: Value, num_steps: int) -> None:
        """A step's share of the next block's keys (part 0) or values, as neighbours in memory.

        Each of the heads goes through `num_steps`: requests come evenly, and none is waited for.
        """
        e, shape = self._e, self._shape
        fixed = e.number(part * shape.num_kv_heads * shape.head_bytes)
        ahead = e.at(block, e.builder.add(self._ahead, fixed), BYTE)
        lines = -(-self._chunk * shape.head_bytes // _CACHE_LINE)  # of a token
        share = -(-e.width * lines // (self._chunk * num_steps))
        first = e.linear((head, num_steps * share), (step, share))
        for line in range(share):
            index = e.builder.add(first, e.number(line))
            token = e.builder.udiv(index, e.number(lines))
            place = e.builder.urem(index, e.number(lines))
            offset = e.linear((token, shape.token_bytes), (place, _CACHE_LINE))
            e.prefetch(e.at(ahead, offset, BYTE))

    def _prefetch_first(self, block: Value, num_tokens: Value) -> None:
        """The first block, in one go, while the queries are made ready."""
        e, shape = self._e, self._shape
        lines = -(-self._chunk * shape.head_bytes // _CACHE_LINE)
        for part in range(2):
            start = e.at(block, part * shape.num_kv_heads * shape.head_bytes, BYTE)
            with e.loop(e.number(0), num_tokens) as token:
                row = e.at(start, e.linear((token, shape.token_bytes)), BYTE)
                with e.loop(e.number(0), e.number(lines)) as line:
                    e.prefetch(e.at(row, e.linear((line, _CACHE_LINE)), BYTE))

    def _weigh(self, head: Value, query: int, score: Value) -> None:
        """Scores become softmax weights, not yet divided by their sum."""
        e = self._e
        index = e.linear((head, self._shape.group), (e.number(query), 1))
        largest = e.at(self._largest, index, F32)
        limit = e.builder.fadd(e.load(largest, F32), F32(_SLACK))
        outgrown = e.any_lane(e.builder.fcmp_ordered(">", score, e.splat(limit)))
        with e.builder.if_then(outgrown, likely=False):
            self._move_largest(index, largest, e.largest(score))
        weight = e.exp2(e.builder.fsub(score, e.splat(e.load(largest, F32))))
        e.store(weight, e.at(self._scores, query, e.vector))
        total = e.at(self._weight, index, e.vector)
        e.store(e.builder.fadd(e.load(total, e.vector), weight), total)

    def _move_largest(self, index: Value, largest: Value, value: Value) -> None:
        """What was summed up under the old maximum is brought under the new one."""
        e, dim = self._e, self._shape.head_dim
        factor = e.exp2(e.splat(e.builder.fsub(e.load(largest, F32), value)))
        e.store(value, largest)
        total = e.at(self._weight, index, e.vector)
        e.store(e.builder.fmul(e.load(total, e.vector), factor), total)
        with e.loop(e.number(0), e.number(dim), e.width) as place:
            at = e.at(self._sums, e.linear((index, dim), (place, 1)), F32)
            e.store(e.builder.fmul(e.load(at, e.vector), factor), at)

    def _add_values(
        self, values: Value, block: Value, head: Value, heads: range, num_tokens: Value
    ) -> None:
        e, shape = self._e, self._shape
        for segment in shape.segments:
            vectors = (segment.stop - segment.start) // e.width
            at_once = max(1, min(vectors, _ACCUMULATORS // len(heads)))
            at_once = max(n for n in range(1, at_once + 1) if vectors % n == 0)
            with e.loop(e.number(0), e.number(vectors * e.width), at_once * e.width) as index:
                step = self._step(segment.start, index, at_once)
                num_steps = shape.head_dim // e.width // at_once
                if heads.start == 0 and shape.codec:  # too few lines for each token to take one
                    self._prefetch(block, 1, head, step, num_steps)
                sums = {}
                for query in heads:
                    for part in range(at_once):
                        at = e.linear((head, shape.group * shape.head_dim), (index, 1))
                        fixed = query * shape.head_dim + segment.start + part * e.width
                        at = e.at(self._sums, e.builder.add(at, e.number(fixed)), F32)
                        sums[query, part] = at, e.room(e.vector)
                for at, room in sums.values():
                    e.store(e.load(at, e.vector), room)
                with e.loop(e.number(0), num_tokens) as token:
                    row = e.at(values, e.linear((token, shape.token_bytes)), BYTE)
                    if heads.start == 0 and not shape.codec:
                        at_token = e.builder.add(e.linear((step, e.width)), token)
                        self._prefetch(block, 1, head, at_token, num_steps * e.width)
                    params = self._params(row, segment)
                    numbers = []
                    for part in range(at_once):
                        place = e.builder.add(index, e.number(part * e.width))
                        numbers.append(self._numbers(row, segment, place, params))
                    for query in heads:
                        weights = e.at(self._scores, query, e.vector)
                        weight = e.splat(e.load(e.at(weights, token, F32), F32))
                        for part in range(at_once):
                            room = sums[query, part][1]
                            added = e.multiply_add(weight, numbers[part], e.load(room, e.vector))
                            e.store(added, room)
                for at, room in sums.values():
                    e.store(e.load(room, e.vector), at)

    def _token(self, keys: Value, lane: int) -> Value:
        return self._e.at(keys, self._e.load(self._e.at(self._offsets, lane, I64), I64), BYTE)

    def _params(self, row: Value, segment: Segment) -> tuple[Value, Value] | None:
        """Step and smallest number of a compressed group."""
        codec = self._shape.codec
        if codec is None:
            return None
        e, at = self._e, codec.code_bytes(self._shape.head_dim) + 4 * segment.group
        return e.load_half(e.at(row, at, BYTE)), e.load_half(e.at(row, at + 2, BYTE))

    def _numbers(
        self, row: Value, segment: Segment, index: Value, params: tuple[Value, Value] | None
    ) -> Value:
        """A vector of a head's numbers, from `index` of a segment on."""
        e, shape = self._e, self._shape
        offset = e.builder.add(e.linear((index, shape.item_bytes)), e.number(segment.byte))
        place = e.at(row, offset, BYTE)
        if params is None:
            assert shape.kv_dtype is not None
            return e.load_floats(place, shape.kv_dtype)
        assert shape.codec is not None
        codes = e.load_codes(place, segment.shift, shape.codec.bits)
        return e.multiply_add(codes, e.splat(params[0]), e.splat(params[1]))
