"""Numbers with units, in and out: sizes as users type them, quantities as people read them."""

from __future__ import annotations

import re

from flexpipe.errors import InputError

MIB = 2**20
GIB = 2**30

_SUFFIXES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
_NUMBER = r"[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?"
_FLOPS = re.compile(rf"({_NUMBER})\s*([KMGTP]?)(?:FLOPS?(?:/s)?)?", re.IGNORECASE)
_ITEMS = re.compile(rf"({_NUMBER})\s*([KMGT]?)(?:/s)?", re.IGNORECASE)
_SECONDS = re.compile(rf"({_NUMBER})\s*(ns|us|ms|s)")
_PREFIXES = ("", "K", "M", "G", "T", "P")
_SECOND_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def parse_bytes(text: str | int) -> int:
    """`22GiB`, `1.5 GB`, `4096` as a number of bytes; anything else is an InputError."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise InputError(f"a size cannot be negative, got {text}")
        return text
    match = _SIZE.fullmatch(str(text))
    factor = _SUFFIXES.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise InputError(f"cannot read {text!r} as a size; write it like 22GiB, 800MB or 4096")
    return int(float(match.group(1)) * factor)


def parse_rate(text: str) -> float:
    """`2GB/s` as bytes per second."""
    try:
        return float(parse_bytes(re.sub(r"/s\s*$", "", str(text), flags=re.IGNORECASE)))
    except InputError:
        raise InputError(f"cannot read {text!r} as a bandwidth; write it like 2GB/s") from None


def parse_flops(text: str) -> float:
    """`100GFLOP/s` as operations per second."""
    return _scaled(_FLOPS, text, "a rate of operations", "100 GFLOP/s")


def parse_items(text: str) -> float:
    """`1.5G/s` as numbers per second."""
    return _scaled(_ITEMS, text, "numbers per second", "1.5 G/s")


def _scaled(pattern: re.Pattern[str], text: str, what: str, example: str) -> float:
    match = pattern.fullmatch(str(text).strip())
    if match is None:
        raise InputError(f"cannot read {text!r} as {what}; write it like {example}")
    return float(match.group(1)) * 1000.0 ** _PREFIXES.index(match.group(2).upper())


def parse_seconds(text: str) -> float:
    """`35us` as seconds."""
    match = _SECONDS.fullmatch(str(text).strip())
    if match is None:
        raise InputError(f"cannot read {text!r} as a time; write it like 35us")
    return float(match.group(1)) * _SECOND_UNITS[match.group(2)]


def format_bytes(num_bytes: float) -> str:
    """Bytes as `3.2 GiB`, three significant digits, for messages and tables."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < (1024 if unit == "B" else 999.5):  # three digits would not do from there on
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if size < 1000 else f"{size:.0f} TiB"


def format_rate(bytes_per_s: float) -> str:
    """A bandwidth as `1.23 GB/s` (decimal, as links are sold)."""
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def format_flops(flops_per_s: float) -> str:
    return f"{_prefixed(flops_per_s)}FLOP/s"


def format_items(items_per_s: float) -> str:
    return f"{_prefixed(items_per_s)}/s"


def _prefixed(value: float) -> str:
    """Three digits, a space, and the prefix of a power of a thousand."""
    power = 0
    while value >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_PREFIXES[power]}"


def format_seconds(seconds: float) -> str:
    """Times as people say them: `35 us`, `1.20 s`, `4 min 5 s`, `7 h 12 min`."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60} min"
    if seconds >= 120:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60} s"
    for unit in ("s", "ms", "us"):
        if seconds >= 0.9995 * _SECOND_UNITS[unit]:
            return f"{seconds / _SECOND_UNITS[unit]:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def format_count(value: float) -> str:
    """A figure with three digits or more, never with an exponent: `0.77`, `8.42`, `12345`."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
