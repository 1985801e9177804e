"""Choosing the next token from logits.

A row without a draw takes its likeliest token. A draw is one uniform number against the cumulated
probabilities of the tokens that temperature, top-k and top-p leave; the number depends on (seed,
request id, position) alone, so that batch size, order and placement never show in samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexpipe.model.draw import Draw

SAMPLE_ELEMENTS = 1 << 19  # logits sampled at a time: bounds what sorting takes beside the plan


def choose(logits_RV: Tensor, draws: Sequence[Draw | None]) -> tuple[Tensor, Tensor]:
    """The next token of each row, [R] int64, and whether all its logits are finite, [R] bool.

    A row that is not finite has no meaningful token; the caller fails its request.
    """
    tokens_R, finite_R = greedy(logits_RV)
    drawn = [(row, draw) for row, draw in enumerate(draws) if draw is not None]
    step = max(1, SAMPLE_ELEMENTS // logits_RV.shape[1])
    for first in range(0, len(drawn), step):
        rows, some = zip(*drawn[first : first + step], strict=True)
        index = torch.tensor(rows, device=logits_RV.device)
        tokens_R[index] = _sample(logits_RV[index], some)
    return tokens_R, finite_R


def greedy(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, and whether all its logits are finite."""
    lowest_R, highest_R = torch.aminmax(logits_RV, dim=-1)  # both carry a NaN on
    return logits_RV.argmax(-1), torch.isfinite(lowest_R) & torch.isfinite(highest_R)


def _sample(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Inverse of the cumulated probabilities, in float64: V terms add up without visible error."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device).unsqueeze(1)

    size = logits_RV.shape[1]
    scaled_RV = logits_RV.double() / column([draw.temperature for draw in draws])
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    probability_RV = sorted_RV.softmax(-1)
    rank_V = torch.arange(size, device=logits_RV.device)
    kept_RV = rank_V < column([float(draw.top_k or size) for draw in draws])
    probability_RV *= kept_RV
    probability_RV /= probability_RV.sum(-1, keepdim=True)
    # a token stays while those before it do not reach top-p: the first one always does
    before_RV = probability_RV.cumsum(-1) - probability_RV
    probability_RV *= before_RV < column([draw.top_p for draw in draws])
    total_RV = probability_RV.cumsum(-1)
    target_R1 = column([draw.uniform for draw in draws]) * total_RV[:, -1:]
    place_R1 = torch.searchsorted(total_RV, target_R1, right=True)
    last_R1 = (probability_RV > 0).sum(-1, keepdim=True) - 1  # rounding must not reach what is cut
    return order_RV.gather(1, torch.minimum(place_R1, last_R1).clamp_(min=0)).squeeze(1)
