"""A shard's tensors are read from where they lie in the whole ones, or repacked once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flexpipe.memory.checkpoint import open_directory
from flexpipe.memory.disk import DiskReader, aligned_buffer
from flexpipe.memory.dummy import dummy_tensors
from flexpipe.memory.form import FormCache, TensorForm, provide, read_rows
from flexpipe.memory.shards import shard_tensors
from flexpipe.memory.tier import torch_dtype
from flexpipe.model.config import ModelConfig, Shard, shard_config
from flexpipe.plan.codec import Codec
from flexpipe.units import MIB
from tests.model.loop import read_tensors
from tests.schedule.plans import tiny_config

CONFIG = tiny_config(vocab_size=323, torch_dtype="bfloat16", attention_bias=True)
LAYER = "model.layers.1."
COLUMNS = (LAYER + "self_attn.o_proj.weight", LAYER + "mlp.down_proj.weight")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory with a safetensors file of CONFIG's shape."""
    folder = tmp_path_factory.mktemp("model")
    tensors = dummy_tensors(CONFIG, cache_dir=folder)
    first = next(iter(tensors.values())).path
    first.rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def parts(folder: Path, config: ModelConfig):
    stored = {}
    for name, tensor in open_directory(folder).tensors.items():
        for layer in range(config.num_layers):  # every layer has the first one's bytes
            stored[name.replace("layers.0.", f"layers.{layer}.")] = tensor
    return shard_tensors(config, stored)


def read(tensor, count: int | None = None) -> torch.Tensor:
    with DiskReader() as reader:
        room = torch.from_numpy(aligned_buffer(MIB))
        return read_rows(tensor, 0, count or tensor.shape[0], room, reader).clone()


def expected(folder: Path, name: str, config: ModelConfig) -> torch.Tensor:
    """The part that the shard has, cut from the tensor as safetensors reads it."""
    whole = read_tensors(folder)[name.replace("layers.1.", "layers.0.")]
    index, size = config.shard.index, config.shard.size
    if name in COLUMNS:
        return whole.chunk(size, 1)[index]
    if "embed" in name or "lm_head" in name:
        return whole[config.vocab_rows.start : config.vocab_rows.stop]
    return whole.chunk(size, 0)[index]


@pytest.mark.parametrize("index", range(4))
def test_every_matrix_of_a_shard_is_a_part_of_the_whole_one(model, index):
    config = shard_config(CONFIG, Shard(index, 4))
    found = parts(model, config)
    for name in (
        *COLUMNS,
        LAYER + "self_attn.q_proj.weight",
        LAYER + "mlp.gate_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ):
        want = expected(model, name, config)
        assert found[name].shape == tuple(want.shape)
        assert found[name].num_bytes == want.nbytes
        assert torch.equal(read(found[name]), want)
        assert torch.equal(read(found[name], 3), want[:3])


def test_only_parts_of_rows_have_gaps_between_them(model):
    found = parts(model, shard_config(CONFIG, Shard(1, 2)))
    assert {name for name in found if found[name].stride and LAYER in name} == set(COLUMNS)


def made(form: TensorForm, room: int = MIB) -> int:
    with DiskReader() as reader:
        return provide(form, reader, torch.from_numpy(aligned_buffer(room)), lambda num_bytes: None)


@pytest.mark.parametrize("room", [4 * 4096, MIB])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_part_of_every_row_is_repacked_once_row_behind_row(model, tmp_path, name, room):
    config = shard_config(CONFIG, Shard(1, 2))
    cache = FormCache(tmp_path, parts(model, config), lambda: "a")
    form = cache.locate(name, None)
    assert made(form, room) == form.new_bytes == form.file_bytes
    data = np.fromfile(form.path, np.uint8, form.num_bytes, offset=form.offset)
    rows = torch.from_numpy(data).view(torch_dtype(form.dtype)).view(form.source.shape)
    assert torch.equal(rows, expected(model, name, config))
    again = FormCache(tmp_path, parts(model, config), lambda: "a").locate(name, None)
    assert again.new_bytes == 0 and made(again) == 0


def test_every_shard_and_every_form_of_it_has_a_file_of_its_own(model, tmp_path):
    paths = set()
    for size in (1, 2, 4):
        for index in range(size):
            config = shard_config(CONFIG, Shard(index, size))
            cache = FormCache(tmp_path, parts(model, config), lambda: "a")
            for name in (*COLUMNS, LAYER + "self_attn.q_proj.weight"):
                for codec in (None, Codec(bits=4), Codec(bits=8)):
                    paths.add(cache.locate(name, codec).path)
    assert len(paths) == (1 + 2 + 4) * 3 * 3


def test_a_damaged_repacked_file_is_made_again_with_a_message(model, tmp_path, caplog):
    config = shard_config(CONFIG, Shard(0, 2))
    form = FormCache(tmp_path, parts(model, config), lambda: "a").locate(COLUMNS[0], None)
    made(form)
    data = bytearray(form.path.read_bytes())
    data[5000] ^= 1
    form.path.write_bytes(data)
    assert made(form) == form.file_bytes
    assert "repacking" in caplog.text and str(form.path) in caplog.text
