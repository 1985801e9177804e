"""AirLLM: transformers' generate with each layer's weights read from disk when its turn comes.

`--prepare` only splits the checkpoint into AirLLM's files, one per layer, which needs no cap.

    PYTHONPATH=. python -m benchmarks.peers.runner_airllm --model DIR --workload 128/32 \
        --batch 64 [--dtype bfloat16] --shards DIR [--prepare]
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.runner_transformers import generator
from benchmarks.peers.workload import (
    Clock,
    make_prompts,
    parse,
    parser,
    result,
    run_batches,
    vocab_size,
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    options.add_argument("--shards", type=Path, required=True)
    options.add_argument("--prepare", action="store_true")
    args = parse(options)
    with contextlib.redirect_stdout(sys.stderr):  # it chats
        fields = _run(args)
    if fields is not None:
        result(args, peer=f"airllm {args.dtype}", **fields).print()


def _run(args: Any) -> dict[str, Any] | None:
    from importlib.metadata import version

    import torch
    from airllm import AutoModel

    torch.set_num_threads(args.threads)
    start_s = time.perf_counter()
    model = AutoModel.from_pretrained(
        str(args.model),
        device="cpu",
        dtype=getattr(torch, args.dtype),
        layer_shards_saving_path=str(args.shards),
    )
    load_s = time.perf_counter() - start_s
    if args.prepare:
        return None
    prompts = make_prompts(args.num_prompts, args.workload.prompt_len, vocab_size(args.model))
    generate = generator(model, args.workload.gen_len)
    generate([prompt[:8] for prompt in prompts[: args.batch]], Clock(2, None), max_tokens=2)
    names = ("airllm", "transformers", "torch")
    return {
        **run_batches(args, prompts, generate),
        "load_s": load_s,
        "version": ", ".join(f"{name} {version(name)}" for name in names),
        "details": {"dtype": args.dtype},
    }


if __name__ == "__main__":
    main()
