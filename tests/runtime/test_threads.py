"""Threads of a run: the lanes, and one team of torch's for the compute lane."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexpipe.memory.disk import SCATTERED_IN_FLIGHT
from flexpipe.memory.dummy import dummy_tensors
from flexpipe.model.families import read_config
from flexpipe.schedule.op import PEER_LANES, Lane

NUM_THREADS = 4
# so large that torch converts and multiplies with all its threads
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> dict[int, dict[str, Any]]:
    """What a run told about its threads, with one thread for torch and with several."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(SHAPE))
    _save(model)
    return {number: _count(model, repo, number) for number in (1, NUM_THREADS)}


def _save(model: Path) -> None:
    """A checkpoint with a tensor for every name, from one drawn layer."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    tensors = {}
    drawn = dummy_tensors(read_config(SHAPE), cache_dir=model / "cache")
    for name, stored in drawn.items():
        raw = np.fromfile(stored.path, np.uint8, stored.num_bytes, offset=stored.offset)
        tensors[name] = torch.from_numpy(raw).view(torch.float16).view(stored.shape)
    save_file(tensors, model / "model.safetensors")


def _count(model: Path, repo: Path, number: int) -> dict[str, Any]:
    folder = model / f"runs-{number}"
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.thread_count", str(model), str(folder)],
        cwd=repo,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_run_has_its_lanes_and_few_helpers(counts):
    alone = counts[1]
    added = alone["peak"] - alone["before"]
    num_lanes = len(Lane) - len(PEER_LANES)  # of a rank that is alone
    assert num_lanes <= added <= num_lanes + SCATTERED_IN_FLIGHT


def test_any_number_of_threads_gives_the_same_tokens(counts):
    """The rest of the suite runs with one."""
    (one, again), several = counts[1]["tokens"], counts[NUM_THREADS]["tokens"]
    assert one == again and several == [one, one]
    assert len({token for answer in one for token in answer}) > 8


def test_there_is_one_team_of_torchs_threads(counts):
    """Loading, too, must not leave a second team behind: it would fight for the cores."""
    assert [counts[number]["team"] for number in (1, NUM_THREADS)] == [0, NUM_THREADS - 1]


def test_no_lane_and_no_team_outlives_the_run(counts):
    for count in counts.values():
        assert count["after"] - count["before"] <= SCATTERED_IN_FLIGHT


def test_only_the_compute_lane_uses_several_threads(counts):
    for lane, team in counts[NUM_THREADS]["teams"].items():
        assert set(team.values()) == {NUM_THREADS if lane == Lane.COMPUTE else 1}, lane
