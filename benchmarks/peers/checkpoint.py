"""Checkpoints of random weights, the same for every peer: a Hugging Face directory, and a GGUF.

The directory is what a public model looks like: config, generation config, a tokenizer, and bf16
safetensors in shards of at most 5 GB, drawn tensor by tensor (normal, standard deviation 0.02;
norms are one), so no more than one tensor is in memory. The GGUF is made of the same bytes. It has
the tensors' names, the row order of q and k and the vocabulary that llama.cpp wants.

    PYTHONPATH=. python -m benchmarks.peers.checkpoint DIR --shape 1.1b
    PYTHONPATH=. python -m benchmarks.peers.checkpoint DIR --gguf f16    # needs the package gguf
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHARD_BYTES = 5_000_000_000
_DRAW_ELEMENTS = 1 << 22
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 32000

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "use_cache": True,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes as Hugging Face has them, in the order of use."""
        kv = self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.ffn, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.ffn)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


SHAPES = {
    "1.1b": Shape(hidden=2048, layers=22, heads=32, kv_heads=4, ffn=5632),
    "6.7b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=11008),
    "tiny": Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, vocab=512),
}


def write_checkpoint(directory: Path, shape: Shape, *, seed: int = 0) -> Path:
    """A checkpoint in `directory`, which appears only when it is complete."""
    if directory.exists():
        raise SystemExit(f"{directory} exists; remove it to write the checkpoint again")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_json(partial / "config.json", shape.config())
    _write_json(
        partial / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False},
    )
    _write_tokenizer(partial, shape.vocab)
    _write_weights(partial, shape, seed)
    partial.rename(directory)
    return directory


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def vocabulary(size: int) -> list[str]:
    """One word per id; no peer ever has to split a text into them."""
    return ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, size))]


def _write_tokenizer(directory: Path, size: int) -> None:
    words = vocabulary(size)
    special = [
        {"id": i, "content": words[i], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i in range(4)
    ]  # fmt: skip
    _write_json(
        directory / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: i for i, word in enumerate(words)},
                "unk_token": "<unk>",
            },
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 2048,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
        },
    )


# -- safetensors ----------------------------------------------------------------------------------


def _write_weights(directory: Path, shape: Shape, seed: int) -> None:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in shape.tensors():
        num_bytes = 2 * math.prod(size)
        if filled and filled + num_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, size))
        filled += num_bytes
    weight_map: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for i, tensors in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, tensors, rng)
        weight_map |= {tensor: name for tensor, _ in tensors}
    if len(shards) > 1:
        total = sum(2 * math.prod(size) for _, size in shape.tensors())
        _write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, size in tensors:
        end = begin + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": [*size], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size in tensors:
            for piece in _draw(rng, math.prod(size), norm="norm" in name):
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _draw(rng: np.random.Generator, num_elements: int, *, norm: bool) -> Iterator[bytes]:
    """bf16 bits of a tensor, a few MB at a time."""
    for start in range(0, num_elements, _DRAW_ELEMENTS):
        count = min(_DRAW_ELEMENTS, num_elements - start)
        if norm:
            values = np.ones(count, dtype=np.float32)
        else:
            values = rng.standard_normal(count, dtype=np.float32) * np.float32(_STD)
        yield (
            ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype("<u2").tobytes()
        )


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint, or the GGUF itself."""
    return [directory] if directory.is_file() else sorted(directory.glob("*.safetensors"))


# -- GGUF -----------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(directory: Path, path: Path, *, dtype: str = "f16") -> Path:
    """The checkpoint's weights as llama.cpp reads them, matrices in `dtype`, norms in fp32."""
    import gguf

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_metadata(writer, config, dtype)
    stored = list(_stored(directory))
    kind = {"f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}[dtype]
    for name, _, _, size in stored:
        is_matrix = len(size) > 1
        writer.add_tensor_info(
            _gguf_name(name),
            size,
            np.dtype(np.float16 if is_matrix else np.float32),
            math.prod(size) * (2 if is_matrix else 4),
            raw_dtype=kind if is_matrix else gguf.GGMLQuantizationType.F32,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file, offset, size in stored:
        bits = np.fromfile(file, dtype="<u2", count=math.prod(size), offset=offset).reshape(size)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            is_q = name.endswith("q_proj.weight")
            bits = _rope_order(
                bits, config["num_attention_heads" if is_q else "num_key_value_heads"]
            )
        writer.write_tensor_data(_as(bits, dtype if len(size) > 1 else "f32"))
    writer.close()
    partial.rename(path)
    return path


def _add_metadata(writer: Any, config: dict[str, Any], dtype: str) -> None:
    import gguf

    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
    writer.add_file_type(file_types[dtype])
    words = vocabulary(config["vocab_size"])
    words[4:260] = [f"<0x{byte:02X}>" for byte in range(256)]  # llama.cpp looks for them
    kinds = [gguf.TokenType.NORMAL] * len(words)
    kinds[:4] = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNKNOWN]
    kinds[4:260] = [gguf.TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)


def _stored(directory: Path) -> Iterator[tuple[str, Path, int, tuple[int, ...]]]:
    """Name, file, offset and shape of every tensor of the checkpoint."""
    for path in weight_files(directory):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert entry["dtype"] == "BF16"
            yield name, path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"])


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    prefix = ""
    if stem.startswith("model.layers."):
        layer, stem = stem.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{layer}."
    return f"{prefix}{_GGUF_NAMES[stem]}.weight"


def _rope_order(weight: Any, num_heads: int) -> Any:
    """Rows of q or k with the two halves of a head interleaved: llama.cpp turns neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _as(bits: Any, dtype: str) -> Any:
    """bf16 bits as numbers of `dtype`; numpy has no bf16, so that stays bits."""
    if dtype == "bf16":
        return bits
    values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values if dtype == "f32" else values.astype(np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, help="write a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", choices=("f16", "bf16"), help="write a GGUF from it")
    parser.add_argument("--gguf-path", type=Path, help="default: DIRECTORY-<dtype>.gguf")
    args = parser.parse_args()
    if args.shape:
        print(write_checkpoint(args.directory, SHAPES[args.shape], seed=args.seed))
    if args.gguf:
        path = args.gguf_path or gguf_path(args.directory, args.gguf)
        print(write_gguf(args.directory, path, dtype=args.gguf))


def gguf_path(directory: Path, dtype: str) -> Path:
    """Where the GGUF of a checkpoint lies unless told otherwise: beside the directory."""
    return directory.with_name(f"{directory.name}-{dtype}.gguf")


if __name__ == "__main__":
    main()
