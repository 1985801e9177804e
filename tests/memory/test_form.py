"""Compressed weights on disk: made once, whole or not at all, checked before they are used."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexpipe.errors import ModelError, RunError
from flexpipe.kernels.codec import compress
from flexpipe.memory import disk, form
from flexpipe.memory.checkpoint import StoredTensor
from flexpipe.memory.disk import DiskFile, DiskReader, aligned_buffer
from flexpipe.memory.form import FormCache, TensorForm, provide
from flexpipe.plan.codec import Codec
from flexpipe.plan.hardware import peak_rss_bytes, reset_peak_rss, rss_bytes
from flexpipe.units import MIB

CODEC = Codec(bits=4)
ROWS, SIZE = 301, 200
SKEW = 72  # where the tensor starts in its file


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def place(tmp_path: Path, matrix: torch.Tensor) -> Callable[..., TensorForm]:
    """`place(codec)`: where the compressed form of the matrix is to lie."""

    def located(codec: Codec = CODEC, dtype: str = "float32") -> TensorForm:
        source = store(tmp_path / f"model-{dtype}", matrix.to(getattr(torch, dtype)), dtype)
        return FormCache(tmp_path / "cache", {"w": source}, lambda: "a").locate("w", codec)

    return located


def store(path: Path, matrix: torch.Tensor, dtype: str, name: str = "w") -> StoredTensor:
    data = matrix.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"\0" * SKEW + data)
    return StoredTensor(name, dtype, tuple(matrix.shape), path, SKEW, len(data))


def made(tensor: TensorForm, reader: DiskReader | None = None, room: int = MIB) -> int:
    """Provide the tensor; the bytes written."""
    buffer = torch.from_numpy(aligned_buffer(room))
    if reader is not None:
        return provide(tensor, reader, buffer, lambda num_bytes: None)
    with DiskReader() as own:
        return provide(tensor, own, buffer, lambda num_bytes: None)


def check(tensor: TensorForm, matrix: torch.Tensor) -> None:
    """The file holds the compressed rows, from its second block on."""
    expected = torch.empty(ROWS, tensor.row_bytes, dtype=torch.uint8)
    compress(matrix, tensor.codec, expected)
    data = np.fromfile(tensor.path, np.uint8, tensor.num_bytes, offset=tensor.offset)
    assert np.array_equal(data, expected.view(-1).numpy())
    assert tensor.path.stat().st_size == tensor.file_bytes


@pytest.mark.parametrize("room", [4 * 4096, 9 * 4096, MIB])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("codec", [CODEC, Codec(bits=8, group_size=32)])
def test_a_file_holds_the_compressed_rows_however_few_are_made_at_once(
    place: Any, matrix: torch.Tensor, codec: Codec, dtype: str, room: int
) -> None:
    tensor = place(codec, dtype)
    assert made(tensor, room=room) == tensor.file_bytes == tensor.new_bytes
    check(tensor, matrix.to(getattr(torch, dtype)))
    assert place(codec, dtype).new_bytes == 0


def test_a_second_run_writes_nothing_and_reads_no_source(place: Any, matrix: torch.Tensor) -> None:
    made(place())
    with DiskReader() as reader:
        assert made(place(), reader) == 0
        assert reader.counter.bytes_read == 0
    check(place(), matrix)


def test_the_place_depends_on_checkpoint_tensor_and_codec_and_on_nothing_else(
    tmp_path: Path, matrix: torch.Tensor
) -> None:
    source = store(tmp_path / "model", matrix, "float32")
    elsewhere = store(tmp_path / "moved", matrix, "float32")
    other = StoredTensor("v", "float32", source.shape, source.path, source.offset + 4, 8)

    def path(source: StoredTensor, identity: str = "a", codec: Codec = CODEC) -> Path:
        return FormCache(tmp_path, {"w": source}, lambda: identity).locate("w", codec).path

    assert path(source) == path(elsewhere)
    paths = [
        path(source),
        path(source, "b"),
        path(other),
        path(source, codec=Codec(bits=8)),
        path(source, codec=Codec(bits=4, group_size=128)),
    ]
    assert len(set(paths)) == len(paths)


def test_names_of_the_same_bytes_share_a_file(tmp_path: Path, matrix: torch.Tensor) -> None:
    source = store(tmp_path / "model", matrix, "float32")
    asked: list[str] = []
    cache = FormCache(
        tmp_path, {"one": source, "two": source}, lambda: asked.append("digest") or "a"
    )
    assert not asked  # nothing is compressed yet
    assert cache.locate("one", CODEC) == cache.locate("two", CODEC)
    assert asked == ["digest"]


def flip(at: int) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


def resize(by: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, path.stat().st_size + by)


DAMAGES = {
    "a flipped code": (flip(4096 + 5), "do not belong together"),
    "a flipped last byte": (flip(4096 + ROWS * CODEC.row_bytes(SIZE) - 1), "do not belong"),
    "another magic": (flip(3), "do not belong together"),
    "a flipped header": (flip(60), "do not belong together"),
    "a cut end": (resize(-4096), "bytes instead of"),
    "more than was written": (resize(4096), "bytes instead of"),
    "nothing": (lambda path: path.write_bytes(b""), "0 bytes instead of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again_with_a_message(
    place: Any, matrix: torch.Tensor, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    spoil, reason = DAMAGES[damage]
    tensor = place()
    made(tensor)
    spoil(tensor.path)
    with caplog.at_level(logging.WARNING, "flexpipe"):
        assert made(tensor) == tensor.file_bytes
    (record,) = caplog.records
    text = record.getMessage()
    assert str(tensor.path) in text and reason in text and "compressing w again" in text
    check(tensor, matrix)
    caplog.clear()
    assert made(tensor) == 0 and not caplog.records


def test_a_file_of_another_key_is_not_taken(place: Any, matrix: torch.Tensor) -> None:
    one, other = place(CODEC), place(Codec(bits=4, group_size=66))
    made(one)
    made(other)
    assert one.file_bytes == other.file_bytes
    other.path.write_bytes(one.path.read_bytes())
    assert made(other) > 0
    check(other, matrix)


@pytest.mark.parametrize("at", range(4))
def test_a_killed_writer_leaves_nothing_that_is_taken_for_valid(
    place: Any, matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    tensor, count = place(), 0
    real, sync = DiskFile.write, DiskFile.sync

    def write(file: DiskFile, buffer: Any, offset: int) -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        real(file, buffer, offset)

    def killed_at_last(file: DiskFile) -> None:
        sync(file)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(disk, "IN_FLIGHT", 1)  # a forked child has no helper threads
            monkeypatch.setattr(DiskFile, "write", write)
            monkeypatch.setattr(DiskFile, "sync", killed_at_last)
            torch.set_num_threads(1)
            made(tensor, room=9 * 4096)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not tensor.path.exists()
    assert list(tensor.path.parent.glob("*.partial"))
    assert place().new_bytes == tensor.file_bytes
    assert made(tensor) == tensor.file_bytes
    check(tensor, matrix)
    assert not list(tensor.path.parent.glob("*.partial"))


def test_a_full_disk_is_told_and_leaves_nothing(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = place()
    monkeypatch.setattr(disk, "_free_bytes", lambda path: 4096)
    with pytest.raises(RunError, match=r"is full: .* wanted, 4.* KiB free. Free some space"):
        made(tensor)
    assert [path.name for path in tensor.path.parent.iterdir()] == ["lock"]


@pytest.mark.parametrize("value", [65520.0, -1e30, float("inf"), float("nan")])
def test_numbers_beyond_the_codec_are_refused_by_the_tensors_name(
    tmp_path: Path, matrix: torch.Tensor, value: float
) -> None:
    matrix[-1, 3] = value
    source = store(tmp_path / "model", matrix, "float32", "model.layers.0.mlp.up_proj.weight")
    cache = FormCache(tmp_path / "cache", {"w": source}, lambda: "a")
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight holds"):
        made(cache.locate("w", CODEC))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_row_too_long_for_the_buffer_is_refused(place: Any) -> None:
    with pytest.raises(ModelError, match="too long to compress"):
        made(place(), room=3 * 4096)


def test_a_folder_that_cannot_be_written_is_named(place: Any) -> None:
    tensor = place()
    tensor.path.parent.write_text("a file")
    with pytest.raises(RunError, match=r"cannot keep compressed weights in .*--offload-dir"):
        made(tensor)


def test_compressing_takes_the_buffer_and_a_little_whatever_the_tensors_size(
    tmp_path: Path,
) -> None:
    rows, size = 40_000, 1024  # 80 MiB
    path = tmp_path / "model"
    with path.open("wb") as file:
        for _ in range(rows // 1000):
            file.write(torch.randn(1000, size).bfloat16().view(torch.uint8).numpy().tobytes())
    source = StoredTensor("w", "bfloat16", (rows, size), path, 0, rows * size * 2)
    tensor = FormCache(tmp_path / "cache", {"w": source}, lambda: "a").locate("w", CODEC)
    before = rss_bytes()
    reset_peak_rss()
    made(tensor, room=8 * MIB)
    grown = peak_rss_bytes() - before
    made(tensor, room=8 * MIB)
    print(f"{grown / MIB:.1f} MiB")
    assert grown < (8 + disk.BOUNCE_BYTES // MIB + 32) * MIB
    assert peak_rss_bytes() - before < grown + MIB
    assert json.loads(tensor.path.read_bytes()[len(form._MAGIC) : 4096].rstrip(b"\0"))
