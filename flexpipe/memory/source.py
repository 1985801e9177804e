"""Where a model comes from: a local directory, the hub, or nowhere at all (random weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flexpipe.errors import ModelError
from flexpipe.memory.checkpoint import Checkpoint, open_directory
from flexpipe.memory.dummy import open_dummy
from flexpipe.memory.hub import download
from flexpipe.preset import preset_names


def open_checkpoint(
    model: str | Path,
    *,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    cache_dir: Path,
    revision: str | None = None,
) -> Checkpoint:
    """Open a local directory, a hub id, or (with "dummy" weights) a preset or a bare config.json.

    Dummy weights are written once to `cache_dir`; downloads go to the hub's own cache.
    """
    if load_format == "dummy":
        return open_dummy(model, seed=seed, cache_dir=cache_dir, revision=revision)
    directory = Path(model).expanduser()
    if directory.is_dir():
        return open_directory(directory)
    if str(model) in preset_names("models"):
        raise ModelError(
            f"{model} is a preset: a model's shape without its weights. Add --load-format dummy "
            "to run it with random ones, or name a directory or a hub id."
        )
    return open_directory(download(model, revision=revision))
