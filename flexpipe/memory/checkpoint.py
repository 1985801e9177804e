"""Where a model's tensors lie in its files.

Opening a checkpoint reads the headers of its safetensors files and nothing else: every tensor
becomes a path, an offset and a length, from which the disk tier reads straight into a pool. No
second copy is written, nothing is unpickled, nothing is mapped. Which tensors a model needs, and
in what shapes, is said by `flexpipe.model.config`.
Invariant: each tensor of an open checkpoint lies wholly inside its file and fits its shape.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexpipe.errors import ModelError
from flexpipe.memory.disk import Buffer, DiskReader

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SAMPLE_BYTES = 1024
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk, or a part of one. `offset` counts from the start of the file.

    `dtype` is "float32", "float16" or "bfloat16", or the file's own word for any other. Where its
    rows are parts of longer ones, `stride` is the bytes from one to the next.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int
    stride: int | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's configuration and the places of its tensors.

    `directory` is None for a preset's shape, which has neither files nor a tokenizer of its own.
    """

    directory: Path | None
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, StoredTensor]

    def require(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The tensor `name`, provided it has this shape and a dtype that can be computed with."""
        # checkpoints saved from the bare decoder lack the outer model's prefix
        stored = self.tensors.get(name) or self.tensors.get(name.removeprefix("model."))
        if stored is None:
            near = difflib.get_close_matches(name, self.tensors, n=3, cutoff=0.5)
            names = f" Near names: {', '.join(near)}." if near else ""
            raise ModelError(
                f"{self._place()} has no tensor {name} of shape {list(shape)}.{names} Check that "
                "config.json and the weights belong together."
            )
        if stored.shape != shape:
            raise ModelError(
                f"tensor {name} in {stored.path} has shape {list(stored.shape)}, but config.json "
                f"asks for {list(shape)}. Check that config.json and the weights belong together."
            )
        if stored.dtype not in DTYPES.values():
            raise ModelError(
                f"tensor {name} in {stored.path} is stored as {stored.dtype}; flexpipe reads "
                "float32, float16 and bfloat16. Use a checkpoint in one of those."
            )
        return stored

    def identity(self) -> str:
        """A digest that tells checkpoints apart, wherever they lie.

        It covers the configuration, every tensor's place and file size, and a sample of every
        tensor's bytes, so that two fine-tunes of one model differ.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for stored in sorted(self.tensors.values(), key=lambda stored: stored.name):
            place = (stored.name, stored.dtype, stored.shape, stored.offset, stored.num_bytes)
            digest.update(repr(place).encode())
        for path, extents in sorted(_extents(self.tensors.values()).items()):
            digest.update(_sample(path, extents))
        return digest.hexdigest()

    def read_tensor(self, stored: StoredTensor, out: Buffer, reader: DiskReader) -> None:
        """Read exactly the tensor's bytes into `out`, past the page cache."""
        read_tensor(stored, out, reader)

    def _place(self) -> str:
        return str(self.directory) if self.directory else "the checkpoint"


def read_tensor(stored: StoredTensor, out: Buffer, reader: DiskReader) -> None:
    """Read exactly the bytes of `stored` into `out`, which may lie anywhere in memory."""
    assert out.nbytes == stored.num_bytes, f"{out.nbytes} bytes for {stored}"
    if stored.num_bytes:
        reader.file(stored.path).read_into(out, stored.offset)


def open_directory(directory: Path) -> Checkpoint:
    """Open the checkpoint in a local directory; touches no network."""
    return Checkpoint(
        directory=directory,
        config=read_json(directory / "config.json"),
        generation_config=read_generation_config(directory),
        tensors=_find_tensors(directory),
    )


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The directory's generation_config.json; {} without one."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}. A model directory holds config.json and "
            "*.safetensors files."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}. Fetch the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object. Fetch the file again.")
    return value


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against its size."""
    with _readable(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = _header_bytes(path, start, size)
            text = file.read(header_bytes)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        data = 8 + header_bytes
        tensors = {name: _stored(path, name, entry, data) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"the header of {path} is damaged ({error}). Fetch the file again."
        ) from error
    expected = max((t.offset + t.num_bytes for t in tensors.values()), default=data)
    if size != expected:
        raise _wrong_size(path, f"{expected} bytes", size)
    return tensors


def _header_bytes(path: Path, start: bytes, size: int) -> int:
    if start.startswith(b"version "):
        raise ModelError(
            f"{path} is a Git LFS pointer of {size} bytes, not the weights. Run `git lfs pull`, or "
            "fetch the model with `hf download`."
        )
    if len(start) < 8:
        raise _wrong_size(path, "at least 8 bytes", size)
    (header_bytes,) = struct.unpack("<Q", start)
    if header_bytes > _MAX_HEADER_BYTES:
        raise ModelError(
            f"{path} ({size} bytes) is not a safetensors file: it claims a header of "
            f"{header_bytes} bytes. Fetch the file again."
        )
    if 8 + header_bytes > size:
        raise _wrong_size(path, f"at least {8 + header_bytes} bytes", size)
    return int(header_bytes)


def _stored(path: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    word = str(entry["dtype"])
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise ValueError(f"tensor {name} lies at {begin} to {end} with shape {list(shape)}")
    item_bytes = _ITEM_BYTES.get(word)
    if item_bytes is not None and end - begin != math.prod(shape) * item_bytes:
        raise ValueError(f"tensor {name} has {end - begin} bytes for shape {list(shape)} of {word}")
    return StoredTensor(name, DTYPES.get(word, word), shape, path, data + begin, end - begin)


def _find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the directory's safetensors files."""
    if (directory / INDEX).is_file():
        return _indexed_tensors(directory)
    files = _unindexed_files(directory)
    if not files:
        raise _no_safetensors(directory)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        tensors |= read_header(path)
    return tensors


def _indexed_tensors(directory: Path) -> dict[str, StoredTensor]:
    index = read_json(directory / INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(_is_file_name(name) for name in shards.values()):
        raise ModelError(f"{directory / INDEX} has no usable weight_map. Fetch the file again.")
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    headers = {name: read_header(directory / name) for name in names if name not in missing}
    if missing:
        raise _missing_shards(directory, missing, index, headers.values())
    for name, shard in shards.items():
        if name not in headers[shard]:
            raise ModelError(
                f"tensor {name} is not in {directory / shard}, where {INDEX} places it. The index "
                "and the shards belong to different versions; fetch the model again."
            )
    return {name: headers[shard][name] for name, shard in shards.items()}


def _is_file_name(name: object) -> bool:
    """Whether `name` stays inside the checkpoint's directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _unindexed_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        stem, _, count = path.stem.rpartition("-of-")
        prefix, _, number = stem.rpartition("-")
        if not (count.isdigit() and number.isdigit()):
            continue
        for index in range(1, int(count) + 1):
            part = path.with_name(f"{prefix}-{index:0{len(number)}d}-of-{count}.safetensors")
            if not part.is_file():
                raise ModelError(
                    f"{part} is missing: expected one of {count} shards, found 0 bytes. Fetch the "
                    "model again."
                )
    return [path for path in files if not path.name.startswith("consolidated")] or files


def _missing_shards(
    directory: Path,
    missing: list[str],
    index: Mapping[str, Any],
    headers: Iterable[Mapping[str, StoredTensor]],
) -> ModelError:
    """The index tells the bytes of all tensors; what the other shards lack is expected here."""
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    present = sum(stored.num_bytes for header in headers for stored in header.values())
    known = isinstance(total, int) and total > present
    expected = f"about {total - present} bytes" if known and total else "a file of unknown size"
    return ModelError(
        f"{directory} lacks {', '.join(missing)}, named by {INDEX}: expected {expected}, found "
        "0 bytes. Fetch the missing files, for example with `hf download`."
    )


def _no_safetensors(directory: Path) -> ModelError:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    if not pickled:
        return ModelError(
            f"{directory} has no *.safetensors files. Fetch the model's weights, or use "
            "--load-format dummy to run its shape with random ones."
        )
    return only_pickled(str(directory), pickled[0])


def only_pickled(model: str, example: str) -> ModelError:
    """The refusal of weights that would have to be unpickled, with the way to convert them."""
    return ModelError(
        f"{model} has only pickled weights ({example}), and unpickling can run any code. If you "
        "trust their origin, convert them once and use the new directory:\n"
        "  from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        f'  [x.from_pretrained("{model}").save_pretrained("converted") for x in (M, T)]'
    )


def _wrong_size(path: Path, expected: str, found: int) -> ModelError:
    return ModelError(
        f"{path} is truncated or damaged: expected {expected}, found {found} bytes. Fetch the file "
        "again."
    )


class _readable:
    """Turn the system's refusal to read `path` into a ModelError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ModelError(f"cannot read {self._path}: {error.strerror or error}.") from error


def _extents(tensors: Iterable[StoredTensor]) -> dict[Path, list[tuple[int, int]]]:
    """Each file's distinct (offset, num_bytes); names may share an extent."""
    places: dict[Path, set[tuple[int, int]]] = {}
    for stored in tensors:
        places.setdefault(stored.path, set()).add((stored.offset, stored.num_bytes))
    return {path: sorted(extents) for path, extents in places.items()}


def _sample(path: Path, extents: list[tuple[int, int]]) -> bytes:
    """Digest of the file's size and a few bytes from the middle of each extent."""
    with _readable(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
            digest = hashlib.sha256(str(os.fstat(fd).st_size).encode())
            for offset, num_bytes in extents:
                start = offset + max(0, num_bytes - _SAMPLE_BYTES) // 2
                digest.update(os.pread(fd, min(num_bytes, _SAMPLE_BYTES), start))
        finally:
            os.close(fd)
    return digest.digest()
