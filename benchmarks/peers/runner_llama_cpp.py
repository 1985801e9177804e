"""llama.cpp through llama-cpp-python's low-level interface: many sequences in one `llama_batch`.

Each prompt is a sequence with a stream of the KV cache of its own. Prompts go in as many at a time
as `--n-batch` holds; then every decode call carries one token of each sequence. The likeliest
token is taken with numpy from the logits. `--mmap` maps the GGUF, as llama.cpp does by default;
without it the file is read into memory.

    PYTHONPATH=. python -m benchmarks.peers.runner_llama_cpp --model FILE.gguf --workload 128/32 \
        --batch 64 [--ubatch 512] [--n-batch 2048] [--flash-attn auto|on|off] [--mmap]
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers.workload import Clock, make_prompts, parse, parser, result, run_batches

_FLASH = {"auto": -1, "off": 0, "on": 1}


class Engine:
    """One model and one context with room for `batch` sequences of `length` tokens."""

    def __init__(self, args: Any, length: int) -> None:
        from llama_cpp import llama_cpp as lib

        self._lib = lib
        lib.llama_backend_init()
        self._quiet = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        model_params = lib.llama_model_default_params()
        mode = "MMAP" if args.mmap else "NONE"
        model_params.load_mode = getattr(lib, f"LLAMA_LOAD_MODE_{mode}")
        self._model = lib.llama_model_load_from_file(str(args.model).encode(), model_params)
        assert self._model, f"llama.cpp cannot load {args.model}"
        params = lib.llama_context_default_params()
        params.n_seq_max = args.batch
        params.n_ctx = args.batch * -(-length // 256) * 256  # a stream is padded to 256
        params.n_batch = max(args.n_batch, args.batch)
        params.n_ubatch = min(args.ubatch, params.n_batch)
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = _FLASH[args.flash_attn]
        params.kv_unified = args.kv_unified
        if args.kv_unified:
            params.n_ctx = args.batch * length
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp cannot make the context"
        self._n_batch = params.n_batch
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def generate(self, prompts: Sequence[Sequence[int]], clock: Clock) -> list[list[int]]:
        """Greedy tokens of each prompt until the clock says stop."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        length = len(prompts[0])
        tokens: list[list[int]] = []
        group = max(1, self._n_batch // length)
        for start in range(0, len(prompts), group):
            rows = range(start, min(start + group, len(prompts)))
            entries = [
                (token, position, row, position == length - 1)
                for row in rows
                for position, token in enumerate(prompts[row])
            ]
            tokens += [[token] for token in self._decode(entries)]
        position = length
        while not clock.token():
            entries = [(row[-1], position, seq, True) for seq, row in enumerate(tokens)]
            for row, token in zip(tokens, self._decode(entries), strict=True):
                row.append(token)
            position += 1
        return tokens

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run a batch of (token, position, sequence, wanted); the likeliest next of the wanted."""
        lib, batch = self._lib, self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, seq, wanted) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = wanted
        code = lib.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode said {code}"
        chosen = []
        for i, entry in enumerate(entries):
            if entry[3]:
                logits = lib.llama_get_logits_ith(self._context, i)
                chosen.append(int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax()))
        return chosen


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--ubatch", type=int, default=512)
    options.add_argument("--n-batch", type=int, default=2048)
    options.add_argument("--flash-attn", choices=_FLASH, default="auto")
    options.add_argument("--kv-unified", action="store_true")
    options.add_argument("--mmap", action="store_true")
    options.add_argument("--show-tokens", action="store_true", help="the first row's, to compare")
    args = parse(options)
    import llama_cpp

    start_s = time.perf_counter()
    engine = Engine(args, args.workload.prompt_len + args.workload.gen_len)
    load_s = time.perf_counter() - start_s
    prompts = make_prompts(args.num_prompts, args.workload.prompt_len, engine.vocab)
    engine.generate([prompt[:8] for prompt in prompts[: args.batch]], Clock(2, None))
    last: list[list[int]] = []

    def generate(batch: Sequence[Sequence[int]], clock: Clock) -> None:
        last[:] = engine.generate(batch, clock)

    times = run_batches(args, prompts, generate)
    details: dict[str, Any] = {
        "gguf": args.model.name,
        "mmap": args.mmap,
        "n_ubatch": args.ubatch,
        "n_batch": args.n_batch,
        "flash_attn": args.flash_attn,
        "kv_unified": args.kv_unified,
    }
    if args.show_tokens:
        details["tokens"] = last[0]
    dtype = args.model.stem.rpartition("-")[2]
    result(
        args,
        peer=f"llama.cpp {dtype}{' mmap' if args.mmap else ''}",
        load_s=load_s,
        version=f"llama-cpp-python {llama_cpp.__version__}",
        details=details,
        **times,
    ).print()


if __name__ == "__main__":
    main()
