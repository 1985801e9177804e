"""The smallest engine that can run the segments: weights in memory, one arena for the KV cache.

It exists to prove the math; it knows no tiers and no schedule. Rows may be prefilled whole or in
chunks, decode beside others that prefill, and wait for a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flexpipe.kernels.codec import compress
from flexpipe.memory.checkpoint import open_directory
from flexpipe.memory.disk import DiskReader
from flexpipe.memory.form import read_rows
from flexpipe.memory.shards import shard_tensors
from flexpipe.memory.tier import torch_dtype
from flexpipe.model import config as model_config
from flexpipe.model import segments
from flexpipe.model.config import ModelConfig, Shard, TensorSpec, shard_config
from flexpipe.model.cost import workspace_bytes
from flexpipe.model.families import read_config
from flexpipe.model.matmul import CompressedWeight
from flexpipe.model.segments import (
    Batch,
    EmbedWeights,
    HeadWeights,
    LayerWeights,
    RopeTable,
    RowSpan,
    Workspace,
)
from flexpipe.plan.codec import Codec
from flexpipe.plan.placement import is_shared, model_tensors

GARBAGE = 9.0  # what the KV arena holds where nothing was written
Runs = Sequence[Sequence[tuple[int, Sequence[int]]]]
NO_NUMBERS = 255  # … where bytes stand for numbers: none that is one


def read_tensors(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_shard(directory: Path, whole: ModelConfig, config: ModelConfig) -> dict[str, Tensor]:
    """A shard's tensors, read as parts of the checkpoint's."""
    stored = open_directory(directory).tensors
    named = {spec.name: stored[spec.name] for spec in model_tensors(whole)}
    tensors = {}
    with DiskReader() as reader:
        for name, part in shard_tensors(config, named).items():
            dtype = torch_dtype(part.dtype)
            if len(part.shape) == 1:
                room = torch.empty(part.num_bytes, dtype=torch.uint8)
                reader.file(part.path).read_into(room.numpy(), part.offset)
                tensors[name] = room.view(dtype)
            else:
                stride = part.stride or part.num_bytes // part.shape[0]
                room = torch.empty(part.shape[0] * stride, dtype=torch.uint8)
                rows = read_rows(part, 0, part.shape[0], room, reader)
                tensors[name] = rows.clone()
    return tensors


class Decoder:
    """A model in memory, or a shard of one, with room for `num_rows` rows of `region` tokens."""

    def __init__(
        self,
        directory: Path,
        *,
        num_rows: int,
        region: int = 352,
        wire: torch.dtype | None = None,
        kv: torch.dtype | Codec | None = None,
        compute: torch.dtype = torch.float32,
        max_tokens: int = 2048,
        codec: Codec | None = None,
        shard: Shard = Shard(),  # noqa: B008
    ) -> None:
        whole = read_config(json.loads((directory / "config.json").read_text()))
        self.config: ModelConfig = shard_config(whole, shard)
        if self.config.is_split:
            tensors = read_shard(directory, whole, self.config)
        else:
            tensors = read_tensors(directory)
        if wire is not None:
            tensors = {name: tensor.to(wire) for name, tensor in tensors.items()}
        self._codec = codec
        self.compute, kv = compute, kv or compute
        self.kv_codec = kv if isinstance(kv, Codec) else None
        self._tensors: Mapping[str, Tensor] = tensors
        self.layers = [
            LayerWeights(
                **self._take(model_config.attention_tensors(self.config, layer)),
                **self._take(model_config.mlp_tensors(self.config, layer)),
            )
            for layer in range(self.config.num_layers)
        ]
        embed = self._take(model_config.embed_tensors(self.config))
        head = self._take(model_config.head_tensors(self.config))
        self.embed_tokens = embed.pop("embed_tokens")
        self.lm_head = head.pop("lm_head")
        self.embed_weights = EmbedWeights(**embed)
        self.head_weights = HeadWeights(**head)
        self.rope = (
            RopeTable.build(self.config.rope, self.config.head_dim, "cpu")
            if self.config.rope
            else None
        )
        shape: tuple[int, ...] = (self.config.num_layers, num_rows, region, 2)
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        if isinstance(kv, Codec):
            shape = (*shape, heads, kv.row_bytes(dim))
            self.arena = torch.full(shape, NO_NUMBERS, dtype=torch.uint8)
        else:
            self.arena = torch.full((*shape, heads, dim), GARBAGE, dtype=kv)
        self.planned_bytes = self._planned(max_tokens, num_rows, region)
        self.ws = Workspace(torch.empty(self.planned_bytes, dtype=torch.uint8))
        self.lengths = [0] * num_rows
        self.skipped_layer: int | None = None
        self.tamper: Callable[[Batch], Batch] = lambda batch: batch

    def _take(self, specs: Sequence[TensorSpec]) -> dict[str, Any]:
        for spec in specs:
            assert self._tensors[spec.name].shape == spec.shape, spec
        return {spec.role: self._held(spec) for spec in specs}

    def _held(self, spec: TensorSpec) -> Tensor | CompressedWeight:
        tensor = self._tensors[spec.name]
        if self._codec is None or not is_shared(spec):
            return tensor
        num_rows, size = spec.shape
        rows = torch.empty(num_rows, self._codec.row_bytes(size), dtype=torch.uint8)
        compress(tensor, self._codec, rows)
        return CompressedWeight(rows, self._codec, size)

    def _planned(self, max_tokens: int, num_rows: int, region: int) -> int:
        dtypes = {tensor.dtype for tensor in self._tensors.values()}
        biggest = max(tensor.numel() for tensor in self._tensors.values())
        return workspace_bytes(
            self.config,
            num_tokens=max_tokens,
            num_rows=num_rows,
            compute_bytes=self.compute.itemsize,
            max_convert_elements=biggest if self._codec or dtypes != {self.compute} else 0,
            kv_bytes=self.arena.dtype.itemsize,
            kv_codec=self.kv_codec,
            max_length=region,
            wire_bytes=max(dtype.itemsize for dtype in dtypes),
        )

    def step(self, runs: Runs, sampled: Sequence[int]) -> Tensor:
        """Computes new tokens of adjacent rows, run by run; logits of the `sampled` rows."""
        return run_together([self], runs, sampled)

    def work(self, runs: Runs, sampled: Sequence[int]) -> Generator[Tensor, None, Tensor]:
        """The same; yields what is to be summed over the shards, in place."""
        config, ws = self.config, self.ws
        spans = [
            [RowSpan(self.lengths[row], len(new), row in sampled) for row, new in run]
            for run in runs
        ]
        batch = Batch.build(
            config, spans, self.rope, lambda t: t, self.compute, kv_codec=self.kv_codec
        )
        batch = self.tamper(batch)
        ids = torch.tensor([token for run in runs for _, new in run for token in new]).long()
        ws.reset()
        hidden = torch.empty(batch.num_tokens, config.hidden_size, dtype=self.compute)
        table = self.embed_tokens
        absent = None
        if config.is_split:
            ids = ids - config.vocab_rows.start
            absent = (ids < 0) | (ids >= len(config.vocab_rows))
            ids = ids.masked_fill(absent, 0)
        rows = table.index_select(0, ids) if isinstance(table, Tensor) else table.take(ids)
        segments.embed(rows, hidden, self.embed_weights, batch, config, ws, absent)
        if config.is_split:
            yield hidden
        for layer, weights in enumerate(self.layers):
            kvs = [self.arena[layer, run[0][0] : run[-1][0] + 1] for run in runs]
            if config.is_split:
                part = torch.full_like(hidden, GARBAGE)
                segments.attention_half(hidden, weights, batch, kvs, config, layer, ws, part)
                yield part
                segments.after_attention(hidden.add_(part), weights, config, ws)
                segments.mlp_half(hidden, weights, config, ws, part)
                yield part
                segments.after_mlp(hidden.add_(part), weights, config, ws)
            elif layer != self.skipped_layer:
                segments.decoder_layer(hidden, weights, batch, kvs, config, layer, ws)
        x = segments.head_input(hidden, batch.sample_index_S, self.head_weights, config, ws)
        logits = torch.zeros(batch.num_sampled, config.vocab_size, dtype=self.compute)
        own = logits[:, config.vocab_rows.start : config.vocab_rows.stop]
        for first in range(0, len(config.vocab_rows), 100):  # as a head off the device would stream
            part_V = slice(first, first + 100)
            segments.logits_slice(x, self.lm_head[part_V], own[:, part_V], ws)
        if config.is_split:
            yield logits
        assert ws.mark() <= self.planned_bytes
        for run in runs:
            for row, new in run:
                self.lengths[row] += len(new)
        return logits


class SplitDecoder:
    """All shards of a model, step by step side by side."""

    def __init__(self, directory: Path, size: int, *, num_rows: int, **how: Any) -> None:
        shards = [Shard(index, size) for index in range(size)]
        self.shards = [
            Decoder(directory, num_rows=num_rows, shard=shard, **how) for shard in shards
        ]

    def step(self, runs: Runs, sampled: Sequence[int]) -> Tensor:
        return run_together(self.shards, runs, sampled)


@torch.inference_mode()
def run_together(decoders: Sequence[Decoder], runs: Runs, sampled: Sequence[int]) -> Tensor:
    """One step of all shards of a model; each takes what the others computed for every sum."""
    works = [decoder.work(runs, sampled) for decoder in decoders]
    while True:
        parts, results = [], []
        for work in works:
            try:
                parts.append(next(work))
            except StopIteration as end:
                results.append(end.value)
        if results:
            assert len(results) == len(works)
            assert all(torch.equal(result, results[0]) for result in results)
            return results[0]
        total = torch.stack(parts).sum(0)
        for part in parts:
            part.copy_(total)


def generate(
    decoder: Decoder | SplitDecoder,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    *,
    chunk: int | None = None,
    before_step: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """Greedy logits [max_new, vocabulary] per prompt; all rows share one run and every step.

    With `chunk`, prompts enter piecewise, so short ones decode while long ones still prefill.
    """
    waiting = [list(prompt) for prompt in prompts]
    seen: list[list[Tensor]] = [[] for _ in prompts]
    step = 0
    while any(len(logits) < max_new for logits in seen):
        before_step(step)
        work: list[tuple[int, list[int]]] = []
        sampled: list[int] = []
        for row, tokens in enumerate(waiting):
            new = [] if len(seen[row]) == max_new else tokens[: chunk or len(tokens)]
            waiting[row] = tokens[len(new) :]
            work.append((row, new))
            if new and not waiting[row]:
                sampled.append(row)
        logits = decoder.step([work], sampled)
        for row, answer in zip(sampled, logits, strict=True):
            seen[row].append(answer)
            waiting[row] = [int(answer.argmax())]
        step += 1
    return [torch.stack(logits) for logits in seen]
