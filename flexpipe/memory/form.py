"""Weights on disk in another form than the checkpoint's: made once, kept for every run after.

A tensor is compressed, or repacked where a shard has a part of every row and would read the disk in
slivers, or both. Its form is one file of the offload directory's cache: a block with a header, then
its rows, from where they are read like those of a checkpoint. The file's name is a digest of all
that decides its bytes, so place and size are known before it is made: plans need no weights.
Invariants: a file under its final name was complete when it got it; nothing is read from a file
that was not checked in this run; making one takes no memory beyond the buffer given and small
temporaries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flexpipe.errors import ModelError, RunError
from flexpipe.kernels.codec import LARGEST, compress
from flexpipe.memory.checkpoint import StoredTensor
from flexpipe.memory.disk import ALIGN, DiskFile, DiskReader, StopFlag, Stopped, round_up
from flexpipe.memory.offload import file_lock
from flexpipe.memory.tier import torch_dtype
from flexpipe.model.config import DTYPE_BYTES
from flexpipe.plan.codec import FORMAT_VERSION, Codec
from flexpipe.units import format_bytes

FOLDER = "forms"  # in the cache
_MAGIC = b"flexpipe tensor form\n"
_PIECE_ELEMENTS = 1 << 19  # compressed at a time: torch takes some ten bytes for each

log = logging.getLogger("flexpipe")

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorForm:
    """Another form of `source` and where it lies, made or not; a `Stored` for the plan.

    Without a `codec` it holds the same numbers, row behind row.
    """

    source: StoredTensor
    codec: Codec | None
    path: Path
    new_bytes: int  # that making it writes; 0 where it is there already
    offset: int = ALIGN
    stride: None = None

    @property
    def dtype(self) -> str:
        return self.source.dtype if self.codec is None else "uint8"

    @property
    def row_bytes(self) -> int:
        size = self.source.shape[1]
        if self.codec is None:
            return size * DTYPE_BYTES[self.source.dtype]
        return self.codec.row_bytes(size)

    @property
    def num_bytes(self) -> int:
        return self.source.shape[0] * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """Whole blocks, so that every write is direct."""
        return self.offset + round_up(self.num_bytes)

    @property
    def verb(self) -> str:
        """What making it is called."""
        return "repack" if self.codec is None else "compress"


class FormCache:
    """Where other forms of one checkpoint's tensors, or of a shard's, lie."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, StoredTensor], identity: Callable[[], str]
    ) -> None:
        """`identity` digests the checkpoint; it is asked once, if any form is."""
        self._folder = folder
        self._tensors = tensors
        self._identity = cache(identity)
        # the layers of a dummy model are the same bytes, which one file serves
        self._first: dict[object, str] = {}
        for name, stored in tensors.items():
            self._first.setdefault(_place(stored), name)
        self.locate = cache(self._locate)

    def _locate(self, name: str, codec: Codec | None) -> TensorForm:
        """The place of a tensor's other form; what is there is not looked into."""
        source = self._tensors[self._first[_place(self._tensors[name])]]
        # a shard's part has the name of the whole tensor, but a place of its own
        part = source.shape, source.offset, source.stride
        how = (codec.bits, codec.group_size) if codec else None
        words = json.dumps([FORMAT_VERSION, self._identity(), source.name, part, how])
        key = hashlib.sha256(words.encode()).hexdigest()[:32]
        form = TensorForm(source=source, codec=codec, path=self._folder / key, new_bytes=0)
        with suppress(OSError):
            if form.path.stat().st_size == form.file_bytes:
                return form
        return replace(form, new_bytes=form.file_bytes)


def _place(stored: StoredTensor) -> object:
    """The same for names of the same bytes."""
    return stored.path, stored.offset, stored.shape


def provide(
    tensor: TensorForm,
    reader: DiskReader,
    buffer: Tensor,
    progress: Progress,
    stop: StopFlag | None = None,
) -> int:
    """Have a file at `tensor.path` that was checked or made just now; the bytes written.

    `buffer` is scratch: uint8, aligned, of at least a few rows. `progress` is told the bytes read.
    """
    folder = tensor.path.parent
    try:
        folder.mkdir(exist_ok=True)
        with file_lock(folder / "lock"):  # jobs that share the directory make a file once
            reason = _damage(tensor, buffer, progress, stop)
            if reason is None:
                return 0
            if tensor.path.exists():
                log.warning(
                    "%s is damaged (%s): %sing %s again",
                    tensor.path,
                    reason,
                    tensor.verb,
                    tensor.source.name,
                )
            _make(tensor, reader, buffer, progress, stop)
    except OSError as error:
        raise RunError(
            f"cannot keep {tensor.verb}ed weights in {folder}: {error.strerror or error}. Name "
            "another --offload-dir."
        ) from error
    return tensor.file_bytes


def read_rows(
    stored: StoredTensor, first: int, count: int, buffer: Tensor, reader: DiskReader
) -> Tensor:
    """Rows [first, first + count) of a matrix, viewed in `buffer`, uint8, that they are read into
    with what lies between them."""
    size, item = stored.shape[1], DTYPE_BYTES[stored.dtype]
    stride = stored.stride or size * item
    room = buffer[: (count - 1) * stride + size * item]
    reader.file(stored.path).read_into(room.numpy(), stored.offset + first * stride)
    return room.view(torch_dtype(stored.dtype)).as_strided((count, size), (stride // item, 1))


# -- an existing file -----------------------------------------------------------------------------


def _damage(
    tensor: TensorForm, buffer: Tensor, progress: Progress, stop: StopFlag | None
) -> str | None:
    """What is wrong with the file, None if nothing; all of it is read."""
    try:
        size = tensor.path.stat().st_size
    except FileNotFoundError:
        return "it is missing"
    if size != tensor.file_bytes:
        return f"{size} bytes instead of {tensor.file_bytes}"
    try:
        with DiskFile(tensor.path, stop=stop) as file:
            block = buffer[:ALIGN].numpy()
            file.read(block, 0, needed=ALIGN)
            header = bytes(block)
            checksum = 0
            for start, chunk in _chunks(tensor.num_bytes, buffer):
                file.read(chunk.numpy(), tensor.offset + start)
                wanted = min(len(chunk), tensor.num_bytes - start)
                checksum = zlib.crc32(chunk[:wanted].numpy().data, checksum)
                progress(wanted)
    except Stopped:
        raise
    except RunError as error:
        return str(error)
    if header == _header(tensor, checksum):
        return None
    return "header and data do not belong together"


def _chunks(num_bytes: int, buffer: Tensor) -> list[tuple[int, Tensor]]:
    """(start, room in whole blocks) for so many bytes."""
    step = len(buffer) // ALIGN * ALIGN
    starts = range(0, num_bytes, step)
    return [(start, buffer[: min(step, round_up(num_bytes - start))]) for start in starts]


def _header(tensor: TensorForm, checksum: int) -> bytes:
    """The first block of the file."""
    facts = {
        "version": FORMAT_VERSION,
        "key": tensor.path.name,
        "tensor": tensor.source.name,
        "shape": tensor.source.shape,
        "bits": tensor.codec.bits if tensor.codec else None,
        "group_size": tensor.codec.group_size if tensor.codec else None,
        "num_bytes": tensor.num_bytes,
        "crc32": checksum,
    }
    return (_MAGIC + json.dumps(facts).encode()).ljust(ALIGN, b"\0")


# -- a new file -----------------------------------------------------------------------------------


def _make(
    tensor: TensorForm,
    reader: DiskReader,
    buffer: Tensor,
    progress: Progress,
    stop: StopFlag | None,
) -> None:
    """Bring the tensor into a file that gets its name when it is on the disk."""
    for dead in tensor.path.parent.glob("*.partial"):  # whoever writes one holds the lock
        dead.unlink()
    partial = tensor.path.with_suffix(".partial")
    try:
        with DiskFile(partial, "rw", stop=stop) as file:
            file.reserve(tensor.file_bytes)
            _write(tensor, reader, buffer, file, progress)
            file.sync()
        os.replace(partial, tensor.path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write(
    tensor: TensorForm, reader: DiskReader, buffer: Tensor, file: DiskFile, progress: Progress
) -> None:
    """The rows, as many at a time as the buffer holds as they come and as they go; the header."""
    source = tensor.source
    num_rows, size = source.shape
    in_bytes = source.stride or size * DTYPE_BYTES[source.dtype]
    out_bytes = tensor.row_bytes
    at_once = (len(buffer) - 3 * ALIGN) // (in_bytes + out_bytes)
    if at_once < 1:
        raise ModelError(
            f"tensor {source.name} has rows of {format_bytes(in_bytes)}, too long to "
            f"{tensor.verb}; keep the weights off the disk, with --compress-weight none."
        )
    made = buffer[round_up(at_once * in_bytes) :]
    checksum = filled = 0
    end = tensor.offset
    for first in range(0, num_rows, at_once):
        count = min(at_once, num_rows - first)
        rows_MI = read_rows(source, first, count, buffer, reader)
        progress(rows_MI.nbytes)
        new = made[filled : filled + count * out_bytes]
        if tensor.codec is None:
            new.view(rows_MI.dtype).view(count, size).copy_(rows_MI)
        else:
            _compress_rows(tensor, tensor.codec, rows_MI, new)
        checksum = zlib.crc32(new.numpy().data, checksum)
        filled += new.numel()
        if whole := filled // ALIGN * ALIGN:
            file.write(made[:whole].numpy(), end)
            made[: filled - whole] = made[whole:filled].clone()
            end, filled = end + whole, filled - whole
    if filled:
        made[filled:ALIGN] = 0
        file.write(made[:ALIGN].numpy(), end)
    made[:ALIGN] = torch.frombuffer(bytearray(_header(tensor, checksum)), dtype=torch.uint8)
    file.write(made[:ALIGN].numpy(), 0)


def _compress_rows(tensor: TensorForm, codec: Codec, rows_MI: Tensor, out: Tensor) -> None:
    out_MB = out.view(len(rows_MI), tensor.row_bytes)
    step = max(1, _PIECE_ELEMENTS // rows_MI.shape[1])
    for first in range(0, len(rows_MI), step):
        piece = rows_MI[first : first + step]
        low, high = (float(bound) for bound in piece.aminmax())
        if not (low >= -LARGEST and high <= LARGEST):
            raise ModelError(
                f"tensor {tensor.source.name} holds numbers from {low:g} to {high:g}, which "
                f"compression cannot keep (up to {LARGEST:g}). Run without --compress-weight and "
                "--compress-vocabulary."
            )
        compress(piece, codec, out_MB[first : first + step])
