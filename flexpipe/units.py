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
