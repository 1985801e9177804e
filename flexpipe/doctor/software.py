"""The installation: Python, packages, extras, the hub's settings."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from flexpipe import __version__
from flexpipe.doctor.finding import Finding, note, ok, problem

# what flexpipe can do without, and what is lost then
_SPARE = {
    "llvmlite": "decoding attends with torch's kernel, which is slower on CPUs",
    "matplotlib": "pictures (--trace x.svg, sweep --plot) cannot be drawn",
}
_SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"

FindVersion = Callable[[str], str | None]


def check_software(find_version: FindVersion | None = None) -> Iterator[Finding]:
    """Python and every package that flexpipe names, by the versions it asks for."""
    find_version = find_version or installed_version
    yield ok("flexpipe", f"{__version__}, on Python {platform.python_version()}")
    for requirement in requirements():
        yield check_package(requirement, find_version(requirement.name))


def check_package(requirement: Requirement, version: str | None) -> Finding:
    """Whether what is installed is what is needed."""
    name = requirement.name
    if version is not None and requirement.specifier.contains(version, prereleases=True):
        return ok(name, version)
    here = "is not installed" if version is None else f"{version} is installed"
    text = f"{here}; flexpipe asks for {requirement.specifier}"
    advice = f"pip install '{name}{requirement.specifier}'"
    if name in _SPARE:
        return note(name, text, f"{advice}; without it {_SPARE[name]}")
    return problem(name, text, advice)


def requirements() -> list[Requirement]:
    """What flexpipe and its pictures ask for, as this checkout or installation says."""
    if _SETUP.is_file():
        parser = configparser.ConfigParser()
        parser.read(_SETUP, encoding="utf-8")
        texts = parser["options"]["install_requires"] + parser["options.extras_require"]["plot"]
        return [Requirement(text) for text in texts.split("\n") if text]
    found = map(Requirement, importlib.metadata.requires("flexpipe") or ())
    return [some for some in found if not some.marker or some.marker.evaluate({"extra": "plot"})]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_hub(env: Mapping[str, str] = os.environ) -> Finding:
    """Where models from the hub lie, and whether it may be asked for more."""
    home = env.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(env.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    held = sum(1 for path in cache.glob("models--*")) if cache.is_dir() else 0
    text = f"{held} models in {cache}"
    if env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return note(
            "hub", f"{text}; HF_HUB_OFFLINE keeps from fetching others", "unset it to fetch models"
        )
    return ok("hub", text)
