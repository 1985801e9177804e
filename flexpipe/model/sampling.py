"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, and whether all its logits are finite.

    A row that is not finite has no meaningful token; the caller fails its request.
    """
    lowest_R, highest_R = torch.aminmax(logits_RV, dim=-1)  # both carry a NaN on
    return logits_RV.argmax(-1), torch.isfinite(lowest_R) & torch.isfinite(highest_R)
