"""Where the files that people can read and copy are found: policies, machines, model shapes.

They live in `policies/` at the top of a checkout; an installed flexpipe carries the same files as
its `presets` folder. Presets are looked up by bare name, in whatever case it was typed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from flexpipe.errors import FlexpipeError, ModelError, PolicyError

# a folder of the presets; policies lie above the others
Kind = Literal["", "hardware", "models"]

_PACKAGE = Path(__file__).resolve().parent
_SUFFIXES = (".json", ".yaml", ".yml")
_WHAT: Mapping[Kind, str] = {"": "policy", "hardware": "hardware", "models": "model shape"}


def presets_dir() -> Path:
    """The folder of presets of this installation or checkout."""
    installed = _PACKAGE / "presets"
    return installed if installed.is_dir() else _PACKAGE.parent / "policies"


def preset_names(kind: Kind) -> tuple[str, ...]:
    """Names that `find_preset` knows: model shapes, machines, or policies for ""."""
    return tuple(sorted(_presets(kind)))


def find_preset(kind: Kind, name: str) -> Path:
    """File of the preset `name`; the error lists the names there are."""
    bare = _bare(name).lower()
    found = _presets(kind).get(bare)
    if found is not None:
        return found
    names = preset_names(kind)
    near = difflib.get_close_matches(bare, names, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    known = ", ".join(names) or f"none in {presets_dir() / kind}"
    error: type[FlexpipeError] = ModelError if kind == "models" else PolicyError
    raise error(f"no {_WHAT[kind]} preset is called {name!r}{hint} Known presets: {known}.")


def policy_file(name: str) -> Path:
    """A file of that name if there is one, or if it is spelled as a path; else the preset."""
    return _file_or_preset("", name)


def hardware_file(name: str) -> Path:
    """A machine's description, found as `policy_file` finds a policy."""
    return _file_or_preset("hardware", name)


def _file_or_preset(kind: Kind, name: str) -> Path:
    path = Path(name)
    return path if path.is_file() or os.sep in name else find_preset(kind, name)


def _presets(kind: Kind) -> dict[str, Path]:
    folder = presets_dir() / kind
    if not folder.is_dir():
        return {}
    return {path.stem.lower(): path for path in folder.iterdir() if path.suffix in _SUFFIXES}


def _bare(name: str) -> str:
    """`name` without a preset's suffix; the dots of "opt-6.7b" stay."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
