"""A checkpoint on paper: where a model's tensors would lie, for plans that nobody runs here.

Shapes alone say how many bytes every tensor has, in the file or compressed. The places are made up,
one tensor behind the other in one file, and nothing is written or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexpipe.memory.checkpoint import SINGLE, StoredTensor, open_directory
from flexpipe.memory.disk import ALIGN, round_up
from flexpipe.model.config import DTYPE_BYTES, ModelConfig
from flexpipe.plan.codec import Codec
from flexpipe.plan.placement import FormOf, model_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperForm:
    """Another form of a tensor, in a file of its own that would have to be made."""

    path: str
    num_bytes: int
    dtype: str
    offset: int = ALIGN
    stride: None = None

    @property
    def new_bytes(self) -> int:
        return self.offset + round_up(self.num_bytes)


def paper_forms(config: ModelConfig) -> FormOf:
    """Where another form of each tensor would lie."""
    shapes = {spec.name: spec.shape for spec in model_tensors(config)}

    def form_of(name: str, codec: Codec | None) -> PaperForm:
        num_rows, size = shapes[name]
        if codec is None:
            num_bytes = num_rows * size * DTYPE_BYTES[config.dtype]
            return PaperForm(path=f"{name}.whole", num_bytes=num_bytes, dtype=config.dtype)
        num_bytes = num_rows * codec.row_bytes(size)
        return PaperForm(path=f"{name}.{codec.bits}", num_bytes=num_bytes, dtype="uint8")

    return form_of


def paper_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of the model in the dtype its config names."""
    tensors, offset = dict[str, StoredTensor](), ALIGN
    for spec in model_tensors(config):
        num_bytes = spec.num_elements * DTYPE_BYTES[config.dtype]
        tensors[spec.name] = StoredTensor(
            spec.name, config.dtype, spec.shape, Path(SINGLE), offset, num_bytes
        )
        offset += num_bytes
    return tensors


def tensors_of(directory: Path | None, config: ModelConfig) -> Mapping[str, StoredTensor]:
    """Those of a checkpoint's files where it has some, on paper otherwise."""
    if directory is None or not any(directory.glob("*.safetensors")):
        return paper_tensors(config)
    checkpoint = open_directory(directory)
    return {
        tensor.name: checkpoint.require(tensor.name, tensor.shape)
        for tensor in model_tensors(config)
    }
