"""flexpipe: batch inference for language models that are bigger than the accelerator."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpipe.api import LLM, CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

# How long threads of a team spin before they sleep, in turns of some 0.1 us; OpenMP reads it when
# torch is first imported. One that is woken may find itself on the core where the one that woke it
# spins, and waits for it: with GCC's 300,000 turns a small product after 20 idle milliseconds took
# 11 ms, with these 1.3. They still bridge what a lane may wait for the interpreter within a layer.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def __getattr__(name: str) -> Any:
    """The Python interface, loaded when it is first asked for: `flexpipe --help` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flexpipe import api

    return getattr(api, name)
