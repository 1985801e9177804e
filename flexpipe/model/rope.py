"""Rotary frequencies (arXiv 2104.09864) and the ways models stretch them over longer contexts.

Computed in float32 in the order the reference implementation computes them: a frequency that is
one bit off turns a key at position 100,000 by a visible angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexpipe.model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position for each of the head_dim / 2 pairs."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.kind:
        case "default":
            return 1.0 / powers
        case "linear":
            return 1.0 / powers / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / powers)
        case "yarn":
            return _yarn(rope, powers, head_dim)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended."""
    assert rope.original_max_positions is not None
    original, low, high = rope.original_max_positions, rope.low_freq_factor, rope.high_freq_factor
    waves = 2 * math.pi / frequencies
    blend = (original / waves - low) / (high - low)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    stretched = torch.where(waves > original / low, frequencies / rope.factor, blended)
    return torch.where(waves < original / high, frequencies, stretched)


def _yarn(rope: RopeConfig, powers: Tensor, head_dim: int) -> Tensor:
    """arXiv 2309.00071: what turns often stays, what turns slowly is stretched, a ramp between."""
    low = _turning_dim(rope, rope.beta_fast, head_dim)
    high = _turning_dim(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _turning_dim(rope: RopeConfig, num_turns: float, head_dim: int) -> float:
    """The dimension that turns `num_turns` times over the original context."""
    assert rope.original_max_positions is not None
    wave = rope.original_max_positions / (num_turns * 2 * math.pi)
    return head_dim * math.log(wave) / (2 * math.log(rope.theta))
