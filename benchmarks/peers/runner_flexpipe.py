"""flexpipe itself, through `flexpipe run`: a short warm-up job, then the workload.

`--options` are options of `flexpipe run`, as a command line would have them. Seconds are the
report's total less its load, so planning is outside and writing results inside. A batch is what
--gpu-batch-size and --num-gpu-batches make of it, if they are given, else all prompts. A budget
of seconds means nothing here: every run is whole.

    PYTHONPATH=. python -m benchmarks.peers.runner_flexpipe --model DIR --workload 128/32 \
        --batch 64 --options="--device cpu --gpu-batch-size 64 --num-gpu-batches 1"
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from benchmarks.peers.workload import make_prompts, parse, parser, result, vocab_size

WARMUP_PROMPTS, WARMUP_TOKENS = 4, 3


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--options", default="", help="options of flexpipe run")
    options.add_argument("--trace", type=Path)
    options.add_argument("--report", type=Path, help="write the whole report here")
    options.add_argument("--warmup-prompts", type=int, default=WARMUP_PROMPTS)
    args = parse(options)
    import torch

    import flexpipe

    torch.set_num_threads(args.threads)
    prompts = make_prompts(args.num_prompts, args.workload.prompt_len, vocab_size(args.model))
    with tempfile.TemporaryDirectory(prefix="flexpipe-peers-", dir=Path.cwd()) as directory:
        folder = Path(directory)
        if args.warmup_prompts:
            _run(folder / "warm", args, prompts[: args.warmup_prompts], WARMUP_TOKENS)
            _release()
        extra = ["--trace", str(args.trace)] if args.trace else []
        report, digest = _run(folder / "run", args, prompts, args.workload.gen_len, extra)
    assert report["generated_tokens"] == args.num_prompts * args.workload.gen_len
    assert not report["num_failed"]
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    result(
        args,
        peer="flexpipe",
        seconds=report["total_s"] - report["load_s"],
        load_s=report["load_s"],
        version=flexpipe.__version__,
        prefill_s=report["prefill_s"],
        step_s=report["decode_s"] / max(1, args.workload.gen_len - 1),
        details={
            "options": args.options,
            "decode_s": report["decode_s"],
            "policy": report["policy"],
            "links": report["links"],
            "lanes": report["lanes"],
            "tiers": report["tiers"],
            "bottleneck": report["bottleneck"],
            "notes": report["notes"],
            "output_sha256": digest,
        },
    ).print()


def _release() -> None:
    """Give back what the warm-up left, or the next plan counts it as used."""
    from flexpipe.job.bench import release_memory

    release_memory()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _run(
    folder: Path,
    args: Any,
    prompts: list[list[int]],
    max_tokens: int,
    extra: list[str] | None = None,
) -> tuple[dict[str, Any], str]:
    """The report of one job on these prompts, and a digest of its tokens."""
    from flexpipe.cli.main import main as flexpipe_main

    folder.mkdir()
    lines = (json.dumps({"id": i, "prompt_token_ids": ids}) for i, ids in enumerate(prompts))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["run", "--model", str(args.model), "--max-tokens", str(max_tokens)]
    arguments += ["-i", str(folder / "prompts.jsonl"), "-o", str(folder / "results.jsonl")]
    arguments += ["--offload-dir", str(folder / "offload"), "--ignore-eos", "--json"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            flexpipe_main([*arguments, *(extra or []), *shlex.split(args.options)])
    except SystemExit as exit:
        if exit.code:
            traceback.print_exc()
            sys.exit(exit.code)
    report = json.loads(out.getvalue().splitlines()[-1])
    records = map(json.loads, (folder / "results.jsonl").read_text("utf-8").splitlines())
    answers = sorted((record["id"], record["token_ids"]) for record in records)
    return report, hashlib.sha256(json.dumps(answers).encode()).hexdigest()


if __name__ == "__main__":
    main()
