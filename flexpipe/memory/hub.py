"""A model by its hub id: which files are fetched, and what is said when they cannot be.

The work is huggingface_hub's: its cache, its resuming, its progress bar, its environment
(HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). Only safetensors, configurations and tokenizers
are asked for; pickled weights never reach the disk.
"""

from __future__ import annotations

import re
from pathlib import Path

from flexpipe.errors import ModelError

SHAPE_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens.json",
    "chat_template*",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
_IGNORED = ("*/*", "consolidated*")  # other formats' folders, and a second copy in one file
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download(model: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """Directory of the hub's `model`, fetched unless it is already in the hub's cache."""
    name = str(model)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"{name} is neither a directory nor a hub id. Name a directory that holds config.json "
            'and *.safetensors, or an id such as "Qwen/Qwen3-8B".'
        )
    from huggingface_hub import snapshot_download

    wanted = (*SHAPE_FILES, *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ()))
    try:
        directory = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(_IGNORED),
            )
        )
    except Exception as error:  # the hub's, httpx's and Xet's errors share no base
        raise _refused(name, revision, error) from error
    if weights and not any(directory.glob("*.safetensors")):
        raise _no_safetensors(name, revision)
    return directory


def _refused(name: str, revision: str | None, error: Exception) -> ModelError:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return ModelError(
            f"the hub's {name} is gated. Accept its terms on its page, then run `hf auth login` or "
            "set HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"{name} is neither a directory here nor a model on the hub (or it is private). Check "
            "the name, or run `hf auth login` for a private one."
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"the hub's {name} has no revision {revision!r}. Check its branches.")
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        return ModelError(
            f"{name} is not a directory here, not in the hub's cache, and the hub cannot be "
            "reached. Check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or fetch it elsewhere with "
            "`hf download` and name the directory."
        )
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"cannot fetch {name} from the hub: {first_line}. Run the command again to go on where it "
        "stopped."
    )


def _no_safetensors(name: str, revision: str | None) -> ModelError:
    from flexpipe.memory.checkpoint import PICKLED, only_pickled

    pickled = [file for file in _remote_files(name, revision) if Path(file).suffix in PICKLED]
    if pickled:
        return only_pickled(name, pickled[0])
    return ModelError(
        f"the hub's {name} has no *.safetensors files. Choose a model that has, or use "
        "--load-format dummy to run its shape with random weights."
    )


def _remote_files(name: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(name, revision=revision))
    except Exception:  # offline: the reason matters less than the refusal itself
        return []
