"""The knobs, as asked.

A `Policy` is complete and legal in itself; whether it fits a machine is the plan's question. What a
user gave (options or a policy file) is a mapping from field names to values, `given`; the rule in
`flexpipe.plan.rule` fills in the rest. `OPTION_NAMES` is the one table between our field names and
the command line, which keeps FlexLLMGen's names where it has one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from flexpipe.errors import PolicyError
from flexpipe.plan.codec import Codec
from flexpipe.plan.tier import Tier
from flexpipe.units import parse_bytes

Strategy = Literal["none", "single", "multi", "event"]
ComputeDtype = Literal["auto", "float32", "float16", "bfloat16"]
ResidentDtype = Literal["compute", "checkpoint"]
Compression = Literal["none", "4", "8"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)
RESIDENT_DTYPES: tuple[ResidentDtype, ...] = get_args(ResidentDtype)
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

# field of Policy -> option of `flexpipe run`
OPTION_NAMES: Mapping[str, str] = {
    "weights": "--percent",
    "kv_cache": "--percent",
    "hidden": "--percent",
    "micro_batch_size": "--gpu-batch-size",
    "num_micro_batches": "--num-gpu-batches",
    "strategy": "--overlap",
    "separate_layers": "--sep-layer",
    "pin_weights": "--pin-weight",
    "prefetch_depth": "--prefetch-depth",
    "compute_dtype": "--dtype",
    "resident_dtype": "--resident-dtype",
    "compress_weight": "--compress-weight",
    "compress_vocabulary": "--compress-vocabulary",
    "compress_cache": "--compress-cache",
    "compress_group": "--compress-group",
    "cpu_attention": "--cpu-cache-compute",
    "max_batch_tokens": "--max-batch-tokens",
    "gpu_mem": "--gpu-mem",
    "cpu_mem": "--cpu-mem",
    "disk_mem": "--disk-mem",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """How much of one kind of tensor rests on each tier, as fractions of 1."""

    gpu: float = 0.0
    cpu: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        for tier in Tier:
            share = self.of(tier)
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise PolicyError(f"a share lies between 0 and 1, got {tier}: {share!r}")
        total = self.gpu + self.cpu + self.disk
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise PolicyError(f"shares must add up to 1, got {total:g} from {self}")

    def of(self, tier: Tier) -> float:
        share: float = getattr(self, tier.value)
        return share

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that are asked to hold something, fastest first."""
        return tuple(tier for tier in Tier if self.of(tier) > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How a run uses the machine: shares per tier, batch shape, overlap, dtypes, budgets.

    `micro_batch_size` is in rows, `num_micro_batches` counts the micro-batches of a block,
    `prefetch_depth` the streamed layers whose weights are loaded ahead, `max_batch_tokens` bounds
    the new tokens of one micro-batch in one step (prompts beyond it are prefilled in chunks).
    `resident_dtype` is what weights at home beside the compute device are held in: "compute" needs
    no conversion, "checkpoint" fewer bytes. The `compress_*` knobs are bits per number, in groups
    of `compress_group`: of the layers' matrices, of the embedding and head, of keys and values.
    With `cpu_attention` rows whose KV cache rests on the cpu tier attend there when they decode.
    Budgets are bytes; None takes what the machine has free.
    """

    weights: Shares = field(default_factory=lambda: Shares(cpu=1.0))
    kv_cache: Shares = field(default_factory=lambda: Shares(cpu=1.0))
    hidden: Shares = field(default_factory=lambda: Shares(cpu=1.0))
    micro_batch_size: int = 32
    num_micro_batches: int = 1
    strategy: Strategy = "event"
    separate_layers: bool = False
    pin_weights: bool = True
    prefetch_depth: int = 1
    compute_dtype: ComputeDtype = "auto"
    resident_dtype: ResidentDtype = "compute"
    compress_weight: Compression = "none"
    compress_vocabulary: Compression = "none"
    compress_cache: Compression = "none"
    compress_group: int = 64
    cpu_attention: bool = False
    max_batch_tokens: int = 2048
    gpu_mem: int | None = None
    cpu_mem: int | None = None
    disk_mem: int | None = None

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "num_micro_batches", "prefetch_depth", "max_batch_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PolicyError(f"{_spelled(name)} must be a whole number from 1, got {value!r}")
        _choice("strategy", self.strategy, STRATEGIES)
        _choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _choice("resident_dtype", self.resident_dtype, RESIDENT_DTYPES)
        for name in ("compress_weight", "compress_vocabulary", "compress_cache"):
            _choice(name, getattr(self, name), COMPRESSIONS)
        Codec(bits=4, group_size=self.compress_group)
        if self.micro_batch_size > self.max_batch_tokens:
            raise PolicyError(
                f"--gpu-batch-size {self.micro_batch_size} needs at least as many tokens a step, "
                f"but --max-batch-tokens is {self.max_batch_tokens}; raise it"
            )

    def budget(self, tier: Tier) -> int | None:
        """Bytes the user grants `tier`; None means what is free."""
        budget: int | None = getattr(self, f"{tier.value}_mem")
        return budget

    @property
    def weight_codec(self) -> Codec | None:
        return self._codec(self.compress_weight)

    @property
    def vocabulary_codec(self) -> Codec | None:
        """Of the embedding and the head."""
        return self._codec(self.compress_vocabulary)

    @property
    def cache_codec(self) -> Codec | None:
        return self._codec(self.compress_cache)

    def _codec(self, bits: Compression) -> Codec | None:
        return None if bits == "none" else Codec(bits=int(bits), group_size=self.compress_group)

    def check_device(self, device: str) -> None:
        """Refuse what `device` cannot do; on the CPU there is no gpu tier."""
        if device != "cpu":
            return
        for name in ("weights", "kv_cache", "hidden"):
            shares: Shares = getattr(self, name)
            if shares.gpu:
                raise PolicyError(
                    f"{name}.gpu is {shares.gpu:g}, but --device cpu has no gpu tier; "
                    "use --device emulated, or give that share to cpu"
                )
        if self.gpu_mem is not None:
            raise PolicyError("--gpu-mem needs a gpu tier; use --device emulated or drop it")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a policy file."""
        return asdict(self)


def percent_shares(percent: Sequence[float]) -> dict[str, Shares]:
    """FlexLLMGen's six numbers (weights, KV cache, hidden on gpu, cpu; the rest on disk)."""
    if len(percent) != 6:
        raise PolicyError(f"--percent takes six numbers, got {len(percent)}")
    shares = {}
    for index, name in enumerate(("weights", "kv_cache", "hidden")):
        gpu, cpu = percent[2 * index : 2 * index + 2]
        if gpu < 0 or cpu < 0 or gpu + cpu > 100 + 1e-9:
            raise PolicyError(
                f"--percent gives {name} {gpu:g} on gpu and {cpu:g} on cpu; "
                "both must be at least 0 and together at most 100"
            )
        disk = max(0.0, 100 - gpu - cpu)
        shares[name] = Shares(gpu=gpu / 100, cpu=cpu / 100, disk=disk / 100)
    return shares


def knob(name: str, value: Any) -> Any:
    """One field of a policy file as the value `Policy` takes."""
    known = [item.name for item in fields(Policy)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
        raise PolicyError(f"unknown field {name!r}{hint}")
    if name in ("weights", "kv_cache", "hidden"):
        return _shares(name, value)
    if name.endswith("_mem"):
        return None if value is None else parse_bytes(value)
    if name.startswith("compress_") and name != "compress_group":
        return "none" if value is None else str(value)
    if name in ("separate_layers", "pin_weights", "cpu_attention") and not isinstance(value, bool):
        raise PolicyError(f"{name} is true or false, got {value!r}")
    return value


def _shares(name: str, value: Any) -> Shares:
    if not isinstance(value, dict) or not set(value) <= {tier.value for tier in Tier}:
        raise PolicyError(f"{name} maps gpu, cpu and disk to fractions of 1, got {value!r}")
    return Shares(**value)


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PolicyError(f"{_spelled(name)} is one of {', '.join(known)}, got {value!r}")


def _spelled(name: str) -> str:
    return f"{name} ({OPTION_NAMES[name]})"
