"""What a machine can do: rates, overheads and memory, measured or taken from data sheets.

One form for both. `flexpipe profile` writes it, the files in policies/hardware hold it for machines
one may not sit at, and the cost model reads nothing else. A file is YAML whose numbers carry their
units; every curve maps a size to the rate at that size. Whatever a file leaves out that only some
policies need (a dtype, a compression) is an error when such a policy is priced, not before.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flexpipe.errors import FlexpipeError, InputError, PolicyError
from flexpipe.plan.tier import Tier
from flexpipe.policy.curve import Curve, Surface
from flexpipe.schedule.simulate import Pace
from flexpipe.units import (
    format_bytes,
    format_flops,
    format_items,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_flops,
    parse_items,
    parse_rate,
    parse_seconds,
)

PROFILES = Path("~/.cache/flexpipe/profiles")  # the measured ones, a file per machine
PROFILE_VARIABLE = "FLEXPIPE_PROFILE"  # names the one to use instead

LINKS = ("h2d", "d2h", "disk_read", "disk_write", "comm")  # the last one to another rank
ACTIVITIES = ("compute", "compute_few", "attend", "copy", "disk_read", "disk_write", "calls")
FEW_ROWS = 24  # with fewer a product waits for its weight, and so for memory
NARROW_HEAD = 64  # heads up to this attend to prompts at rates of their own
OVERHEADS = (
    "layer",  # a decoder layer's compute op, beside its work
    "group",  # in one, each further group of rows that attend together
    "embed",  # the op that embeds, which makes what the step's layers share
    "embed_row",  # the same, per row
    "other",  # any other compute op, and sampling
    "move",  # a move over a host link
    "copy",  # each further piece of one
    "read",  # reading so little from the disk that only its latency counts
    "read_span",  # each further piece of a scattered read
    "write",  # the same of writes
    "write_span",
    "disk_cache",  # a KV cache's move from or to the disk, beside its bytes
    "disk_cache_row",  # the same, per row
    "first",  # a product's first time with so many rows, for which a kernel is made
    "dispatch",  # the interpreter's time that the dispatcher takes for an op, beside the lanes
    "turn",  # from an op's end to the start of the next one on its lane
    "hop",  # from an op's end to the start of one on another lane that waits for it
    "kernels",  # compiling what a CPU computes with, beside loading
    "commit",  # making tokens known
    "commit_row",  # the same, per row
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one compute device does per second.

    Of products: FLOPs by the weight's elements and the rows that meet it, per compute dtype;
    those of a weight that stays at home may be `packed`, and `converted` are those of a weight
    that is converted or widened on the way, slice by slice, which their time includes
    ("bfloat16>float32", "4>bfloat16"). Of attention: FLOPs of new
    tokens by the new tokens per row ("float32/64" are those of narrow heads), bytes of KV cache for
    decoding rows by the bytes of one call, of a compressed cache under "4>float32" (and FLOPs where
    many query heads share a head of the cache). Numbers per second for what goes over them once:
    norms (`elementwise`), rotary positions and the gate of an MLP by their count (the latter two as
    norms where nothing is known of them), conversion "from>to", compressed weights widened
    "4>bfloat16", new keys and values compressed to so many bits, logits sampled from.
    """

    matmul: Mapping[str, Surface]
    packed: Mapping[str, Surface] = field(default_factory=dict)
    converted: Mapping[str, Surface] = field(default_factory=dict)
    prefill_attention: Mapping[str, Curve] = field(default_factory=dict)
    decode_attention: Mapping[str, Curve] = field(default_factory=dict)
    decode_attention_flops: Mapping[str, float] = field(default_factory=dict)
    elementwise: Mapping[str, Curve] = field(default_factory=dict)
    rotary: Mapping[str, Curve] = field(default_factory=dict)
    gating: Mapping[str, Curve] = field(default_factory=dict)
    convert: Mapping[str, float] = field(default_factory=dict)
    widen: Mapping[str, float] = field(default_factory=dict)
    compress: Mapping[str, float] = field(default_factory=dict)
    sample: Mapping[str, float] = field(default_factory=dict)


def prefill_kind(dtype: str, head_dim: int) -> str:
    """Which of `Rates.prefill_attention` is that of such heads."""
    return dtype if head_dim > NARROW_HEAD else f"{dtype}/{NARROW_HEAD}"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A machine: memory it can give, links, rates of the device and of the CPU beside it.

    `links` are bytes per second by the bytes moved at once, as the engine moves them; `comm` is
    what a message to another rank gets, its start included, and may be missing. `details`
    are further measurements for people (buffered reads, other depths), which the cost model
    does not read but for `h2d_pageable` and `d2h_pageable`, where host memory is not page-
    locked. `slowdown["compute", "disk_read"]` is how much longer compute takes while the disk
    is read, "compute_few" what does with fewer than `FEW_ROWS` rows, where that is known apart,
    "calls" what lanes do beside their work, in the one interpreter that they share with the
    dispatcher; a pair that is absent does not disturb. `wake_s` is what a lane that computes takes
    to wake, by the seconds in which nothing came to it; between two it is straight. `load` is
    numbers per second that loading converts and packs, per dtype at home, and bytes per second of
    tensors that it can "read" at most, and of "pools" taken. `machine` and `mount` say where it was
    measured.
    """

    name: str
    date: str
    source: str
    device: str
    memory: Mapping[Tier, int]
    links: Mapping[str, Curve]
    compute: Rates
    host: Rates | None = None  # of the CPU beside an accelerator, for attention there
    overhead_s: Mapping[str, float] = field(default_factory=dict)
    slowdown: Mapping[tuple[str, str], float] = field(default_factory=dict)
    wake_s: Mapping[float, float] = field(default_factory=dict)
    load: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Curve] = field(default_factory=dict)
    threads: int = 1
    quick: bool = False
    machine: str = ""
    mount: str = ""

    @property
    def title(self) -> str:
        """What policies found with it name it by."""
        return f"{self.name}, {self.source} {self.date}"

    @property
    def is_cpu(self) -> bool:
        """Whether layers run on the CPU itself, so that there is no gpu tier."""
        return self.device == "cpu"

    @property
    def on_host(self) -> Rates:
        """Of the CPU beside the device, or of the device where it is the CPU."""
        return self.host or self.compute

    def lacking(self, what: str, key: str) -> PolicyError:
        """The error of whoever needs a figure that is not there."""
        return PolicyError(
            f"the profile {self.name} has no {what} for {key}, which this policy needs; "
            "measure it with flexpipe profile, or add it to the hardware file"
        )

    def overhead(self, what: str) -> float:
        return self.overhead_s.get(what, 0.0)

    def computing(self, rows: int) -> str:
        """The activity that computing with so many rows is."""
        return "compute_few" if rows < FEW_ROWS and self._knows_few else "compute"

    @cached_property
    def pace(self) -> Pace:
        """How the lanes of a rank that runs here get along."""
        idle_s = sorted(self.wake_s)
        return Pace(
            slowdown=self.slowdown,
            turn_s=self.overhead("turn"),
            hop_s=self.overhead("hop"),
            wake_s=partial(_between, (0.0, *idle_s), (0.0, *(self.wake_s[at] for at in idle_s))),
            dispatch_s=self.overhead("dispatch"),
        )

    @cached_property
    def _knows_few(self) -> bool:
        return any("compute_few" in pair for pair in self.slowdown)


def _between(sizes: Sequence[float], values: Sequence[float], at: float) -> float:
    return float(np.interp(at, sizes, values))


def read_profile(path: Path) -> Profile:
    """A hardware description; a PolicyError says which key cannot be read and why."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"cannot read the hardware file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    try:
        return parse_profile(content)
    except FlexpipeError as error:
        raise PolicyError(f"{path}: {error}") from error


def parse_profile(content: Any) -> Profile:
    """A profile from what a YAML file holds."""
    values = _known(content, "", tuple(item.name for item in fields(Profile)))
    missing = [
        name for name in ("name", "device", "memory", "links", "compute") if not values.get(name)
    ]
    if missing:
        raise PolicyError(f"a hardware description needs {', '.join(missing)}")
    memory = _known(values["memory"], "memory", tuple(tier.value for tier in Tier))
    links = _known(values["links"], "links", LINKS)
    lacking = [name for name in LINKS if name not in links and name.startswith("disk")]
    lacking += [name for name in ("h2d", "d2h") if name not in links and values["device"] != "cpu"]
    if lacking:
        raise PolicyError(f"links needs {', '.join(lacking)}")
    overheads = _known(values.get("overhead_s") or {}, "overhead_s", OVERHEADS)
    host = values.get("host")
    return Profile(
        name=str(values["name"]),
        date=str(values.get("date", "")),
        source=str(values.get("source", "")),
        device=str(values["device"]),
        memory={
            Tier(tier): _item(parse_bytes, f"memory.{tier}", size) for tier, size in memory.items()
        },
        links={
            name: _curve(f"links.{name}", item, parse_rate, parse_bytes)
            for name, item in links.items()
        },
        compute=_rates("compute", values["compute"]),
        host=_rates("host", host) if host else None,
        overhead_s={
            name: _item(parse_seconds, f"overhead_s.{name}", item)
            for name, item in overheads.items()
        },
        slowdown=_slowdown(values.get("slowdown") or {}),
        wake_s={
            _item(parse_seconds, "wake_s", idle): _item(parse_seconds, f"wake_s.{idle}", item)
            for idle, item in _known(values.get("wake_s") or {}, "wake_s").items()
        },
        load=_map("load", values.get("load") or {}, parse_items),
        details={
            str(name): _curve(f"details.{name}", item, parse_rate, parse_bytes)
            for name, item in _known(values.get("details") or {}, "details").items()
        },
        threads=_count_of("threads", values.get("threads", 1)),
        quick=bool(values.get("quick", False)),
        machine=str(values.get("machine", "")),
        mount=str(values.get("mount", "")),
    )


def _rates(where: str, content: Any) -> Rates:
    values = _known(content, where, tuple(item.name for item in fields(Rates)))
    if not values.get("matmul"):
        raise PolicyError(f"{where} needs matmul")
    read: dict[str, Any] = {}
    for name, item in values.items():
        if name in ("matmul", "packed", "converted"):
            read[name] = {
                str(dtype): _surface(f"{where}.{name}.{dtype}", some)
                for dtype, some in _known(item, f"{where}.{name}").items()
            }
        elif name in _CURVE_UNITS:
            unit = _CURVE_UNITS[name]
            read[name] = {
                str(dtype): _curve(f"{where}.{name}.{dtype}", some, *unit)
                for dtype, some in _known(item, f"{where}.{name}").items()
            }
        else:
            unit_of = parse_flops if name == "decode_attention_flops" else parse_items
            read[name] = _map(f"{where}.{name}", item, unit_of)
    return Rates(**read)


def _surface(where: str, content: Any) -> Surface:
    """Rates by rows at weights of some elements; one curve where the weight's size is all one."""
    values = _known(content, where)
    if not values:
        raise PolicyError(f"{where} is empty")
    if not all(isinstance(item, dict) for item in values.values()):
        return Surface.of({1.0: _curve(where, values, parse_flops, float)})
    return Surface.of(
        {
            _item(parse_items, where, size): _curve(f"{where}.{size}", item, parse_flops, float)
            for size, item in values.items()
        }
    )


def _curve(
    where: str,
    content: Any,
    rate: Callable[[str], float],
    size: Callable[[Any], float],
) -> Curve:
    if not isinstance(content, dict):
        return Curve.flat(_item(rate, where, content))
    points = {
        _item(size, where, key): _item(rate, f"{where}.{key}", item)
        for key, item in content.items()
    }
    try:
        return Curve.of(points)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def _map(where: str, content: Any, read: Callable[[str], float]) -> dict[str, float]:
    return {
        str(key): _item(read, f"{where}.{key}", item)
        for key, item in _known(content, where).items()
    }


def _count_of(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PolicyError(f"{where} must be a whole number from 1, got {value!r}")
    return value


def _slowdown(content: Any) -> dict[tuple[str, str], float]:
    read = {}
    for one, others in _known(content, "slowdown", ACTIVITIES).items():
        for other, factor in _known(others, f"slowdown.{one}", ACTIVITIES).items():
            if not isinstance(factor, int | float) or factor < 1:
                raise PolicyError(f"slowdown.{one}.{other} is a factor from 1, got {factor!r}")
            read[one, other] = float(factor)
    return read


def _known(content: Any, where: str, names: tuple[str, ...] | None = None) -> dict[Any, Any]:
    """A mapping whose keys are all among `names`."""
    if not isinstance(content, dict):
        raise PolicyError(f"{where or 'a hardware description'} must be a mapping, got {content!r}")
    for key in content if names is not None else ():
        assert names is not None
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise PolicyError(f"unknown key {f'{where}.' if where else ''}{key}; {hint}")
    return content


def _item(read: Callable[[Any], float], where: str, value: Any) -> Any:
    try:
        number = read(value)
    except (InputError, TypeError, ValueError) as error:
        raise PolicyError(f"{where}: {error}") from None
    if number <= 0 and read is not parse_bytes and read is not parse_seconds:
        raise PolicyError(f"{where} must be positive, got {value!r}")
    return number


_CURVE_UNITS: Mapping[str, tuple[Callable[[str], float], Callable[[Any], float]]] = {
    "prefill_attention": (parse_flops, float),
    "decode_attention": (parse_rate, parse_bytes),
    "elementwise": (parse_items, parse_items),
    "rotary": (parse_items, parse_items),
    "gating": (parse_items, parse_items),
}


def render_profile(profile: Profile) -> str:
    """The profile as a YAML file with comments, which `parse_profile` reads."""
    lines = [
        f"# {profile.name}: {profile.source}, {profile.date}.",
        "# Curves map a size to the rate there; flexpipe/policy/profile.py tells what each key is.",
    ]
    for name in ("name", "date", "source", "device", "machine", "mount", "threads", "quick"):
        value = getattr(profile, name)
        if value != "":
            lines.append(f"{name}: {_scalar(value)}")
    lines += ["", "# bytes that a run may use"]
    sizes = ", ".join(
        f"{tier.value}: {format_bytes(size)}" for tier, size in profile.memory.items()
    )
    lines += [f"memory: {{{sizes}}}", "", "# by the bytes moved at once", "links:"]
    lines += [f"  {name}: {_bytes_curve(curve)}" for name, curve in profile.links.items()]
    lines += ["", "# what the device computes", "compute:", *_rates_lines(profile.compute)]
    if profile.host is not None:
        lines += ["", "# the same of the CPU beside it", "host:", *_rates_lines(profile.host)]
    if profile.overhead_s:
        lines += ["", "# what an op costs beside its work", "overhead_s:"]
        lines += [f"  {name}: {format_seconds(s)}" for name, s in profile.overhead_s.items()]
    if profile.slowdown:
        lines += ["", "# how much longer one takes beside the other", "slowdown:"]
        for one in ACTIVITIES:
            others = {b: factor for (a, b), factor in profile.slowdown.items() if a == one}
            if others:
                pairs = ", ".join(f"{other}: {factor:.2f}" for other, factor in others.items())
                lines.append(f"  {one}: {{{pairs}}}")
    if profile.wake_s:
        waking = [(format_seconds(idle), format_seconds(s)) for idle, s in profile.wake_s.items()]
        pairs = ", ".join(f"{idle}: {s}" for idle, s in waking)
        lines += ["", "# what a lane takes to wake and compute, by how long it was idle"]
        lines += [f"wake_s: {{{pairs}}}"]
    if profile.load:
        lines += ["", "# numbers brought home while loading, by their dtype there", "load:"]
        lines += [f"  {key}: {format_items(rate)}" for key, rate in profile.load.items()]
    if profile.details:
        lines += ["", "# further measurements", "details:"]
        lines += [f"  {name}: {_bytes_curve(curve)}" for name, curve in profile.details.items()]
    return "\n".join(lines) + "\n"


def _rates_lines(rates: Rates) -> list[str]:
    lines = []
    for name, what in (
        ("matmul", "products: by the weight's elements, then by the rows that meet it"),
        ("packed", "the same with weights in the kernels' own layout"),
        ("converted", "the same with weights that are converted on the way, slice by slice"),
    ):
        surfaces: Mapping[str, Surface] = getattr(rates, name)
        if surfaces:
            lines += [f"  # {what}", f"  {name}:"]
        for dtype, surface in surfaces.items():
            lines.append(f"    {_scalar(dtype)}:")
            for size, curve in zip(surface.sizes, surface.curves, strict=True):
                lines.append(f"      {_count(size)}: {_points(curve, _number, format_flops)}")
    curves: tuple[tuple[str, str, Any, Any], ...] = (
        ("prefill_attention", "by new tokens per row", _number, format_flops),
        ("decode_attention", "KV cache read, by the bytes of one call", format_bytes, format_rate),
        ("elementwise", "numbers normed, by their count", _count, format_items),
        ("rotary", "numbers of queries and keys turned, by their count", _count, format_items),
        ("gating", "numbers gated, by their count", _count, format_items),
    )
    for name, what, size_of, rate_of in curves:
        if getattr(rates, name):
            lines += [f"  # {what}", f"  {name}:"]
        for dtype, curve in getattr(rates, name).items():
            lines.append(f"    {dtype}: {_points(curve, size_of, rate_of)}")
    for name in ("decode_attention_flops", "convert", "widen", "compress", "sample"):
        some: Mapping[str, float] = getattr(rates, name)
        shown = format_flops if name == "decode_attention_flops" else format_items
        if some:
            lines.append(f"  {name}:")
            lines += [f"    {_scalar(key)}: {shown(rate)}" for key, rate in some.items()]
    return lines


def _bytes_curve(curve: Curve) -> str:
    return _points(curve, format_bytes, format_rate)


def _points(curve: Curve, size_of: Callable[[float], str], rate_of: Callable[[float], str]) -> str:
    if len(curve.sizes) == 1:
        return rate_of(curve.rates[0])
    pairs = zip(curve.sizes, curve.rates, strict=True)
    return "{" + ", ".join(f"{size_of(size)}: {rate_of(rate)}" for size, rate in pairs) + "}"


def _number(value: float) -> str:
    return f"{value:g}"


def _count(value: float) -> str:
    return format_items(value).removesuffix("/s").strip()


def _scalar(value: object) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return dumped.removesuffix("...\n").strip()
