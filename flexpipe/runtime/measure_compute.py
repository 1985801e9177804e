"""What a device computes, as tasks for the stopwatch: the engine's own calls at some sizes.

Weights and caches are taken as a run takes them and rotated over, so that they come from memory as
they do in a run; only the smallest weight stays in the caches. Numbers are drawn, for accelerators
are faster on zeros.

Shapes as in `flexpipe.model.segments`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from flexpipe.kernels.codec import compress
from flexpipe.memory.tier import TierMemory, torch_dtype, typed
from flexpipe.model import segments
from flexpipe.model.batch import Batch, RowSpan
from flexpipe.model.config import DTYPE_BYTES, ModelConfig
from flexpipe.model.cost import CONVERT_ELEMENTS, attend_flops, num_attended
from flexpipe.model.matmul import (
    PACK_BYTES,
    CompressedWeight,
    PackedWeight,
    Weight,
    convert,
    multiply,
    packs,
)
from flexpipe.model.sampling import choose
from flexpipe.model.workspace import Workspace
from flexpipe.plan.codec import Codec
from flexpipe.runtime.effort import Effort
from flexpipe.runtime.stopwatch import Task, TaskSource
from flexpipe.units import MIB

ROTATED_BYTES = 96 * MIB  # of weights: three times what processors cache
WIDTH = 2048  # of hidden states under a norm, and numbers of a token's keys
HEADS, HEAD_DIM = 16, 128  # attention differs little at 64: the same bytes in twice the heads
GROUP = 8  # query heads that share a head of the cache where arithmetic is to be the bound
GROUPED_BYTES = 16 * MIB
CODECS = {str(bits): Codec(bits=bits) for bits in (4, 8)}
SAMPLED, VOCABULARY = 32, 32000
COMPRESSED_TOKENS = 256
PAIR_ROWS = 64  # of the product whose pace beside others is measured
PAIR_BYTES = 16 * MIB  # of KV cache likewise
_SLICE = (CONVERT_ELEMENTS // 4096, 4096)  # of a weight, as `multiply` converts it
_DRAWN = 1 << 16
_ROOM_BYTES = 64 * MIB


class ComputeTasks:
    """The tasks of one device; what a source holds, it takes when it starts."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self._device = device
        self._effort = effort
        self._memory = TierMemory(device, pin=False)

    def sources(self, dtype: str) -> list[TaskSource]:
        """All there is to know of a compute dtype."""
        large = self._effort.weights[1:]
        return [
            partial(self._products, dtype, self._effort.weights[0], rotated=False),
            *(partial(self._products, dtype, shape) for shape in large),
            partial(self._conversions, dtype),
            partial(self._converted_products, dtype),
            partial(self._prefill_attention, dtype),
            partial(self._decode_attention, dtype),
            partial(self._compressed_attention, dtype),
            partial(self._grouped_attention, dtype),
            partial(self._elementwise, dtype),
            partial(self._samples, dtype),
            partial(self._loads, dtype),
        ]

    def attention(self, dtype: str) -> list[TaskSource]:
        """What a CPU beside an accelerator may be asked to do, and the least of products."""
        return [
            partial(self._products, dtype, self._effort.weights[0], rotated=False),
            partial(self._decode_attention, dtype),
            partial(self._compressed_attention, dtype),
            partial(self._grouped_attention, dtype),
        ]

    def common(self) -> list[TaskSource]:
        """What does not depend on the compute dtype."""
        return [self._compression]

    def one_product(self, dtype: str) -> Task:
        """A product of a millisecond."""
        shape = self._effort.weights[1]
        *_, task = (task for task in self._products(dtype, shape) if task.key[-1] == PAIR_ROWS)
        return task

    def one_attention(self, dtype: str) -> Task:
        """Attention to so much KV cache as takes a millisecond or less."""
        return next(task for task in self._decode_attention(dtype) if task.amount >= PAIR_BYTES)

    def _products(
        self, dtype: str, shape: tuple[int, int], *, rotated: bool = True
    ) -> Iterator[Task]:
        elements = math.prod(shape)
        count = -(-ROTATED_BYTES // (elements * DTYPE_BYTES[dtype])) if rotated else 1
        plain = [self._drawn(shape, dtype) for _ in range(count)]
        yield from self._multiplied("matmul", dtype, plain)
        if packs(shape, torch_dtype(dtype), self._device):
            buffer = torch.empty(PACK_BYTES, dtype=torch.uint8)
            packed = [_packed(weight, buffer) for weight in plain]
            del plain
            yield from self._multiplied("packed", dtype, packed)

    def _multiplied(
        self, field: str, dtype: str, weights: Sequence[Tensor] | Sequence[PackedWeight]
    ) -> Iterator[Task]:
        num_out, num_in = weights[0].shape
        elements, room = num_out * num_in, self._workspace(0)
        for rows in self._effort.rows:
            if 2 * rows * elements > self._effort.most_flops:
                return
            x_TI, out_TO = self._drawn((rows, num_in), dtype), self._drawn((rows, num_out), dtype)
            yield Task(
                key=(field, dtype, elements, rows),
                amount=2 * rows * elements,
                work=partial(_multiply_by, weights, x_TI, out_TO, room),
            )

    def _conversions(self, dtype: str) -> Iterator[Task]:
        """A slice at a time into the scratch that the product reads, from a weight in memory."""
        scratch = self._drawn(_SLICE, dtype)
        for source in sorted(DTYPE_BYTES.keys() - {dtype}):
            slices = [self._drawn(_SLICE, source) for _ in range(_num_slices(source))]
            yield _conversion("convert", f"{source}>{dtype}", slices, scratch)
        for bits, codec in CODECS.items():
            num_out, num_in = _SLICE
            count = -(-ROTATED_BYTES // (num_out * codec.row_bytes(num_in)))
            rows = self._compressed_rows(count * num_out, num_in, codec)
            weights = [CompressedWeight(some, codec, num_in) for some in rows.chunk(count)]
            yield _conversion("widen", f"{bits}>{dtype}", weights, scratch)

    def _converted_products(self, dtype: str) -> Iterator[Task]:
        """With a slice that was converted a moment ago, so that the caches hold it."""
        num_out, num_in = _SLICE
        weight, room = self._drawn(_SLICE, dtype), self._workspace(0)
        for rows in self._effort.rows:
            x_TI, out_TO = self._drawn((rows, num_in), dtype), self._drawn((rows, num_out), dtype)
            yield Task(
                key=("converted", dtype, rows),
                amount=2 * rows * weight.numel(),
                work=partial(_multiply_by, [weight], x_TI, out_TO, room),
            )

    def _prefill_attention(self, dtype: str) -> Iterator[Task]:
        """Some 1024 tokens a call, as many rows as that makes."""
        config = _config(HEADS, dtype)
        for num_new in self._effort.prefill:
            rows = max(1, self._effort.prefill[-1] // 2 // num_new)
            batch = self._batch(config, [RowSpan(0, num_new)] * rows, dtype)
            shape = (rows, num_new, 2, HEADS, HEAD_DIM)
            flops = attend_flops(config, rows * num_attended(0, num_new))
            yield Task(
                key=("prefill_attention", dtype, num_new),
                amount=flops,
                work=self._attending(config, batch, [self._drawn(shape, dtype)], dtype),
            )

    def _decode_attention(self, dtype: str) -> Iterator[Task]:
        """One head of cache per query head, so that bytes are the bound."""
        config = _config(HEADS, dtype)
        token_bytes = 2 * HEADS * HEAD_DIM * DTYPE_BYTES[dtype]
        held = self._drawn_bytes(max(self._effort.held_bytes, self._effort.decode[-1]), dtype)
        for num_bytes in self._effort.decode:
            rows, length = _decoding(num_bytes // token_bytes)
            batch = self._batch(config, [RowSpan(length - 1, 1)] * rows, dtype)
            caches = held.view(-1, rows, length, 2, HEADS, HEAD_DIM)
            yield Task(
                key=("decode_attention", dtype, num_bytes),
                amount=num_bytes,
                work=self._attending(config, batch, caches, dtype),
            )

    def _compressed_attention(self, dtype: str) -> Iterator[Task]:
        """The same over compressed caches, whose bytes are the fewer."""
        config = _config(HEADS, dtype)
        for bits, codec in CODECS.items():
            vector_bytes = codec.row_bytes(HEAD_DIM)
            token_bytes = 2 * HEADS * vector_bytes
            for num_tokens in self._effort.compressed_tokens:
                rows, length = _decoding(num_tokens)
                spans = [RowSpan(length - 1, 1)] * rows
                batch = self._batch(config, spans, dtype, codec)
                count = -(-ROTATED_BYTES // (num_tokens * token_bytes))
                caches = self._compressed_rows(count * num_tokens * 2 * HEADS, HEAD_DIM, codec)
                yield Task(
                    key=("decode_attention", f"{bits}>{dtype}", num_tokens * token_bytes),
                    amount=num_tokens * token_bytes,
                    work=self._attending(
                        config,
                        batch,
                        caches.view(count, rows, length, 2, HEADS, vector_bytes),
                        dtype,
                    ),
                )

    def _grouped_attention(self, dtype: str) -> Iterator[Task]:
        """Many query heads per head of the cache, so that arithmetic is."""
        num_kv = HEADS // GROUP
        config = _config(num_kv, dtype)
        token_bytes = 2 * num_kv * HEAD_DIM * DTYPE_BYTES[dtype]
        rows, length = _decoding(GROUPED_BYTES // token_bytes)
        batch = self._batch(config, [RowSpan(length - 1, 1)] * rows, dtype)
        shape = (rows, length, 2, num_kv, HEAD_DIM)
        caches = [self._drawn(shape, dtype) for _ in range(ROTATED_BYTES // GROUPED_BYTES)]
        yield Task(
            key=("decode_attention_flops", dtype),
            amount=attend_flops(config, rows * length),
            work=self._attending(config, batch, caches, dtype),
        )

    def _elementwise(self, dtype: str) -> Iterator[Task]:
        """An RMS norm."""
        config, room = _config(HEADS, dtype), self._workspace(_ROOM_BYTES)
        weight_H = self._drawn((WIDTH,), dtype)
        for tokens in self._effort.norm:
            x_TH, out_TH = (self._drawn((tokens, WIDTH), dtype) for _ in range(2))
            yield Task(
                key=("elementwise", dtype, tokens * WIDTH),
                amount=tokens * WIDTH,
                work=partial(_normalize, x_TH, weight_H, out_TH, config, room),
            )

    def _samples(self, dtype: str) -> Iterator[Task]:
        logits_RV = self._drawn((SAMPLED, VOCABULARY), dtype)
        yield Task(
            key=("sample", dtype),
            amount=logits_RV.numel(),
            work=lambda turn: choose(logits_RV, [None] * SAMPLED),
        )

    def _loads(self, dtype: str) -> Iterator[Task]:
        """From a checkpoint's 16 bits, that are in memory already, to a weight at home."""
        stored = dtype if DTYPE_BYTES[dtype] == 2 else "bfloat16"
        shape = (4096, 4096)
        chunks = [torch.empty(shape, dtype=torch_dtype(stored)).fill_(0.01) for _ in range(3)]
        home = self._taken(shape, dtype)
        buffer = torch.empty(PACK_BYTES, dtype=torch.uint8)
        packed = packs(shape, torch_dtype(dtype), self._device)

        def load(turn: int) -> None:
            chunk = chunks[turn % len(chunks)]
            if packed:
                _packed(chunk, buffer, torch_dtype(dtype))
            else:
                home.copy_(chunk)

        yield Task(key=("load", dtype), amount=math.prod(shape), work=load)

    def _compression(self) -> Iterator[Task]:
        """Of new keys and values, into the cache."""
        config = _config(HEADS, "float32")
        kv_T2KD = self._drawn((COMPRESSED_TOKENS, 2, HEADS, HEAD_DIM), "float32")
        room = self._workspace(_ROOM_BYTES)
        for bits, codec in CODECS.items():
            spans = [RowSpan(0, COMPRESSED_TOKENS)]
            batch = self._batch(config, spans, "float32", codec)
            shape = (1, COMPRESSED_TOKENS, 2, HEADS, codec.row_bytes(HEAD_DIM))
            yield Task(
                key=("compress", bits),
                amount=kv_T2KD.numel(),
                work=partial(_append, kv_T2KD, batch, [self._taken(shape, "uint8")], room),
            )

    def _attending(
        self, config: ModelConfig, batch: Batch, caches: Sequence[Tensor] | Tensor, dtype: str
    ) -> partial[None]:
        """Attention to one cache after the other; outputs become queries, which does no harm."""
        heads = config.num_heads + 2 * config.num_kv_heads
        both = self._drawn((batch.num_tokens, heads, HEAD_DIM), dtype)
        room = self._workspace(_ROOM_BYTES)
        return partial(_attend, both[:, : config.num_heads], batch, caches, config, room)

    def _batch(
        self, config: ModelConfig, spans: list[RowSpan], dtype: str, codec: Codec | None = None
    ) -> Batch:
        return Batch.build(
            config,
            [spans],
            None,
            lambda index: index.to(self._device),
            torch_dtype(dtype),
            kv_codec=codec,
        )

    def _workspace(self, num_bytes: int) -> Workspace:
        return Workspace(self._memory.take_on_device(num_bytes, "measuring"))

    def _taken(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        kind = torch_dtype(dtype)
        slab = self._memory.take_on_device(math.prod(shape) * kind.itemsize, "measuring")
        return typed(slab, kind, shape)

    def _compressed_rows(self, num_rows: int, size: int, codec: Codec) -> Tensor:
        """Rows of so many numbers each, the same few again and again."""
        few = _DRAWN // size
        drawn = self._taken((few, codec.row_bytes(size)), "uint8")
        compress(self._drawn((few, size), "float32"), codec, drawn)
        rows = self._taken((num_rows, codec.row_bytes(size)), "uint8")
        rows.view(-1, few, rows.shape[1]).copy_(drawn)
        return rows

    def _drawn(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return self._drawn_bytes(math.prod(shape) * DTYPE_BYTES[dtype], dtype).view(shape)

    def _drawn_bytes(self, num_bytes: int, dtype: str) -> Tensor:
        """Numbers like a model's, the same again and again."""
        numbers = self._taken((num_bytes // DTYPE_BYTES[dtype],), dtype)
        drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))
        drawn = drawn.mul_(0.1).to(numbers)
        whole = numbers.numel() // _DRAWN * _DRAWN
        numbers[:whole].view(-1, _DRAWN).copy_(drawn)
        numbers[whole:] = drawn[: numbers.numel() - whole]
        return numbers


def _num_slices(dtype: str) -> int:
    return -(-ROTATED_BYTES // (math.prod(_SLICE) * DTYPE_BYTES[dtype]))


def _packed(weight: Tensor, buffer: Tensor, dtype: torch.dtype | None = None) -> PackedWeight:
    num_out, num_in = weight.shape
    return PackedWeight.make(
        (num_out, num_in),
        dtype or weight.dtype,
        buffer,
        lambda rows, plain: plain.copy_(weight[rows]),
    )


def _conversion(
    field: str, what: str, slices: Sequence[Tensor | CompressedWeight], out: Tensor
) -> Task:
    return Task(
        key=(field, what),
        amount=out.numel(),
        work=lambda turn: convert(slices[turn % len(slices)], out),
    )


def _decoding(num_tokens: int) -> tuple[int, int]:
    """Rows and tokens of each, for so many tokens of cache: 32 rows, or fewer of 16 tokens."""
    rows = max(1, min(32, num_tokens // 16))
    return rows, num_tokens // rows


def _config(num_kv_heads: int, dtype: str) -> ModelConfig:
    """As much of a model as a single segment looks at."""
    return ModelConfig(
        family="llama",
        num_layers=1,
        hidden_size=WIDTH,
        num_heads=HEADS,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        ffn_size=WIDTH,
        vocab_size=VOCABULARY,
        max_positions=1 << 20,
        dtype=dtype,
        norm="rms",
        norm_eps=1e-6,
        activation="silu",
        gated_mlp=True,
        tied=False,
        tensor_names={},
    )


def _multiply_by(
    weights: Sequence[Weight], x_TI: Tensor, out_TO: Tensor, room: Workspace, turn: int
) -> None:
    multiply(x_TI, weights[turn % len(weights)], None, out_TO, room)


def _attend(
    q_TND: Tensor,
    batch: Batch,
    caches: Sequence[Tensor] | Tensor,
    config: ModelConfig,
    room: Workspace,
    turn: int,
) -> None:
    room.reset()
    segments.attend(q_TND, batch, [caches[turn % len(caches)]], config, 0, room)


def _append(kv_T2KD: Tensor, batch: Batch, kvs: list[Tensor], room: Workspace, turn: int) -> None:
    room.reset()
    segments.append_kv(kv_T2KD, batch, kvs, room)


def _normalize(
    x_TH: Tensor, weight_H: Tensor, out_TH: Tensor, config: ModelConfig, room: Workspace, turn: int
) -> None:
    room.reset()
    segments.norm(x_TH, weight_H, None, out_TH, config, room)
