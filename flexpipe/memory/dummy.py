"""Random weights in a model's true shapes, for experiments without the real ones.

One safetensors file holds one decoder layer, the embedding and the head; every layer's names point
at the same bytes. A 175B shape so needs a layer's space on disk, while every read is a real read
of the real size. The bytes depend on the shapes, the dtype and the seed, on nothing else, so a
run's tokens are the same under any placement.
Weights are drawn so that fp16 stays finite through any depth: matrices keep the scale of what they
multiply, and those that add to the residual share it out among the layers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexpipe.errors import ModelError, RunError
from flexpipe.memory.checkpoint import (
    DTYPES,
    Checkpoint,
    StoredTensor,
    read_generation_config,
    read_header,
    read_json,
)
from flexpipe.memory.disk import (
    ALIGN,
    CHUNK_BYTES,
    DiskFile,
    aligned_buffer,
    check_free_bytes,
    round_up,
)
from flexpipe.memory.offload import file_lock
from flexpipe.model.config import (
    DTYPE_BYTES,
    ModelConfig,
    TensorSpec,
    attention_tensors,
    embed_tensors,
    head_tensors,
    mlp_tensors,
)
from flexpipe.preset import find_preset
from flexpipe.units import format_bytes

_VERSION = 1  # of the numbers drawn: a new one makes old files obsolete
_DRAW_ELEMENTS = 1 << 20
# A bigger matrix repeats its first draws. Not a multiple of any row's length, so rows still differ.
_TILE_ELEMENTS = (16 << 20) - 24

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A tensor to draw: normal around `mean`, or constant where `std` is 0."""

    name: str
    shape: tuple[int, ...]
    role: str
    mean: float
    std: float

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def open_dummy(
    model: str | Path, *, seed: int, cache_dir: Path, revision: str | None = None
) -> Checkpoint:
    """Checkpoint of random weights for a directory or file with a config, a preset, or a hub id."""
    from flexpipe.model.families import read_config

    directory, hf_config = find_shape(model, revision)
    return Checkpoint(
        directory=directory,
        config=hf_config,
        generation_config=read_generation_config(directory) if directory else {},
        tensors=dummy_tensors(read_config(hf_config), seed=seed, cache_dir=cache_dir),
    )


def dummy_tensors(
    config: ModelConfig, *, seed: int = 0, cache_dir: Path
) -> dict[str, StoredTensor]:
    """Every tensor of `config`, drawn into a file of `cache_dir` unless it is there already."""
    drawn = [_drawn(config, spec) for spec in _unique(config)]
    path = cache_dir / f"dummy-{_key(drawn, config.dtype, seed)}.safetensors"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock")):  # ranks of one job want the same file
        header = _read_valid(path, drawn)
        if header is None:
            _write(path, drawn, config.dtype, seed)
            header = read_header(path)
    return {spec.name: _named(header[_stored_name(config, spec)], spec) for spec in _all(config)}


def find_shape(
    model: str | Path, revision: str | None = None
) -> tuple[Path | None, dict[str, Any]]:
    """Directory of the tokenizer, if any, and the Hugging Face config; weights are not needed."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path, read_json(path / "config.json")
    if path.is_file():
        return None, read_json(path)
    if isinstance(model, str) and "/" not in model:
        return None, read_json(find_preset("models", model))
    from flexpipe.memory.hub import download

    directory = download(model, revision=revision, weights=False)
    return directory, read_json(directory / "config.json")


# -- which tensors --------------------------------------------------------------------------------


def _layer(config: ModelConfig, layer: int) -> tuple[TensorSpec, ...]:
    return attention_tensors(config, layer) + mlp_tensors(config, layer)


def _all(config: ModelConfig) -> Iterator[TensorSpec]:
    yield from embed_tensors(config)
    for layer in range(config.num_layers):
        yield from _layer(config, layer)
    yield from head_tensors(config)


def _unique(config: ModelConfig) -> list[TensorSpec]:
    """What is stored: the first layer for all, a tied head not again."""
    specs = (*embed_tensors(config), *_layer(config, 0), *head_tensors(config))
    stored: dict[str, TensorSpec] = {}
    for spec in specs:
        stored.setdefault(spec.name, spec)
    return list(stored.values())


def _stored_name(config: ModelConfig, spec: TensorSpec) -> str:
    """Name under which the bytes of `spec` are stored."""
    return config.tensor_names[spec.role].format(layer=0)


def _named(stored: StoredTensor, spec: TensorSpec) -> StoredTensor:
    return StoredTensor(
        spec.name, stored.dtype, stored.shape, stored.path, stored.offset, stored.num_bytes
    )


def _drawn(config: ModelConfig, spec: TensorSpec) -> _Drawn:
    mean, std = _distribution(config, spec)
    return _Drawn(spec.name, spec.shape, spec.role, mean, std)


def _distribution(config: ModelConfig, spec: TensorSpec) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's numbers."""
    if spec.role.endswith("_bias"):
        return 0.0, 0.02
    if spec.role.endswith("norm"):
        return 1.0, 0.0
    if spec.role.startswith("embed") or (spec.role == "lm_head" and config.tied):
        return 0.0, 0.1
    std = 1.0 / math.sqrt(spec.shape[-1])
    if spec.role in ("o_proj", "down_proj"):  # these add up over the layers
        std /= math.sqrt(2 * config.num_layers)
    return 0.0, std


def _key(drawn: Sequence[_Drawn], dtype: str, seed: int) -> str:
    words = json.dumps([_VERSION, dtype, seed, [repr(tensor) for tensor in drawn]])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


# -- the file -------------------------------------------------------------------------------------


def _read_valid(path: Path, drawn: Sequence[_Drawn]) -> dict[str, StoredTensor] | None:
    """Header of a file that an earlier run completed; None, with a message, if it is damaged."""
    if not path.exists():
        return None
    try:
        header = read_header(path)
        for tensor in drawn:
            if header[tensor.name].shape != tensor.shape:
                raise KeyError(tensor.name)
    except (ModelError, KeyError) as error:
        log.warning("drawing the dummy weights again: %s", error)
        return None
    return header


def _write(path: Path, drawn: Sequence[_Drawn], dtype: str, seed: int) -> None:
    """Draw all tensors into `path`, which appears only when it is complete."""
    header = _header(drawn, dtype)
    end = len(header) + sum(tensor.num_elements for tensor in drawn) * DTYPE_BYTES[dtype]
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    check_free_bytes(partial, end)
    log.info("drawing dummy weights into %s: %s", path, format_bytes(end))
    try:
        with DiskFile(partial, "rw") as file:
            file.reserve(end)
            _write_blocks(file, header, drawn, dtype, seed)
            file.truncate(end)
            file.sync()
        partial.rename(path)
    except (OSError, RunError):
        partial.unlink(missing_ok=True)
        raise


def _write_blocks(
    file: DiskFile, header: bytes, drawn: Sequence[_Drawn], dtype: str, seed: int
) -> None:
    """Write header and tensors, one behind the other, through one aligned buffer."""
    block = aligned_buffer(CHUNK_BYTES)
    filled = written = 0
    for piece in _pieces(header, drawn, dtype, seed):
        done = 0
        while done < piece.nbytes:
            count = min(piece.nbytes - done, block.nbytes - filled)
            block[filled : filled + count] = piece[done : done + count]
            filled, done = filled + count, done + count
            if filled == block.nbytes:
                file.write(block, written)
                written, filled = written + filled, 0
    if filled:
        file.write(block[: round_up(filled)], written)  # the rest is cut off by truncate


def _pieces(
    header: bytes, drawn: Sequence[_Drawn], dtype: str, seed: int
) -> Iterator[npt.NDArray[np.uint8]]:
    yield np.frombuffer(header, dtype=np.uint8)
    for tensor in drawn:
        tile = _draw(tensor, dtype, seed)
        left = tensor.num_elements * DTYPE_BYTES[dtype]
        while left:
            yield tile[:left]
            left -= min(left, tile.nbytes)


def _header(drawn: Sequence[_Drawn], dtype: str) -> bytes:
    """The safetensors header, padded so that the tensors begin at a whole block."""
    word = next(word for word, name in DTYPES.items() if name == dtype)
    entries: dict[str, Any] = {}
    begin = 0
    for tensor in drawn:
        end = begin + tensor.num_elements * DTYPE_BYTES[dtype]
        entries[tensor.name] = {
            "dtype": word,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries).encode()
    text = text.ljust(round_up(8 + len(text), ALIGN) - 8)
    return struct.pack("<Q", len(text)) + text


def _draw(tensor: _Drawn, dtype: str, seed: int) -> npt.NDArray[np.uint8]:
    """The tensor's first numbers, at most a tile of them, as bytes of `dtype`."""
    rng = np.random.default_rng([seed % 2**64, zlib.crc32(tensor.role.encode())])
    num_elements = min(tensor.num_elements, _TILE_ELEMENTS)
    tile = np.empty(num_elements * DTYPE_BYTES[dtype], dtype=np.uint8)
    for start in range(0, num_elements, _DRAW_ELEMENTS):
        count = min(_DRAW_ELEMENTS, num_elements - start)
        values = np.full(count, tensor.mean, dtype=np.float32)
        if tensor.std:
            values += rng.standard_normal(count, dtype=np.float32) * np.float32(tensor.std)
        low = start * DTYPE_BYTES[dtype]
        high = low + count * DTYPE_BYTES[dtype]
        tile[low:high] = _as_dtype(values, dtype).view(np.uint8)
    return tile


def _as_dtype(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """`values` rounded to `dtype`; numpy has no bfloat16, so that one comes as its bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)
