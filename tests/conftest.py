"""What all tests share: where the checkout is, how hypothesis searches, how many threads torch
has, which machine plans are made for.

Nothing here imports torch, so the tests of the rooms without it stay quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

REPO = Path(__file__).resolve().parent.parent

pytest_plugins = [
    f"tests.{name}" for name in ("hf", "warm") if (REPO / "tests" / f"{name}.py").is_file()
]

# the same examples on every machine; how long one takes says nothing about it
hypothesis.settings.register_profile(
    "claims", derandomize=True, deadline=None, print_blob=True, database=None
)
hypothesis.settings.load_profile("claims")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# more threads than there are cores crawl; children inherit this
os.environ.setdefault("OMP_NUM_THREADS", "2")
# as `flexpipe run` has it: torch tells of every wait in its store, with a look at the name server
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# nothing here, nor in a child, measures the machine it runs on
os.environ["FLEXPIPE_PROFILE"] = str(REPO / "tests/profile.yaml")


@pytest.fixture(scope="session")
def repo() -> Path:
    """Top of the checkout."""
    return REPO


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Two threads for torch, once some test has imported it."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads") and torch.get_num_threads() > 2:
        torch.set_num_threads(2)
