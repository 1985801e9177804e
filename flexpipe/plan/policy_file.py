"""A policy as a file that people read, copy and change: every knob with what it means.

It may say what it was `made_for`, so that it is not taken for another model by mistake; the knobs
it leaves out are for the search to find. Under `stages` each stage of a pipeline may have its
number of layers, and knobs of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
# knobs that decide what passes from stage to stage, or when: the same for all
COMMON = ("micro_batch_size", "num_micro_batches", "max_batch_tokens", "strategy", "compute_dtype")


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
class StageKnobs:
    """What a policy file says of one stage: knobs of its own, and its layers, by virtual stage."""

    knobs: Mapping[str, Any]
    layers: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, index: int, content: Any) -> StageKnobs:
        where = f"stages[{index}]"
        if not isinstance(content, dict):
            raise PolicyError(f"{where} must map field names to values, got {content!r}")
        common = [name for name in COMMON if name in content]
        if common:
            raise PolicyError(
                f"{where}.{common[0]} is the same for all stages; give it once, above"
            )
        try:
            knobs = {name: knob(name, value) for name, value in content.items() if name != "layers"}
        except FlexpipeError as error:
            raise PolicyError(f"{where}: {error}") from error
        return cls(knobs=knobs, layers=_layers(where, content.get("layers")))


def _layers(where: str, content: Any) -> tuple[int, ...] | None:
    """One number, or one per virtual stage."""
    if content is None:
        return None
    layers = tuple(content) if isinstance(content, list) else (content,)
    if not layers or not all(type(count) is int and count > 0 for count in layers):
        raise PolicyError(f"{where}.layers is a whole number from 1, or a list, got {content!r}")
    return layers


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFile:
    """What a policy file gives, checked one by one; the rest is left to the search."""

    knobs: Mapping[str, Any]
    made_for: MadeFor | None = None
    stages: tuple[StageKnobs, ...] = ()

    @property
    def cut(self) -> tuple[int, ...] | None:
        """Layers of each virtual stage, in the order hidden passes them; None where some stage does
        not say."""
        layers = [stage.layers for stage in self.stages]
        known = [counts for counts in layers if counts is not None]
        if not known or len(known) < len(layers) or len(set(map(len, known))) > 1:
            return None
        return tuple(count for counts in zip(*known, strict=True) for count in counts)

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
            if name not in ("made_for", "stages")
        }
        made_for, stages = content.get("made_for"), content.get("stages") or []
        if not isinstance(stages, list):
            raise PolicyError(f"stages is a list, one item per stage, got {stages!r}")
        return cls(
            knobs=knobs,
            made_for=None if made_for is None else MadeFor.parse(made_for),
            stages=tuple(StageKnobs.parse(index, item) for index, item in enumerate(stages)),
        )


def render_policy(policy: Policy, made_for: MadeFor, opening: Sequence[str]) -> str:
    """The policy as YAML that `PolicyFile` reads, under the lines of `opening`."""
    names = [item.name for item in fields(Policy)]
    return "\n".join([*_opening(made_for, opening), *_knob_lines(policy, names)]) + "\n"


def render_stages(
    policies: Sequence[Policy],
    layers: Sequence[Sequence[int]],
    made_for: MadeFor,
    opening: Sequence[str],
) -> str:
    """The same of a pipeline: what all stages have in common, then what each has of its own, its
    layers by virtual stage first."""
    names = [item.name for item in fields(Policy)]
    own = [name for name in names if any(_differ(policies, name))]
    lines = _knob_lines(policies[0], [name for name in names if name not in own])
    lines += ["", "stages:  # in the order that hidden passes them"]
    for policy, counts in zip(policies, layers, strict=True):
        lines.append(f"  - layers: {counts[0] if len(counts) == 1 else _flow([*counts])}")
        lines += [f"    {name}: {_value(getattr(policy, name))}" for name in own]
    return "\n".join([*_opening(made_for, opening), *lines]) + "\n"


def _differ(policies: Sequence[Policy], name: str) -> Iterator[bool]:
    first = getattr(policies[0], name)
    return (getattr(policy, name) != first for policy in policies)


def _opening(made_for: MadeFor, opening: Sequence[str]) -> list[str]:
    lines = [f"# {line}".rstrip() for line in opening]
    width = max(map(len, _MEANINGS)) + 2
    what = f"{'made_for:':<{width}}{_flow(asdict(made_for))}"
    return [*lines, f"{what}  # for others, take this line out"]


def _knob_lines(policy: Policy, names: Sequence[str]) -> list[str]:
    width, lines = max(map(len, _MEANINGS)) + 2, []
    for name in names:
        value = f"{name + ':':<{width}}{_value(getattr(policy, name))}"
        meaning = _MEANINGS[name]
        lines.append(f"{value:<{width + 32}}  # {meaning}" if meaning else value)
    return lines


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
