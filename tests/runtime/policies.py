"""Policies drawn for ranks of a pipeline, and of a stage: what is claimed holds of any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from flexpipe.plan.policy import STRATEGIES, percent_shares

ON_CPU = ([0, 100, 0, 100, 0, 100], [0, 50, 0, 50, 0, 50], [0, 0, 0, 0, 0, 0])


def placements(device: str, percents: Sequence[Sequence[int]]) -> st.SearchStrategy[Any]:
    """Shares of weights, KV cache and hidden; `percents` are those beside an accelerator."""
    return st.sampled_from(ON_CPU if device == "cpu" else percents).map(percent_shares)


@st.composite
def policies(draw: st.DrawFn, device: str, percents: Sequence[Sequence[int]]) -> Mapping[str, Any]:
    """Every knob that ranks have, for a model of a few layers and prompts of some tokens."""
    return {
        **draw(placements(device, percents)),
        "micro_batch_size": draw(st.sampled_from([1, 2])),
        "num_micro_batches": draw(st.sampled_from([1, 2, 3])),
        "strategy": draw(st.sampled_from(STRATEGIES)),
        "separate_layers": draw(st.booleans()),
        "prefetch_depth": draw(st.sampled_from([1, 2, 5])),
        "max_batch_tokens": draw(st.sampled_from([8, 64])),
        "cpu_attention": draw(st.booleans()),
    }
