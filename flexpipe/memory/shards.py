"""A shard's part of a model's tensors, where it lies in the checkpoint.

What is split over its out features or over the vocabulary is a range of rows: the same file,
another offset. What is split over its in features is a part of every row. Whoever holds such a
tensor in memory reads whole rows and keeps a part of each; the disk tier, which would read slivers
again and again, has it repacked (`flexpipe.memory.form`). Which tensors are split, and how, is said
by `flexpipe.model.config`: it shows in their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flexpipe.memory.checkpoint import StoredTensor
from flexpipe.model.config import DTYPE_BYTES, ModelConfig, TensorSpec
from flexpipe.plan.placement import meets_vocabulary, model_tensors


def shard_tensors(
    config: ModelConfig, whole: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors of the shard that `config` describes, as parts of those of the whole model."""
    return {spec.name: _part(whole[spec.name], spec, config) for spec in model_tensors(config)}


def _part(stored: StoredTensor, spec: TensorSpec, config: ModelConfig) -> StoredTensor:
    if stored.shape == spec.shape:
        return stored
    item = DTYPE_BYTES[stored.dtype]
    offset, stride = stored.offset, None
    if stored.shape[0] != spec.shape[0]:
        row_bytes = stored.num_bytes // stored.shape[0]
        index = config.shard.index * spec.shape[0]
        offset += row_bytes * (config.vocab_rows.start if meets_vocabulary(spec) else index)
    else:
        offset += config.shard.index * spec.shape[1] * item
        stride = stored.shape[1] * item
    num_bytes = spec.num_elements * item
    return replace(stored, shape=spec.shape, offset=offset, num_bytes=num_bytes, stride=stride)
