"""Attention of a device and what goes over numbers once, as tasks for the stopwatch.

KV caches are rotated over, so that they come from memory as they do in a run, and small work is
measured behind a product.

Shapes as in `flexpipe.model.segments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flexpipe.memory.tier import torch_dtype
from flexpipe.model import segments
from flexpipe.model.batch import Batch, RopeTable, RowSpan
from flexpipe.model.config import DTYPE_BYTES, ModelConfig, RopeConfig
from flexpipe.model.cost import attend_flops, num_attended
from flexpipe.model.sampling import choose
from flexpipe.model.workspace import Workspace
from flexpipe.plan.codec import Codec
from flexpipe.policy.profile import NARROW_HEAD, prefill_kind
from flexpipe.profiling.effort import Effort
from flexpipe.profiling.numbers import CODECS, ROTATED_BYTES, Numbers
from flexpipe.profiling.products import ProductTasks
from flexpipe.profiling.stopwatch import Task, TaskSource
from flexpipe.units import MIB

WIDTH = 2048  # of hidden states under a norm, and numbers of a token's keys
# narrow heads attend as many bytes a second when decoding and a tenth fewer FLOPs where those bound
HEADS, HEAD_DIM = 16, 128
GROUP = 8  # query heads that share a head of the cache where arithmetic is to be the bound
GROUPED_BYTES = 16 * MIB
SAMPLED, VOCABULARY = 32, 32000
COMPRESSED_TOKENS = 256
PAIR_BYTES = 16 * MIB  # of KV cache that is attended beside others


class AttentionTasks:
    """The tasks of one device; what a source holds, it takes when it starts."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self._effort = effort
        self._memory = Numbers(device)
        self._products = ProductTasks(device, effort)

    def sources(self, dtype: str) -> list[TaskSource]:
        """All there is to know of a compute dtype, beside products."""
        return [
            partial(self._prefill_attention, dtype),
            *self.decoding(dtype),
            partial(self._elementwise, dtype),
            partial(self._turned, dtype),
            partial(self._gated, dtype),
            partial(self._samples, dtype),
        ]

    def decoding(self, dtype: str) -> list[TaskSource]:
        """What a CPU beside an accelerator may be asked to do."""
        return [
            partial(self._decode_attention, dtype),
            partial(self._compressed_attention, dtype),
            partial(self._grouped_attention, dtype),
        ]

    def compression(self) -> Iterator[Task]:
        """Of new keys and values, into the cache."""
        config = _config(HEADS, "float32")
        kv_T2KD = self._memory.drawn((COMPRESSED_TOKENS, 2, HEADS, HEAD_DIM), "float32")
        room = self._memory.workspace()
        for bits, codec in CODECS.items():
            spans = [RowSpan(0, COMPRESSED_TOKENS)]
            batch = self._batch(config, spans, "float32", codec)
            shape = (1, COMPRESSED_TOKENS, 2, HEADS, codec.row_bytes(HEAD_DIM))
            yield Task(
                key=("compress", bits),
                amount=kv_T2KD.numel(),
                work=partial(_append, kv_T2KD, batch, [self._memory.taken(shape, "uint8")], room),
            )

    def pair(self, dtype: str) -> Task:
        """Attention to so much KV cache as takes a millisecond or less."""
        return next(task for task in self._decode_attention(dtype) if task.amount >= PAIR_BYTES)

    def _prefill_attention(self, dtype: str) -> Iterator[Task]:
        """Some 1024 tokens a call, as many rows as that makes, with wide heads and narrow ones."""
        for head_dim in (HEAD_DIM, NARROW_HEAD):
            config = replace(_config(HEADS, dtype), head_dim=head_dim)
            for num_new in self._effort.prefill:
                rows = max(1, self._effort.prefill[-1] // 2 // num_new)
                batch = self._batch(config, [RowSpan(0, num_new)] * rows, dtype)
                cache = self._memory.drawn((rows, num_new, 2, HEADS, head_dim), dtype)
                yield Task(
                    key=("prefill_attention", prefill_kind(dtype, head_dim), num_new),
                    amount=attend_flops(config, rows * num_attended(0, num_new)),
                    work=self._attending(config, batch, [cache], dtype),
                )

    def _decode_attention(self, dtype: str) -> Iterator[Task]:
        """One head of cache per query head, so that bytes are the bound."""
        between = self._products.between(dtype)
        config = _config(HEADS, dtype)
        token_bytes = 2 * HEADS * HEAD_DIM * DTYPE_BYTES[dtype]
        held = self._memory.drawn_bytes(
            max(self._effort.held_bytes, self._effort.decode[-1]), dtype
        )
        for num_bytes in self._effort.decode:
            rows, length = _decoding(num_bytes // token_bytes)
            batch = self._batch(config, [RowSpan(length - 1, 1)] * rows, dtype)
            caches = held.view(-1, rows, length, 2, HEADS, HEAD_DIM)
            yield Task(
                key=("decode_attention", dtype, num_bytes),
                amount=num_bytes,
                work=self._attending(config, batch, caches, dtype),
                before=between,
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
                caches = self._memory.compressed_rows(
                    count * num_tokens * 2 * HEADS, HEAD_DIM, codec
                )
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
        caches = [self._memory.drawn(shape, dtype) for _ in range(ROTATED_BYTES // GROUPED_BYTES)]
        yield Task(
            key=("decode_attention_flops", dtype),
            amount=attend_flops(config, rows * length),
            work=self._attending(config, batch, caches, dtype),
        )

    def _elementwise(self, dtype: str) -> Iterator[Task]:
        """An RMS norm."""
        between = self._products.between(dtype)
        config, room = _config(HEADS, dtype), self._memory.workspace()
        weight_H = self._memory.drawn((WIDTH,), dtype)
        for tokens in self._effort.norm:
            x_TH, out_TH = (self._memory.drawn((tokens, WIDTH), dtype) for _ in range(2))
            yield Task(
                key=("elementwise", dtype, tokens * WIDTH),
                amount=tokens * WIDTH,
                work=partial(_normalize, x_TH, weight_H, out_TH, config, room),
                before=between,
            )

    def _turned(self, dtype: str) -> Iterator[Task]:
        """Queries and keys given their positions."""
        between = self._products.between(dtype)
        config, room = _config(HEADS, dtype), self._memory.workspace()
        rope = RopeTable.build(RopeConfig(theta=10000.0), HEAD_DIM, self._memory.device)
        for tokens in self._effort.norm:
            batch = self._batch(config, [RowSpan(0, tokens)], dtype, rope=rope)
            x_TND = self._memory.drawn((tokens, HEADS, HEAD_DIM), dtype)
            yield Task(
                key=("rotary", dtype, x_TND.numel()),
                amount=x_TND.numel(),
                work=partial(_turn, x_TND, batch, room),
                before=between,
            )

    def _gated(self, dtype: str) -> Iterator[Task]:
        """One wide state by another, in memory that was just written as a product writes it."""
        between = self._products.between(dtype)
        for tokens in self._effort.norm:
            wide_TF, gate_TF = (self._memory.drawn((tokens, WIDTH), dtype) for _ in range(2))
            yield Task(
                key=("gating", dtype, tokens * WIDTH),
                amount=tokens * WIDTH,
                work=partial(_gate, wide_TF, gate_TF),
                before=between,
            )

    def _samples(self, dtype: str) -> Iterator[Task]:
        logits_RV = self._memory.drawn((SAMPLED, VOCABULARY), dtype)
        yield Task(
            key=("sample", dtype),
            amount=logits_RV.numel(),
            work=lambda turn: choose(logits_RV, [None] * SAMPLED),
        )

    def _attending(
        self, config: ModelConfig, batch: Batch, caches: Sequence[Tensor] | Tensor, dtype: str
    ) -> partial[None]:
        """Attention to one cache after the other; outputs become queries, which does no harm."""
        heads = config.num_heads + 2 * config.num_kv_heads
        both = self._memory.drawn((batch.num_tokens, heads, config.head_dim), dtype)
        room = self._memory.workspace()
        return partial(_attend, both[:, : config.num_heads], batch, caches, config, room)

    def _batch(
        self,
        config: ModelConfig,
        spans: list[RowSpan],
        dtype: str,
        codec: Codec | None = None,
        rope: RopeTable | None = None,
    ) -> Batch:
        return Batch.build(
            config,
            [spans],
            rope,
            lambda index: index.to(self._memory.device),
            torch_dtype(dtype),
            kv_codec=codec,
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


def _turn(x_TND: Tensor, batch: Batch, room: Workspace, turn: int) -> None:
    room.reset()
    segments.turn(x_TND, batch, room)


def _gate(wide_TF: Tensor, gate_TF: Tensor, turn: int) -> None:
    wide_TF.mul_(gate_TF)
