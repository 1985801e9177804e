"""Where the files that people can read and copy are found: policies, machines, model shapes.

They live in `policies/` at the top of a checkout; an installed flexpipe carries the same files as
its `presets` folder. Presets are looked up by bare name, in whatever case it was typed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from flexpipe.errors import FlexpipeError, ModelError, PolicyError

_PACKAGE = Path(__file__).resolve().parent
_SUFFIXES = (".json", ".yaml", ".yml")


def presets_dir() -> Path:
    """The folder of presets of this installation or checkout."""
    installed = _PACKAGE / "presets"
    return installed if installed.is_dir() else _PACKAGE.parent / "policies"


def preset_names(kind: Literal["models", ""]) -> tuple[str, ...]:
    """Names that `find_preset` knows: model shapes, or policies and machines for ""."""
    return tuple(sorted(_presets(kind)))


def find_preset(kind: Literal["models", ""], name: str) -> Path:
    """File of the preset `name`; the error lists the names there are."""
    found = _presets(kind).get(_bare(name).lower())
    if found is not None:
        return found
    known = ", ".join(preset_names(kind)) or f"none in {presets_dir() / kind}"
    error: type[FlexpipeError] = ModelError if kind == "models" else PolicyError
    what = "model shape" if kind == "models" else "policy"
    raise error(f"no {what} preset is called {name!r}. Known presets: {known}.")


def policy_file(name: str) -> Path:
    """A file of that name if there is one, or if it is spelled as a path; else the preset."""
    path = Path(name)
    return path if path.is_file() or os.sep in name else find_preset("", name)


def _presets(kind: str) -> dict[str, Path]:
    folder = presets_dir() / kind
    if not folder.is_dir():
        return {}
    return {path.stem.lower(): path for path in folder.iterdir() if path.suffix in _SUFFIXES}


def _bare(name: str) -> str:
    """`name` without a preset's suffix; the dots of "opt-6.7b" stay."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
