"""The demo job, by flexpipe or by transformers' generate: seconds without the loading before.

transformers gets what a sensible user does: tickets sorted by length, batches padded on the left,
the answer's end token stopping each row, one short batch as a warm-up. flexpipe runs the file of
tickets as `flexpipe run` does, after a short job as its warm-up. Useful tokens are those of the
answers, the end token included.

    PYTHONPATH=. python -m benchmarks.peers.runner_demo --batch 64       # transformers
    PYTHONPATH=. python -m benchmarks.peers.runner_demo --options=...    # flexpipe
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_TOKENS = 64
WARMUP_TICKETS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=0, help="transformers at this batch size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--options", default="", help="of flexpipe run")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    from flexpipe.demo.tickets import tickets

    torch.set_num_threads(args.threads)
    asked = list(tickets("held-out", args.num, 0))
    seconds, texts, num_tokens = (
        _transformers(args, asked) if args.batch else _flexpipe(args, asked)
    )
    right = sum(
        texts[ticket.id].strip() == ticket.answer.strip() for ticket in asked if ticket.id in texts
    )
    told = {
        "engine": "transformers" if args.batch else "flexpipe",
        "batch": args.batch,
        "dtype": args.dtype,
        "options": args.options,
        "num": args.num,
        "seconds": seconds,
        "generated_tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "num_right": right,
    }
    print(json.dumps(told), flush=True)


def _model() -> Path:
    import flexpipe.demo.tickets

    return Path(flexpipe.demo.tickets.__file__).parent / "model"


def _transformers(args: Any, asked: Sequence[Any]) -> tuple[float, dict[str, str], int]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_model(), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(_model(), dtype=getattr(torch, args.dtype)).eval()

    def run(some: Sequence[Any]) -> tuple[dict[str, str], int]:
        texts: dict[str, str] = {}
        num_tokens = 0
        lengths = [len(ids) for ids in tokenizer([ticket.prompt for ticket in some])["input_ids"]]
        order = sorted(range(len(some)), key=lambda i: -lengths[i])
        for start in range(0, len(order), args.batch):
            batch = [some[i] for i in order[start : start + args.batch]]
            ids = tokenizer([t.prompt for t in batch], return_tensors="pt", padding=True)
            with torch.inference_mode():
                out = model.generate(**ids, do_sample=False, max_new_tokens=MAX_TOKENS)
            answers = out[:, ids["input_ids"].shape[1] :]
            num_tokens += int((answers != tokenizer.pad_token_id).sum())
            words = tokenizer.batch_decode(answers, skip_special_tokens=True)
            texts |= {ticket.id: text for ticket, text in zip(batch, words, strict=True)}
        return texts, num_tokens

    run(asked[:WARMUP_TICKETS])
    start_s = time.perf_counter()
    texts, num_tokens = run(asked)
    return time.perf_counter() - start_s, texts, num_tokens


def _flexpipe(args: Any, asked: Sequence[Any]) -> tuple[float, dict[str, str], int]:
    with tempfile.TemporaryDirectory(prefix="flexpipe-peers-", dir=Path.cwd()) as directory:
        _job(Path(directory) / "warm", args, asked[:WARMUP_TICKETS])
        report, texts = _job(Path(directory) / "run", args, asked)
    return report["total_s"] - report["load_s"], texts, report["generated_tokens"]


def _job(folder: Path, args: Any, asked: Sequence[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    from flexpipe.cli.main import main as flexpipe_main

    folder.mkdir()
    lines = (json.dumps({"id": ticket.id, "prompt": ticket.prompt}) for ticket in asked)
    (folder / "tickets.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["run", "--model", str(_model()), "--max-tokens", str(MAX_TOKENS), "--json"]
    words += ["-i", str(folder / "tickets.jsonl"), "-o", str(folder / "answers.jsonl")]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            flexpipe_main([*words, *shlex.split(args.options)])
    except SystemExit as exit:
        if exit.code:
            sys.exit(exit.code)
    records = map(json.loads, (folder / "answers.jsonl").read_text("utf-8").splitlines())
    report = json.loads(out.getvalue().splitlines()[-1])
    return report, {record["id"]: record["text"] for record in records}


if __name__ == "__main__":
    main()
