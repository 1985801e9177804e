"""A policy as a file that people read, copy and change: every knob with what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml

from flexpipe.plan.policy import Policy, Shares
from flexpipe.units import GIB, MIB

_MEANINGS: Mapping[str, str] = {
    "weights": "shares of the weights by where they rest",
    "kv_cache": "shares of the rows by where their keys and values rest",
    "hidden": "shares of the micro-batches by where their hidden states rest between layers",
    "micro_batch_size": "rows that pass through a layer together",
    "num_micro_batches": "micro-batches that share one load of a layer's weights",
    "strategy": "what may overlap: none, single, multi, event",
    "separate_layers": "attention and MLP as layers of their own: smaller slots, more ops",
    "pin_weights": "page-lock the host memory that an accelerator copies from",
    "prefetch_depth": "streamed layers whose weights are loaded ahead",
    "compute_dtype": "what layers compute in",
    "resident_dtype": "what weights beside the device are held in: compute or checkpoint",
    "compress_weight": "bits of the layers' matrices; lossy",
    "compress_vocabulary": "bits of the embedding and the head; lossy",
    "compress_cache": "bits of keys and values; lossy",
    "compress_group": "neighbours that share a scale when compressed",
    "cpu_attention": "decoding rows whose keys and values rest on cpu attend there",
    "max_batch_tokens": "most new tokens of a micro-batch in one step",
    "gpu_mem": "budgets in bytes; null is what is free",
    "cpu_mem": "",
    "disk_mem": "",
}


def render_policy(policy: Policy, opening: Sequence[str]) -> str:
    """The policy as YAML that `read_policy_file` reads, under the lines of `opening`."""
    width = max(map(len, _MEANINGS)) + 2
    lines = [f"# {line}".rstrip() for line in opening]
    for item in fields(Policy):
        value = f"{item.name + ':':<{width}}{_value(getattr(policy, item.name))}"
        meaning = _MEANINGS[item.name]
        lines.append(f"{value:<{width + 32}}  # {meaning}" if meaning else value)
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Shares):
        return "{" + ", ".join(f"{tier}: {value.of(tier):.9g}" for tier in value.tiers) + "}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIB:
        for size, unit in ((GIB, "GiB"), (MIB, "MiB")):
            if value % size == 0:
                return f"{value // size}{unit}"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
