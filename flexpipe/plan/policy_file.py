"""A policy as a file that people read, copy and change: every knob with what it means.

It may say what it was `made_for`, so that it is not taken for another model by mistake; the knobs
it leaves out are for the search to find.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from flexpipe.errors import FlexpipeError, PolicyError
from flexpipe.model.config import ModelConfig
from flexpipe.plan.policy import Policy, Shares, knob
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeFor:
    """The model a policy was found for: its name for people, its shape to tell it from others."""

    model: str
    num_layers: int
    hidden_size: int

    @classmethod
    def of(cls, model: str, config: ModelConfig) -> MadeFor:
        return cls(model=model, num_layers=config.num_layers, hidden_size=config.hidden_size)

    @classmethod
    def parse(cls, content: Any) -> MadeFor:
        names = [item.name for item in fields(cls)]
        if not isinstance(content, dict) or sorted(content) != sorted(names):
            raise PolicyError(f"made_for holds {', '.join(names)}, got {content!r}")
        return cls(**content)

    def check(self, model: str, config: ModelConfig) -> None:
        """Refuse a model of another shape."""
        other = MadeFor.of(model, config)
        if (self.num_layers, self.hidden_size) != (other.num_layers, other.hidden_size):
            raise PolicyError(
                f"the policy was made for {self}, and this is {other}; let flexpipe plan find one, "
                "or take made_for out of the file"
            )

    def __str__(self) -> str:
        return f"{self.model} ({self.num_layers} layers of {self.hidden_size})"


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFile:
    """What a policy file gives, checked one by one; the rest is left to the search."""

    knobs: Mapping[str, Any]
    made_for: MadeFor | None = None

    @classmethod
    def read(cls, path: Path) -> PolicyFile:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"cannot read the policy file {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise PolicyError(f"{path} is not a YAML file: {reason}") from error
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise PolicyError(f"{path} must map field names to values, found {kind}")
        try:
            return cls.of(content)
        except FlexpipeError as error:
            raise PolicyError(f"{path}: {error}") from error

    @classmethod
    def of(cls, content: Mapping[Any, Any]) -> PolicyFile:
        """From plain values, as YAML and JSON hold them."""
        knobs = {
            str(name): knob(str(name), value)
            for name, value in content.items()
            if name != "made_for"
        }
        made_for = content.get("made_for")
        return cls(knobs=knobs, made_for=None if made_for is None else MadeFor.parse(made_for))


def render_policy(policy: Policy, made_for: MadeFor, opening: Sequence[str]) -> str:
    """The policy as YAML that `PolicyFile` reads, under the lines of `opening`."""
    width = max(map(len, _MEANINGS)) + 2
    lines = [f"# {line}".rstrip() for line in opening]
    lines += [f"{'made_for:':<{width}}{_flow(asdict(made_for))}  # for others, take this line out"]
    for item in fields(Policy):
        value = f"{item.name + ':':<{width}}{_value(getattr(policy, item.name))}"
        meaning = _MEANINGS[item.name]
        lines.append(f"{value:<{width + 32}}  # {meaning}" if meaning else value)
    return "\n".join(lines) + "\n"


def write_whole(path: Path, text: str) -> None:
    """All of the file or nothing of it, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}-", encoding="utf-8", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _value(value: Any) -> str:
    if isinstance(value, Shares):
        return _flow({tier.value: value.of(tier) for tier in value.tiers})
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIB:
        for size, unit in ((GIB, "GiB"), (MIB, "MiB")):
            if value % size == 0:
                return f"{value // size}{unit}"
    return _flow(value)


def _flow(value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return dumped.removesuffix("...\n").strip()
