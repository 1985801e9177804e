"""One tiny checkpoint and its prompts for all runs here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hf import Reference, shallow
from tests.runtime.jobs import Runner, Tokens

LENGTHS = (40, 9, 30, 20, 3, 12)  # a page of the KV cache holds 32 tokens
LIMITS = (5, 3, 4, 3, 3, 2)


@pytest.fixture(scope="session")
def reference(hf_reference: Callable[..., Reference]) -> Tokens:
    """What transformers answers to the prompts, cut where our runs are to stop."""
    answers = hf_reference("llama2", lengths=LENGTHS, max_new=max(LIMITS))
    return tuple(tokens[:limit] for tokens, limit in zip(answers.tokens, LIMITS, strict=True))


@pytest.fixture(scope="session")
def run(
    hf_checkpoint: Callable[..., Path],
    hf_reference: Callable[..., Reference],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runner:
    """`run(knobs, device=…, probes=…)`: the tiny model over the prompts."""
    prompts = hf_reference("llama2", lengths=LENGTHS, max_new=max(LIMITS)).prompts
    return Runner(hf_checkpoint("llama2"), tmp_path_factory.mktemp("runs"), prompts, LIMITS)


@pytest.fixture(scope="session")
def run_shallow(run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The same with the first two layers only."""
    folder = tmp_path_factory.mktemp("shallow")
    model = shallow(run.model, folder / "model", num_layers=2)
    return Runner(model, folder, run.prompts, run.max_tokens)
