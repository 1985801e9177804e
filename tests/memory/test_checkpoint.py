"""Claims about opening checkpoints, what is refused and how, and reading tensors from them."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flexpipe.errors import ModelError
from flexpipe.memory.checkpoint import INDEX, Checkpoint
from flexpipe.memory.disk import DiskReader, aligned_buffer
from flexpipe.memory.source import open_checkpoint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (100, 16), "a.weight": (33, 7), "a.bias": (33,), "scalar": ()}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def save(directory: Path, shards: dict[str, dict[str, torch.Tensor]], index: bool = True) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for file, content in shards.items():
        save_file(content, directory / file)
    if index and len(shards) > 1:
        weight_map = {name: file for file, content in shards.items() for name in content}
        total = sum(t.nbytes for content in shards.values() for t in content.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        (directory / INDEX).write_text(text)
    return directory


def two_shards(directory: Path, index: bool = True) -> Path:
    content = tensors()
    first = {name: content.pop(name) for name in ("embed", "scalar")}
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    return save(directory, {names[0]: first, names[1]: content}, index)


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(directory, cache_dir=directory / "unused")


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    stored = checkpoint.tensors[name]
    out = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    flat = out.reshape(-1).view(torch.uint8).numpy()
    with DiskReader() as reader:
        checkpoint.read_tensor(stored, flat, reader)
    return out


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_each_dtype_is_read_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    content = tensors(DTYPES[dtype])
    checkpoint = opened(save(tmp_path / "m", {"model.safetensors": content}))
    for name, tensor in content.items():
        stored = checkpoint.require(name, tuple(tensor.shape))
        assert stored.dtype == dtype
        assert stored.num_bytes == tensor.nbytes
        assert torch.equal(read(checkpoint, name), tensor)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_checkpoint_with_or_without_an_index(tmp_path: Path, index: bool) -> None:
    checkpoint = opened(two_shards(tmp_path / "m", index))
    assert set(checkpoint.tensors) == set(tensors())
    for name, tensor in tensors().items():
        assert torch.equal(read(checkpoint, name), tensor)


def test_a_local_directory_opens_with_sockets_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = two_shards(tmp_path / "m")
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')

    def blocked(*args: object, **kwargs: object) -> None:
        raise AssertionError("a local checkpoint asked for the network")

    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "create_connection", blocked)
    checkpoint = opened(directory)
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert checkpoint.config == {"model_type": "llama"}
    assert torch.equal(read(checkpoint, "embed"), tensors()["embed"])


def test_opening_loads_neither_torch_nor_the_hub(tmp_path: Path) -> None:
    directory = two_shards(tmp_path / "m")
    script = f"""
        import sys
        from pathlib import Path
        from flexpipe.memory.source import open_checkpoint
        open_checkpoint({str(directory)!r}, cache_dir=Path("unused"))
        assert not {{"torch", "huggingface_hub", "safetensors"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_reading_a_tensor_takes_no_memory_beside_the_callers(tmp_path: Path) -> None:
    big = {"w": torch.zeros(96 << 20, dtype=torch.uint8).view(torch.float32)}
    directory = save(tmp_path / "m", {"model.safetensors": big})
    script = f"""
        import resource
        from pathlib import Path
        from flexpipe.memory.source import open_checkpoint
        from flexpipe.memory.disk import BOUNCE_BYTES, DiskReader, aligned_buffer
        checkpoint = open_checkpoint({str(directory)!r}, cache_dir=Path("unused"))
        out = aligned_buffer(96 << 20)
        out[:] = 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with DiskReader() as reader:
            checkpoint.read_tensor(checkpoint.tensors["w"], out, reader)
        assert not out.any()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert after - before < BOUNCE_BYTES + (8 << 20), after - before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_shard_is_named_with_expected_and_found_size(tmp_path: Path, cut: int) -> None:
    directory = two_shards(tmp_path / "m")
    shard = directory / "model-00001-of-00002.safetensors"
    expected = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(ModelError) as refused:
        opened(directory)
    for part in (shard.name, f"expected {expected} bytes", f"found {expected - cut} bytes"):
        assert part in str(refused.value)


@pytest.mark.parametrize("keep", [0, 5, 30])
def test_a_shard_cut_inside_its_header_is_named_with_sizes(tmp_path: Path, keep: int) -> None:
    directory = save(tmp_path / "m", {"model.safetensors": tensors()})
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=rf"expected at least \d+ bytes, found {keep} bytes"):
        opened(directory)


def test_a_missing_shard_is_named_with_the_bytes_the_index_expects(tmp_path: Path) -> None:
    directory = two_shards(tmp_path / "m")
    shard = directory / "model-00001-of-00002.safetensors"
    shard.unlink()
    expected = sum(tensors()[name].nbytes for name in ("embed", "scalar"))
    with pytest.raises(ModelError, match=rf"{shard.name}.*about {expected} bytes, found 0 bytes"):
        opened(directory)


def test_a_missing_shard_is_noticed_without_an_index(tmp_path: Path) -> None:
    directory = two_shards(tmp_path / "m", index=False)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors is missing"):
        opened(directory)


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    directory = two_shards(tmp_path / "m")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="tensor ghost is not in"):
        opened(directory)


def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    directory = two_shards(tmp_path / "m")
    (directory / INDEX).write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ModelError, match="no usable weight_map"):
        opened(directory)


def test_a_missing_tensor_is_named_with_its_shape_and_near_names(tmp_path: Path) -> None:
    checkpoint = opened(two_shards(tmp_path / "m"))
    with pytest.raises(ModelError) as refused:
        checkpoint.require("a.weights", (33, 7))
    for part in ("a.weights", "[33, 7]", "Near names: a.weight"):
        assert part in str(refused.value)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    checkpoint = opened(two_shards(tmp_path / "m"))
    with pytest.raises(ModelError, match=r"a\.weight .*\[33, 7\].*\[7, 33\]"):
        checkpoint.require("a.weight", (7, 33))


def test_other_dtypes_are_refused_only_when_they_are_needed(tmp_path: Path) -> None:
    content = {
        "w": torch.ones(4),
        "ids": torch.arange(4),
        "q": torch.ones(4).to(torch.float8_e4m3fn),
    }
    checkpoint = opened(save(tmp_path / "m", {"model.safetensors": content}))
    checkpoint.require("w", (4,))
    for name, word in (("ids", "I64"), ("q", "F8_E4M3")):
        with pytest.raises(ModelError, match=f"stored as {word}"):
            checkpoint.require(name, (4,))


def header_file(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{not json", b"", "is damaged"),
        ([1, 2], b"", "is damaged"),
        ({"w": {"dtype": "F32", "shape": [2]}}, b"12345678", "is damaged"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "8 bytes for"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123", "found"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123456789", "expected"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, b"", "is damaged"),
        ({"w": 3}, b"", "is damaged"),
    ],
)
def test_inconsistent_headers_are_refused(
    tmp_path: Path, header: object, data: bytes, words: str
) -> None:
    directory = save(tmp_path / "m", {})
    header_file(directory / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=words) as refused:
        opened(directory)
    assert "model.safetensors" in str(refused.value)


def test_a_git_lfs_pointer_is_told_apart_from_damage(tmp_path: Path) -> None:
    directory = save(tmp_path / "m", {})
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000000000\n"
    (directory / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match="git lfs pull"):
        opened(directory)
    (directory / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="is not a safetensors file"):
        opened(directory)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    directory = save(tmp_path / "m", {})
    torch.save(Bomb(), directory / "pytorch_model.bin")
    with pytest.raises(ModelError) as refused:
        opened(directory)
    for part in ("pytorch_model.bin", "save_pretrained", str(directory)):
        assert part in str(refused.value)


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    directory = two_shards(tmp_path / "m")
    torch.save(Bomb(), directory / "pytorch_model.bin")
    assert len(opened(directory).tensors) == 4


def test_directories_without_weights_or_config_say_what_is_lacking(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        opened(tmp_path)
    with pytest.raises(ModelError, match=r"no \*\.safetensors files"):
        opened(save(tmp_path / "m", {}))
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        opened(tmp_path / "m")


def test_identity_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    one = opened(save(tmp_path / "a", {"model.safetensors": tensors(seed=0)}))
    same = opened(save(tmp_path / "b", {"model.safetensors": tensors(seed=0)}))
    tuned = tensors(seed=0)
    tuned["embed"] *= 1.01
    other = opened(save(tmp_path / "c", {"model.safetensors": tuned}))
    assert one.identity() == same.identity()
    assert one.identity() != other.identity()
    (tmp_path / "b" / "config.json").write_text('{"model_type": "qwen3"}')
    assert one.identity() != opened(tmp_path / "b").identity()


def test_many_tensors_may_share_one_reader(tmp_path: Path) -> None:
    checkpoint = opened(two_shards(tmp_path / "m"))
    with DiskReader() as reader:
        for name, tensor in tensors().items():
            stored = checkpoint.tensors[name]
            out = aligned_buffer(stored.num_bytes)[: stored.num_bytes]
            checkpoint.read_tensor(stored, out, reader)
            assert np.array_equal(out, tensor.reshape(-1).view(torch.uint8).numpy())
        assert reader.counter.bytes_read >= sum(t.nbytes for t in tensors().values())
