"""What every runner is asked and what it answers: prompts, clocks, one JSON line.

Loads without torch or flexpipe, since each peer runs in an environment of its own. A runner loads,
warms up once, runs `num_prompts` prompts of random tokens greedily to the full number of tokens
(EOS ignored), and prints a `Result` as its last line. Seconds count from the first prompt going in
to the last token coming out; loading and warming up lie before. A runner with a `--budget-s` stops
decoding when that is spent and projects the missing steps at the mean of those it timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIRST_PLAIN_TOKEN = 4  # those before it are special
MIN_STEPS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens in, tokens out."""

    prompt_len: int
    gen_len: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        prompt_len, gen_len = map(int, text.split("/"))
        return cls(prompt_len, gen_len)

    def __str__(self) -> str:
        return f"{self.prompt_len}/{self.gen_len}"


def make_prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` random plain tokens; the same arguments give the same ones."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_PLAIN_TOKEN, vocab) for _ in range(length)] for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run of a peer came to."""

    peer: str
    batch: int
    workload: str
    num_prompts: int
    generated_tokens: int
    seconds: float
    tokens_per_s: float
    load_s: float
    peak_rss: int
    threads: int
    version: str
    prefill_s: float | None = None
    step_s: float | None = None
    projected: str | None = None  # how the seconds were projected, where they were
    details: dict[str, Any] = field(default_factory=dict)

    def print(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def result(
    args: argparse.Namespace, *, peer: str, seconds: float, load_s: float, version: str, **more: Any
) -> Result:
    generated = args.num_prompts * args.workload.gen_len
    return Result(
        peer=peer,
        batch=args.batch,
        workload=str(args.workload),
        num_prompts=args.num_prompts,
        generated_tokens=generated,
        seconds=seconds,
        tokens_per_s=generated / seconds,
        load_s=load_s,
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        threads=args.threads,
        version=version,
        **more,
    )


@dataclass(frozen=True, slots=True)
class Timed:
    """Clock readings of one batch: seconds after its start at which each token was there."""

    token_s: tuple[float, ...]
    gen_len: int
    total_s: float

    @property
    def prefill_s(self) -> float:
        return self.token_s[0]

    @property
    def step_s(self) -> float:
        steps = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / steps if steps else 0.0

    @property
    def missing_steps(self) -> int:
        return self.gen_len - len(self.token_s)

    @property
    def seconds(self) -> float:
        """Of the whole batch, missing steps at the mean of the timed ones."""
        return self.total_s + self.missing_steps * self.step_s


def run_batches(
    args: argparse.Namespace,
    prompts: Sequence[Sequence[int]],
    generate: Callable[[Sequence[Sequence[int]], Clock], None],
) -> dict[str, Any]:
    """Time `generate` on the prompts, a batch at a time; the fields of a result it came to."""
    runs: list[Timed] = []
    for start in range(0, len(prompts), args.batch):
        clock = Clock(args.workload.gen_len, args.budget_s)
        generate(prompts[start : start + args.batch], clock)
        runs.append(clock.timed())
    missing = sum(run.missing_steps for run in runs)
    timed = sum(len(run.token_s) - 1 for run in runs)
    return {
        "seconds": sum(run.seconds for run in runs),
        "prefill_s": sum(run.prefill_s for run in runs),
        "step_s": sum(run.step_s for run in runs) / len(runs),
        "projected": f"{missing} decode steps at the mean of {timed}" if missing else None,
    }


class Clock:
    """Reads the time when a batch has a token more, and says when the budget is spent."""

    def __init__(self, gen_len: int, budget_s: float | None) -> None:
        self._gen_len = gen_len
        self._budget_s = budget_s
        self._token_s: list[float] = []
        self._start_s = time.perf_counter()

    def token(self) -> bool:
        """Every row has one more token; whether to stop here."""
        self._token_s.append(time.perf_counter() - self._start_s)
        done = len(self._token_s)
        if done >= self._gen_len:
            return True
        spent = self._budget_s is not None and self._token_s[-1] > self._budget_s
        return spent and done > min(MIN_STEPS, self._gen_len - 1)

    def timed(self) -> Timed:
        total_s = time.perf_counter() - self._start_s
        return Timed(tuple(self._token_s), self._gen_len, total_s)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all runners share."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, or GGUF")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workload", type=Workload.parse, required=True, metavar="IN/OUT")
    parser.add_argument("--num-prompts", type=int, help="default: one batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, help="stop decoding then, and project")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and set the thread count before anything is imported that reads it."""
    args = parser.parse_args()
    args.num_prompts = args.num_prompts or args.batch
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    return args


def vocab_size(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return int(config["vocab_size"])
