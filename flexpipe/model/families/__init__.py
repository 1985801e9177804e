"""Which model families are known, and how a config.json finds its own.

A family is one file with `ARCHITECTURE`, the class name that checkpoints carry, and `describe`,
which turns config.json into a `ModelConfig`. To add one, write the file and list it here. A model
is recognized by what its config.json says, never by its path or name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flexpipe.errors import ModelError
from flexpipe.model.config import ModelConfig
from flexpipe.model.families import llama, mistral, opt, qwen2, qwen3

Describe = Callable[[Mapping[str, Any]], ModelConfig]

FAMILIES: Mapping[str, Describe] = {
    family.ARCHITECTURE: family.describe for family in (llama, mistral, opt, qwen2, qwen3)
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face config.json describes, or a `ModelError` that says why not."""
    describe = FAMILIES[_architecture(hf)]
    _refuse_quantized(hf)
    return describe(hf)


def _architecture(hf: Mapping[str, Any]) -> str:
    named = tuple(hf.get("architectures") or ())
    for architecture in named:
        if architecture in FAMILIES:
            return str(architecture)
    model_type = hf.get("model_type")
    if not named:
        for architecture, describe in FAMILIES.items():
            if describe.__module__.endswith(f".{model_type}"):
                return architecture
    asked = ", ".join(map(str, named)) or (f"model type {model_type}" if model_type else "none")
    raise ModelError(
        f"config.json names the architecture {asked}, which is not among the known ones: "
        f"{', '.join(sorted(FAMILIES))}. Choose a model of one of these."
    )


def _refuse_quantized(hf: Mapping[str, Any]) -> None:
    quantization = hf.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise ModelError(
        f"the checkpoint is quantized with {method or 'an unnamed method'} (quantization_config in "
        "config.json), which is not read for now. Use the unquantized checkpoint, in float32, "
        "float16 or bfloat16; --compress-weight 4 or 8 makes its weights as small."
    )
