"""What a CPU computes with, compiled while weights are loaded and not in the first step."""

from __future__ import annotations

import torch

from flexpipe.kernels import attend, codec, team
from flexpipe.model.config import ModelConfig
from flexpipe.plan.plan import Plan


def compile_kernels(plan: Plan, device: torch.device) -> None:
    """Every kernel that the plan's ops will ask for on the host, some tenths of a second each."""
    if not team.available():
        return
    config, dtype = plan.config, plan.compute_dtype
    on_cpu = device.type == "cpu"
    if on_cpu or plan.policy.cpu_attention:
        attend.compile_for(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            codec=plan.policy.cache_codec,
        )
    if on_cpu:
        _compile_widening(plan, config, dtype)


def _compile_widening(plan: Plan, config: ModelConfig, dtype: str) -> None:
    """Of compressed weights, and of a compressed cache that prompts attend to."""
    wanted = {
        (placed.codec, placed.spec.shape[1])
        for placed in plan.placement.tensors.values()
        if placed.codec is not None
    }
    if plan.policy.cache_codec is not None:
        wanted.add((plan.policy.cache_codec, config.head_dim))
    for one, size in wanted:
        codec.compile_for(one, size, dtype)
