"""What a point of a sweep may set: names, values as they are written, and the knobs they make.

A name is a field of `Policy`, one tier's part of a share (`weights.gpu`), FlexLLMGen's `percent`,
or a field of the workload. What could never be legal is refused here, by name. Values that only
contradict each other are read all the same; `knobs_of` then says why they cannot be.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from flexpipe.errors import FlexpipeError, InputError, PolicyError
from flexpipe.plan.policy import OPTION_NAMES, Policy, Shares, percent_shares
from flexpipe.plan.tier import Tier
from flexpipe.units import parse_bytes

WORKLOAD_NAMES = ("prompt_len", "gen_len", "num_prompts")
PERCENT = "percent"
MAX_VALUES = 10_000
_DIGITS = 9  # of a share: sums and ranges of floats would show their rounding

# name -> value: a number, a word, true or false, Shares, or the six numbers of `percent`
Settings: TypeAlias = Mapping[str, Any]
Reader: TypeAlias = Callable[[str], Any]


@functools.cache
def _readers() -> Mapping[str, Reader]:
    """How one value of each name is read, as `Policy` types it."""
    hints = get_type_hints(Policy)
    readers = {name: _reader(hint) for name, hint in hints.items()}
    for kind in share_kinds():
        readers |= {f"{kind}.{tier}": _share for tier in Tier}
    return {**readers, PERCENT: _percent, **dict.fromkeys(WORKLOAD_NAMES, _whole)}


def _reader(hint: Any) -> Reader:
    if get_origin(hint) is Literal:
        return functools.partial(_word, get_args(hint))
    return {int: _whole, bool: _switch, Shares: _shares, int | None: _size}[hint]


def share_kinds() -> tuple[str, ...]:
    """The kinds of tensor that a policy spreads over the tiers."""
    return tuple(name for name, hint in get_type_hints(Policy).items() if hint is Shares)


# FlexLLMGen's names, as on the command line: gpu_batch_size -> micro_batch_size
_OPTIONS = {
    option.lstrip("-").replace("-", "_"): name
    for name, option in OPTION_NAMES.items()
    if option != f"--{PERCENT}"
}


def setting_name(written: str) -> str:
    """The name that `written`, or an option spelled so, stands for."""
    name = written.strip().lstrip("-").replace("-", "_")
    known = _readers()
    name = _OPTIONS.get(name, name)
    if name in known:
        return name
    near = difflib.get_close_matches(name, [*known, *_OPTIONS], 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    raise InputError(f"cannot vary {written.strip()!r}; {hint}")


def read_value(name: str, text: str) -> Any:
    """One value of `name`."""
    with _about(name):
        return _readers()[name](text.strip())


def read_values(name: str, texts: Sequence[str]) -> tuple[Any, ...]:
    """The values of a list whose items may be ranges, each once."""
    reader = _readers()[name]
    values: dict[Any, None] = {}
    with _about(name):
        for text in map(str.strip, texts):
            is_range = ":" in text and reader in (_whole, _size, _share)
            values |= dict.fromkeys(_range(text, reader) if is_range else [reader(text)])
    return tuple(values)


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Put the name before what is wrong with its value."""
    try:
        yield
    except FlexpipeError as error:
        raise InputError(f"{name}: {error}") from None


def _range(text: str, reader: Reader) -> list[Any]:
    """START:STOP[:STEP], both ends within; a STEP of *N multiplies."""
    start_text, stop_text, *step_text = text.split(":")
    if len(step_text) > 1:
        raise InputError(f"{text!r} is no range; write START:STOP, START:STOP:STEP or 8:64:*2")
    start, stop = reader(start_text), reader(stop_text)
    grows = bool(step_text) and step_text[0].startswith("*")
    step = _number(step_text[0][1:]) if grows else reader(step_text[0]) if step_text else 1
    if None in (start, stop, step) or start > stop:
        raise InputError(f"{text!r} must rise from a number to a number")
    if step <= (1 if grows else 0) or (grows and not start):
        raise InputError(f"{text!r} never ends; the step must make it larger")
    values: list[Any] = []
    for count in range(MAX_VALUES):
        value = start * step**count if grows else start + step * count
        if value > stop * (1 + 1e-9):
            return values
        values.append(round(value, _DIGITS) if isinstance(start, float) else int(value))
    raise InputError(f"{text!r} has more than {MAX_VALUES} values; take larger steps")


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{text!r} is not a number")
    return number


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{text!r} is not a whole number from 1")
    return int(text)


def _share(text: str) -> float:
    share = _number(text)
    if not 0 <= share <= 1:
        raise InputError(f"a share lies between 0 and 1, got {text}")
    return share


def _size(text: str) -> int | None:
    return None if text == "none" else parse_bytes(text)


def _switch(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise InputError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def _word(known: Sequence[str], text: str) -> str:
    if text not in known:
        raise InputError(f"{text!r} is none of {', '.join(known)}")
    return text


def _shares(text: str) -> Shares:
    """`gpu:0.5/cpu:0.5`; tiers that are not named hold nothing."""
    parts = [part.partition(":") for part in text.split("/")]
    tiers = {tier.strip(): _share(share) for tier, _, share in parts if share}
    if len(tiers) != len(parts) or not set(tiers) <= {tier.value for tier in Tier}:
        raise InputError(f"shares are written like gpu:0.5/cpu:0.5, got {text!r}")
    return Shares(**tiers)


def _percent(text: str) -> tuple[float, ...]:
    """FlexLLMGen's six numbers, joined by slashes: `100/0/100/0/100/0`."""
    numbers = tuple(_number(part) for part in text.split("/"))
    percent_shares(numbers)
    return numbers


def knobs_of(settings: Settings, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Policy`: the fixed ones, replaced by those that a point sets.

    A PolicyError says which values contradict each other.
    """
    knobs = dict(fixed)
    parts: dict[str, dict[str, float]] = {}
    for name, value in settings.items():
        kind, dot, tier = name.partition(".")
        if name == PERCENT:
            knobs |= percent_shares(value)
        elif dot:
            parts.setdefault(kind, {})[tier] = value
        elif name not in WORKLOAD_NAMES:
            knobs[name] = value
    knobs |= {kind: _completed(kind, tiers) for kind, tiers in parts.items()}
    Policy(**knobs)
    return knobs


def _completed(kind: str, parts: Mapping[str, float]) -> Shares:
    """The rest lies on the next slower tier, or where none is slower, on the next faster one."""
    rest = round(1 - sum(parts.values()), _DIGITS)
    if rest < 0:
        given = " and ".join(f"{kind}.{tier}={share:g}" for tier, share in parts.items())
        raise PolicyError(f"{given} add up to {1 - rest:g}, more than 1")
    order = [tier.value for tier in Tier]
    slowest = max(map(order.index, parts))
    others = (*order[slowest + 1 :], *reversed(order[:slowest]))
    free = [tier for tier in others if tier not in parts]
    return Shares(**parts, **({free[0]: rest} if free else {}))


def plain(value: Any) -> Any:
    """A value as JSON and YAML hold it."""
    if isinstance(value, Shares):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """A value as it is written."""
    if isinstance(value, Shares):
        return "/".join(f"{tier}:{value.of(tier):g}" for tier in value.tiers)
    if isinstance(value, tuple):
        return "/".join(f"{number:g}" for number in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
