"""transformers' generate on a batch, in memory; or with accelerate's disk offload.

All prompts have one length, so nothing is padded. The time of each token is read in a stopping
criterion. `--offload-memory` bounds what accelerate may keep of the weights in memory
(`max_memory`); the rest is offloaded to disk as its guide tells: `device_map="auto"` with an
`offload_folder`, where weights in the checkpoint's own dtype are read from its safetensors.

    PYTHONPATH=. python -m benchmarks.peers.runner_transformers --model DIR --workload 128/32 \
        --batch 32 [--dtype float32|bfloat16] [--offload-memory 300MB --offload-folder DIR]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

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
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    options.add_argument("--offload-memory")
    options.add_argument("--offload-folder", default="offload")
    args = parse(options)
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    start_s = time.perf_counter()
    model = _load(args)
    load_s = time.perf_counter() - start_s
    prompts = make_prompts(args.num_prompts, args.workload.prompt_len, vocab_size(args.model))
    generate = generator(model, args.workload.gen_len)
    generate([prompt[:8] for prompt in prompts[: args.batch]], Clock(2, None), max_tokens=2)
    times = run_batches(args, prompts, generate)
    name = "accelerate" if args.offload_memory else "transformers"
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if args.offload_memory:
        import accelerate

        versions = f"accelerate {accelerate.__version__}, {versions}"
    details: dict[str, Any] = {"dtype": args.dtype, "attention": args.attention}
    if args.offload_memory:
        where = list(model.hf_device_map.values())
        details |= {
            "offload_memory": args.offload_memory,
            "modules_on_disk": where.count("disk"),
            "modules": len(where),
        }
    result(
        args,
        peer=f"{name} {args.dtype}",
        load_s=load_s,
        version=versions,
        details=details,
        **times,
    ).print()


def _load(args: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {}
    if args.offload_memory:
        kwargs = {
            "device_map": "auto",
            "max_memory": {"cpu": args.offload_memory},
            "offload_folder": args.offload_folder,
        }
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation=args.attention, **kwargs
    )
    return model.eval()


def generator(model: Any, gen_len: int) -> Any:
    """A function that generates exactly `gen_len` tokens for each prompt, reading the clock."""
    import torch
    from transformers import StoppingCriteria

    class Reading(StoppingCriteria):  # type: ignore[misc]
        def __init__(self, clock: Clock) -> None:
            self._clock = clock

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            stop = self._clock.token()
            return torch.full((input_ids.shape[0],), stop, dtype=torch.bool)

    def generate(
        prompts: Sequence[Sequence[int]], clock: Clock, max_tokens: int | None = None
    ) -> None:
        ids = torch.tensor(prompts, dtype=torch.long)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=max_tokens or gen_len,
                max_new_tokens=max_tokens or gen_len,
                stopping_criteria=[Reading(clock)],
            )

    return generate


if __name__ == "__main__":
    main()
