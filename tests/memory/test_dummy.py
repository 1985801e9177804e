"""Claims about random weights and the shapes that come with flexpipe."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from flexpipe.errors import ModelError, PolicyError, RunError
from flexpipe.memory import disk, dummy
from flexpipe.memory.checkpoint import StoredTensor, read_json
from flexpipe.memory.dummy import dummy_tensors
from flexpipe.memory.source import open_checkpoint
from flexpipe.model.config import ModelConfig
from flexpipe.model.families import read_config
from flexpipe.preset import find_preset, preset_names

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "dtype": "float16",
    "vocab_size": 301,
    "hidden_size": 48,
    "ffn_dim": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 24,
    "do_layer_norm_before": True,
}


def llama(**changes: object) -> ModelConfig:
    return read_config(LLAMA | changes)


def values(stored: StoredTensor) -> torch.Tensor:
    data = np.fromfile(stored.path, np.uint8, stored.num_bytes, offset=stored.offset)
    return torch.from_numpy(data).view(getattr(torch, stored.dtype)).reshape(stored.shape)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [LLAMA, OPT])
def test_every_tensor_of_the_model_is_there_in_its_shape(
    tmp_path: Path, shape: dict[str, object], dtype: str
) -> None:
    config = replace(read_config(shape), dtype=dtype)
    tensors = dummy_tensors(config, cache_dir=tmp_path)
    for spec in dummy._all(config):
        stored = tensors[spec.name]
        assert (stored.name, stored.shape, stored.dtype) == (spec.name, spec.shape, dtype)
        assert torch.isfinite(values(stored)).all()


def test_the_file_is_a_safetensors_file_that_others_can_read(tmp_path: Path) -> None:
    tensors = dummy_tensors(llama(dtype="bfloat16"), cache_dir=tmp_path)
    (path,) = files(tmp_path)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(file.get_tensor(name), values(tensors[name]))


def test_one_layer_on_disk_stands_for_all(tmp_path: Path) -> None:
    few = dummy_tensors(llama(num_hidden_layers=2), cache_dir=tmp_path / "few")
    many = dummy_tensors(llama(num_hidden_layers=50), cache_dir=tmp_path / "many")
    assert len(many) > len(few)
    assert files(tmp_path / "few")[0].stat().st_size == files(tmp_path / "many")[0].stat().st_size
    layers = [many[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 49)]
    assert layers[0].offset == layers[1].offset


def test_the_same_seed_draws_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    config = llama()
    name = "model.layers.1.self_attn.q_proj.weight"
    first, again, other = (
        values(dummy_tensors(config, seed=seed, cache_dir=tmp_path / folder)[name])
        for seed, folder in ((1, "a"), (1, "b"), (2, "a"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(files(tmp_path / "a")) == 2


def test_each_role_draws_its_own_numbers(tmp_path: Path) -> None:
    tensors = dummy_tensors(llama(), cache_dir=tmp_path)
    k, v = (values(tensors[f"model.layers.0.self_attn.{n}_proj.weight"]) for n in "kv")
    assert not torch.equal(k, v)


def test_norms_are_one_and_matrices_keep_the_scale(tmp_path: Path) -> None:
    tensors = dummy_tensors(llama(hidden_size=256), cache_dir=tmp_path)
    assert (values(tensors["model.norm.weight"]) == 1).all()
    std = values(tensors["model.layers.0.self_attn.q_proj.weight"]).std().item()
    assert std == pytest.approx(1 / 16, rel=0.05)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tensors = dummy_tensors(llama(tie_word_embeddings=True), cache_dir=tmp_path)
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].shape == (300, 64)


def test_deep_residual_streams_stay_finite_in_fp16() -> None:
    """The same layer, applied a hundred times, adds up at worst linearly."""
    config = llama(num_hidden_layers=100, hidden_size=512, intermediate_size=1024, dtype="float16")
    specs = {spec.role: dummy._drawn(config, spec) for spec in dummy._unique(config)}

    def weight(role: str) -> torch.Tensor:
        drawn = dummy._draw(specs[role], "float32", 0)
        return torch.from_numpy(drawn).view(torch.float32).reshape(specs[role].shape)

    up, gate, down = weight("up_proj"), weight("gate_proj"), weight("down_proj")
    hidden = weight("embed_tokens")[:8]
    for _ in range(100):
        normed = hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt()
        hidden = hidden + (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    assert 0.1 < hidden.abs().max() < 1000


def test_a_matrix_bigger_than_a_tile_repeats_it_without_repeating_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dummy, "_TILE_ELEMENTS", 1024 - 24)
    monkeypatch.setattr(dummy, "_DRAW_ELEMENTS", 300)
    rows = values(dummy_tensors(llama(), cache_dir=tmp_path)["model.embed_tokens.weight"])
    flat = rows.flatten()
    assert torch.equal(flat[:1000], flat[1000:2000])
    assert len(torch.unique(rows[:100], dim=0)) == 100


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    exact = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    exact[:3] = np.array([0x3F808000, 0x3F818000, 0x3F808001], dtype=np.uint32).view(np.float32)
    ours = torch.from_numpy(dummy._as_dtype(exact, "bfloat16").view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours, torch.from_numpy(exact).bfloat16())


def test_a_second_run_finds_the_file_and_a_damaged_one_is_drawn_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = llama()
    dummy_tensors(config, cache_dir=tmp_path)
    (path,) = files(tmp_path)
    content, made = path.read_bytes(), path.stat().st_mtime_ns
    dummy_tensors(config, cache_dir=tmp_path)
    assert path.stat().st_mtime_ns == made
    path.write_bytes(content[:-100])
    with caplog.at_level(logging.INFO, logger="flexpipe"):
        dummy_tensors(config, cache_dir=tmp_path)
    assert f"found {len(content) - 100} bytes" in caplog.text
    assert path.read_bytes() == content


def test_a_file_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dummy-x.partial").write_bytes(b"of a killed run")
    monkeypatch.setattr(disk, "_free_bytes", lambda path: 1000)
    with pytest.raises(RunError, match="wanted, 1000 B free"):
        dummy_tensors(llama(), cache_dir=tmp_path)
    assert files(tmp_path) == []


def test_ranks_that_start_together_draw_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = llama()
    with caplog.at_level(logging.INFO, logger="flexpipe"):
        ranks = [
            threading.Thread(target=dummy_tensors, args=(config,), kwargs={"cache_dir": tmp_path})
            for _ in range(4)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    assert (
        sum("drawing dummy weights into" in record.getMessage() for record in caplog.records) == 1
    )


def test_dummy_checkpoints_open_from_a_directory_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    cache = tmp_path / "cache"
    from_directory = open_checkpoint(tmp_path, load_format="dummy", cache_dir=cache)
    from_file = open_checkpoint(tmp_path / "config.json", load_format="dummy", cache_dir=cache)
    assert from_directory.directory == tmp_path
    assert from_file.directory is None
    assert from_directory.identity() == from_file.identity()
    other = open_checkpoint(tmp_path, load_format="dummy", seed=1, cache_dir=cache)
    assert other.identity() != from_file.identity()
    from_file.require("lm_head.weight", (300, 64))


def test_an_unknown_shape_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'gpt-9'.*llama-3-8b.*opt-175b"):
        open_checkpoint("gpt-9", load_format="dummy", cache_dir=tmp_path)
    with pytest.raises(ModelError, match="Add --load-format dummy"):
        open_checkpoint("opt-30b", cache_dir=tmp_path)
    with pytest.raises(PolicyError, match="nonsense"):
        find_preset("", "nonsense")


PUBLISHED_PARAMETERS = {
    "opt-6.7b": 6_658_473_984,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", list(PUBLISHED_PARAMETERS))
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    config = read_config(read_json(find_preset("models", name.upper())))
    shapes = {spec.name: spec.shape for spec in dummy._all(config)}
    assert sum(prod(shape) for shape in shapes.values()) == PUBLISHED_PARAMETERS[name]


def test_every_preset_is_known_by_name() -> None:
    assert set(preset_names("models")) == set(PUBLISHED_PARAMETERS)
    assert find_preset("models", "opt-6.7b.json") == find_preset("models", "opt-6.7b")
    rope = read_config(read_json(find_preset("models", "llama-3-405b"))).rope
    assert rope is not None and rope.kind == "llama3" and rope.factor == 8.0
