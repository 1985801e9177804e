"""A profile for people: the figures that decide, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.profile import Profile, Rates
from flexpipe.units import format_bytes, format_flops, format_items, format_rate, format_seconds

ROWS = (1, 8, 64, 256, 1024)
SIZES = (64 * 1024, 2**20, 2**24, 2**27)
NOTABLE = 1.2  # a slowdown below this is left out


def profile_table(profile: Profile) -> str:
    kind = "quick profile" if profile.quick else "profile"
    lines = [f"{profile.name}: {kind} of {profile.date}", ""]
    memory = ", ".join(
        f"{tier.value} {format_bytes(size)}" for tier, size in profile.memory.items()
    )
    lines += [f"memory a run may use: {memory}", ""]
    lines += _table("links, bytes at once", [format_bytes(size) for size in SIZES], _links(profile))
    lines += _rates("", profile.compute)
    if profile.host is not None:
        lines += _rates("on the CPU: ", profile.host)
    lines += [f"per op: {_overheads(profile)}"]
    if told := _slowdowns(profile):
        lines += [f"takes longer beside another: {told}"]
    return "\n".join(lines)


def _links(profile: Profile) -> Iterator[tuple[str, list[str]]]:
    for name, curve in profile.links.items():
        yield name, [format_rate(curve.rate(size)) for size in SIZES]


def _rates(where: str, rates: Rates) -> list[str]:
    heads = [str(rows) for rows in ROWS]
    lines = _table(f"{where}products, rows of {_largest(rates)}", heads, _products(rates))
    return lines + _table(f"{where}other work", [], _others(rates))


def _products(rates: Rates) -> Iterator[tuple[str, list[str]]]:
    for what, surfaces in (("", rates.matmul), (" packed", rates.packed)):
        for dtype, surface in surfaces.items():
            curve = surface.curves[-1]
            yield f"{dtype}{what}", [format_flops(curve.rate(rows)) for rows in ROWS]


def _largest(rates: Rates) -> str:
    surface: Surface = next(iter(rates.matmul.values()))
    size = surface.sizes[-1]
    return "weights" if size <= 1 else f"{format_items(size).removesuffix('/s').strip()} weights"


def _others(rates: Rates) -> Iterator[tuple[str, list[str]]]:
    for name, curves, shown in (
        ("prefill attention", rates.prefill_attention, format_flops),
        ("decode attention", rates.decode_attention, format_rate),
        ("norms", rates.elementwise, format_items),
    ):
        yield from _ends(name, curves, shown)
    for name, items in (
        ("convert", rates.convert),
        ("widen", rates.widen),
        ("compress", rates.compress),
    ):
        for key, rate in items.items():
            yield f"{name} {key}", [format_items(rate)]


def _ends(
    name: str, curves: Mapping[str, Curve], shown: Callable[[float], str]
) -> Iterator[tuple[str, list[str]]]:
    """The rate of the largest piece of work."""
    for key, curve in curves.items():
        yield f"{name} {key}", [shown(curve.rates[-1])]


def _overheads(profile: Profile) -> str:
    return ", ".join(f"{name} {format_seconds(s)}" for name, s in profile.overhead_s.items())


def _slowdowns(profile: Profile) -> str:
    notable = sorted(profile.slowdown.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{one} beside {other} × {factor:.2f}"
        for (one, other), factor in notable
        if factor >= NOTABLE
    )


def _table(title: str, heads: Sequence[str], rows: Iterator[tuple[str, list[str]]]) -> list[str]:
    """Columns of one width under a title."""
    made = [(title, list(heads)), *rows]
    first = max(len(name) for name, _ in made) + 2
    width = max((len(cell) for _, cells in made for cell in cells), default=0) + 2
    lines = [
        f"{name:<{first}}{''.join(f'{cell:>{width}}' for cell in cells)}".rstrip()
        for name, cells in made
    ]
    return [*lines, ""]
