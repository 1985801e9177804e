"""What all tests share: where the checkout is, how hypothesis searches, how many threads torch
has, which machine plans are made for.

Nothing here imports torch, so the tests of the rooms without it stay quick.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

REPO = Path(__file__).resolve().parent.parent

pytest_plugins = [
    f"tests.{name}" for name in ("hf", "warm") if (REPO / "tests" / f"{name}.py").is_file()
]

# the same examples on every machine; how long one takes says nothing about it
hypothesis.settings.register_profile(
    "claims", derandomize=True, deadline=None, print_blob=True, database=None, max_examples=40
)
# `bin/test --hypothesis-profile thorough`: more of them wherever a test does not say how many
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("claims"), max_examples=500
)
hypothesis.settings.load_profile("claims")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny models gain nothing from a second thread, and the workers of `pytest -n` have work for every
# core; children inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what a shell starts in the background ignores Ctrl-C, and so would the runs that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
# as `flexpipe run` has it: torch tells of every wait in its store, with a look at the name server
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# nothing here, nor in a child, measures the machine it runs on
os.environ["FLEXPIPE_PROFILE"] = str(REPO / "tests/profile.yaml")


@pytest.fixture(scope="session")
def repo() -> Path:
    """Top of the checkout."""
    return REPO
