"""The reference: tiny checkpoints of every family, and what transformers says of them.

Random weights are scaled so that outputs are diverse: with the usual initialization a tiny model
repeats one token, and a test on repeated tokens sees no mistake. Everything is seeded, and built
once per test session.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexpipe.kernels import codec as codec_module
from flexpipe.kernels.codec import compress
from flexpipe.plan.codec import Codec

VOCAB = 320
MAX_POSITIONS = 512
TIE = 1e-4  # tokens may part only where the reference's two best logits are closer than this
TOLERANCE = 1e-4  # on logits, in float32
# the same where the KV cache is compressed: noise of the last bit may turn over a code that lies
# between two, and a code of 4 bits is a fifteenth of its group's range
CODED_TIE = 0.1
CODED_TOLERANCE = 0.4

_SMALL: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_OPT: Mapping[str, Any] = {
    **{key: value for key, value in _SMALL.items() if key != "intermediate_size"},
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "dropout": 0.0,
}

# name -> (model_type, config.json's keys)
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "opt": ("opt", _OPT),
    "opt-350m": (
        "opt",
        {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "llama2": ("llama", {**_SMALL, "tie_word_embeddings": False}),
    "llama3": (
        "llama",
        {**_SMALL, "num_key_value_heads": 2, "rope_parameters": dict(_LLAMA3_ROPE)},
    ),
    "llama3-tied": (
        "llama",
        {
            **_SMALL,
            "num_key_value_heads": 1,
            "rope_parameters": dict(_LLAMA3_ROPE),
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear": (
        "llama",
        {
            **_SMALL,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-yarn": (
        "llama",
        {**_SMALL, "num_key_value_heads": 2, "rope_parameters": dict(_YARN_ROPE)},
    ),
    "mistral": ("mistral", {**_SMALL, "num_key_value_heads": 2, "sliding_window": 64}),
    "mistral-full": ("mistral", {**_SMALL, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {**_SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2",
        {
            **_SMALL,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 48,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {**_SMALL, "num_key_value_heads": 2, "head_dim": 32}),
}
# for claims of their own
OTHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3-wide": ("qwen3", {**_SMALL, "num_key_value_heads": 2, "head_dim": 80}),
    "llama2-deep": ("llama", {**_SMALL, "num_hidden_layers": 8, "tie_word_embeddings": False}),
    "qwen2-windows-deep": (
        "qwen2",
        {
            **_SMALL,
            "num_hidden_layers": 8,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 48,
            "max_window_layers": 3,
            "tie_word_embeddings": True,
        },
    ),
    "opt-350m-deep": (
        "opt",
        {**_OPT, "num_hidden_layers": 8, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    # four shards have heads enough, and a vocabulary that they cannot share evenly
    "llama-eight": (
        "llama",
        {
            **_SMALL,
            "vocab_size": VOCAB + 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class Reference:
    """What transformers answers to each prompt, greedily and one prompt at a time."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]  # per prompt [steps, vocabulary]; the first from the prefill

    def margin(self, prompt: int, step: int) -> float:
        """How far apart the two best logits lie."""
        best, second = self.logits[prompt][step].topk(2).values.tolist()
        return float(best - second)


class Disagreement(AssertionError):
    """Outputs differ from the reference by more than the claim allows."""


def build_checkpoint(
    variant: str, directory: Path, *, dtype: str = "float32", sharded: bool = False, seed: int = 0
) -> Path:
    """Saves a tiny random model of `variant` with safetensors and returns its directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, keys = {**VARIANTS, **OTHERS}[variant]
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(keys)))
    model = AutoModelForCausalLM.from_config(config).eval()
    _scale_weights(model, seed)
    model = model.to(getattr(torch, dtype))
    model.generation_config.eos_token_id = keys["eos_token_id"]
    shard = {"max_shard_size": "64KB"} if sharded else {}
    model.save_pretrained(directory, **shard)
    return directory


def _scale_weights(model: torch.nn.Module, seed: int) -> None:
    """Every kind of weight gets a say: biases and norms that do nothing would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "embed_positions" in name:
                weight.copy_(noise * 1.5)
            elif "embed_tokens" in name:
                weight.copy_(noise * 0.4)
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.2 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.05 * noise)
            elif "lm_head" in name:
                weight.copy_(noise * 0.3)
            else:  # OPT's ReLU pushes all tokens one way, so its MLP speaks more softly
                gain = 0.7 if ".fc" in name else 1.5
                weight.copy_(noise * gain / weight.shape[1] ** 0.5)


def shallow(source: Path, target: Path, *, num_layers: int) -> Path:
    """A copy of a checkpoint whose config ends the model after so many layers."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    config.pop("layer_types", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def widened_checkpoint(
    source: Path, target: Path, knobs: Mapping[str, Any], num_shards: int = 1
) -> Path:
    """A copy in float32 whose matrices hold what the `compress_*` knobs leave of them, each shard's
    part of a row by itself."""
    from safetensors.torch import load_file, save_file

    from flexpipe.kernels.codec import compress, widen
    from flexpipe.model.families import read_config
    from flexpipe.plan.placement import is_shared, meets_vocabulary, model_tensors
    from flexpipe.plan.policy import Policy

    policy = Policy(**knobs)
    shutil.copytree(source, target)
    config = read_config(json.loads((source / "config.json").read_text()))
    tensors = {name: t.float() for name, t in load_file(target / "model.safetensors").items()}
    for spec in model_tensors(config):
        codec = policy.vocabulary_codec if meets_vocabulary(spec) else policy.weight_codec
        if codec is not None and is_shared(spec):
            split = num_shards if spec.role in ("o_proj", "down_proj") else 1
            for matrix in tensors[spec.name].chunk(split, 1):
                rows = torch.empty(len(matrix), codec.row_bytes(matrix.shape[1]), dtype=torch.uint8)
                compress(matrix, codec, rows)
                widen(rows, codec, matrix)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def load_reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers runs it, attention spelled out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


def reference_generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new: int, kv_codec: Codec | None = None
) -> Reference:
    """Greedy decoding, prompt by prompt and without padding; end tokens do not stop it."""
    answers = [_generate_one(model, prompt, max_new, kv_codec) for prompt in prompts]
    return Reference(
        prompts=tuple(tuple(prompt) for prompt in prompts),
        tokens=tuple(tokens for tokens, _ in answers),
        logits=tuple(logits for _, logits in answers),
    )


@torch.inference_mode()
def _generate_one(
    model: Any, prompt: Sequence[int], max_new: int, kv_codec: Codec | None
) -> tuple[tuple[int, ...], Tensor]:
    tokens: list[int] = []
    logits: list[Tensor] = []
    given = list(prompt)
    kv_cache = None if kv_codec is None else compressing_cache(model.config, kv_codec)
    for _ in range(max_new):
        answer = model(torch.tensor([given]), past_key_values=kv_cache, use_cache=True)
        kv_cache = answer.past_key_values
        logits.append(answer.logits[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
        given = tokens[-1:]
    return tuple(tokens), torch.stack(logits)


def compressing_cache(config: Any, codec: Codec) -> Any:
    """transformers' cache, but keys and values become what their compressed groups stand for."""
    from transformers import DynamicCache

    class Compressing(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *where: Any, **how: Any) -> Any:
            kept = (compressed_and_back(x, codec) for x in (key_states, value_states))
            return super().update(*kept, *where, **how)

    return Compressing(config=config)


def compressed_and_back(x: Tensor, codec: Codec) -> Tensor:
    """By torch's operations, each row of the last dimension by itself."""
    rows_MN = x.reshape(-1, x.shape[-1])
    coded_MB = torch.empty(len(rows_MN), codec.row_bytes(x.shape[-1]), dtype=torch.uint8)
    compress(rows_MN, codec, coded_MB)
    back_MN = torch.empty(rows_MN.shape)
    codec_module._widen_by_torch(coded_MB, codec, back_MN)
    return back_MN.view(x.shape)


def ragged_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def check_tokens(
    reference: Reference, prompt: int, tokens: Sequence[int], tie: float = TIE
) -> int | None:
    """Raises unless `tokens` are the reference's up to a tie; returns the step of such a tie."""
    for step, (expected, token) in enumerate(zip(reference.tokens[prompt], tokens, strict=False)):
        if token != expected:
            margin = reference.margin(prompt, step)
            if margin >= tie:
                raise Disagreement(
                    f"prompt {prompt} step {step}: token {token} instead of {expected}, whose "
                    f"logit leads by {margin:.2e}"
                )
            print(f"tie: prompt {prompt} step {step} margin {margin:.2e}")
            return step
    return None


CheckpointFactory = Callable[..., Path]
ReferenceFactory = Callable[..., Reference]


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`hf_checkpoint("qwen3", dtype="bfloat16", sharded=True)`: a directory, built once."""
    built: dict[tuple[Any, ...], Path] = {}

    def checkpoint(
        variant: str, *, dtype: str = "float32", sharded: bool = False, seed: int = 0
    ) -> Path:
        key = (variant, dtype, sharded, seed)
        if key not in built:
            directory = tmp_path_factory.mktemp(variant)
            build_checkpoint(variant, directory, dtype=dtype, sharded=sharded, seed=seed)
            built[key] = directory
        return built[key]

    return checkpoint


@pytest.fixture(scope="session")
def hf_reference(hf_checkpoint: CheckpointFactory) -> ReferenceFactory:
    """`hf_reference("opt", lengths=(1, 40), max_new=8)`: transformers' answers, computed once."""
    models: dict[tuple[Any, ...], Any] = {}
    answers: dict[tuple[Any, ...], Reference] = {}

    def reference(
        variant: str,
        *,
        lengths: Sequence[int],
        max_new: int,
        seed: int = 0,
        kv_codec: Codec | None = None,
        **how: Any,
    ) -> Reference:
        checkpoint_key = (variant, *sorted(how.items()))
        key = (checkpoint_key, tuple(lengths), max_new, seed, kv_codec)
        if key not in answers:
            if checkpoint_key not in models:
                models[checkpoint_key] = load_reference_model(hf_checkpoint(variant, **how))
            prompts = ragged_prompts(lengths, seed)
            answers[key] = reference_generate(models[checkpoint_key], prompts, max_new, kv_codec)
        return answers[key]

    return reference
