"""A checkpoint on paper has the bytes of a real one and touches no disk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from flexpipe.errors import ModelError
from flexpipe.memory.dummy import dummy_tensors, find_shape
from flexpipe.memory.form import FormCache
from flexpipe.memory.paper import paper_forms, paper_tensors, tensors_of
from flexpipe.model.families import read_config
from flexpipe.plan.codec import Codec
from flexpipe.plan.placement import is_shared, model_tensors
from tests.schedule.plans import tiny_config


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}])
def test_tensors_on_paper_have_the_bytes_of_those_that_are_drawn(tmp_path: Path, changes) -> None:
    config = tiny_config(**changes)
    drawn, paper = dummy_tensors(config, cache_dir=tmp_path), paper_tensors(config)
    assert {name: (t.dtype, t.shape, t.num_bytes) for name, t in paper.items()} == {
        name: (t.dtype, t.shape, t.num_bytes) for name, t in drawn.items()
    }


def test_tensors_on_paper_do_not_overlap() -> None:
    tensors = sorted(paper_tensors(tiny_config()).values(), key=lambda tensor: tensor.offset)
    for one, other in pairwise(tensors):
        assert one.offset + one.num_bytes <= other.offset


@pytest.mark.parametrize("bits", [4, 8])
def test_a_form_on_paper_has_the_bytes_of_the_file_that_would_be_made(tmp_path, bits) -> None:
    config, codec = tiny_config(), Codec(bits=bits, group_size=32)
    cache = FormCache(tmp_path, paper_tensors(config), lambda: "identity")
    form_of = paper_forms(config)
    for spec in filter(is_shared, model_tensors(config)):
        real, paper = cache.locate(spec.name, codec), form_of(spec.name, codec)
        assert (paper.num_bytes, paper.offset, paper.dtype) == (
            real.num_bytes,
            real.offset,
            real.dtype,
        )
        assert paper.new_bytes == real.new_bytes == real.file_bytes


def test_a_shape_needs_no_weights_and_a_checkpoint_gives_its_own(
    hf_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory, hf_config = find_shape(hf_checkpoint("llama3", dtype="float16"))
    config = read_config(hf_config)
    assert {t.path.parent for t in tensors_of(directory, config).values()} == {directory}
    bare = tmp_path / "bare"
    bare.mkdir()
    assert tensors_of(bare, config) == tensors_of(None, config) == paper_tensors(config)


def test_a_checkpoint_without_a_tensor_is_refused(hf_checkpoint: Callable[..., Path]) -> None:
    directory, hf_config = find_shape(hf_checkpoint("llama3"))
    deeper = read_config({**hf_config, "num_hidden_layers": 9, "layer_types": None})
    with pytest.raises(ModelError, match=r"has no tensor model\.layers\."):
        tensors_of(directory, deeper)
