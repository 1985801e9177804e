"""What do 8 and 4 bits cost in answers: exact matches and perplexity of the demo model?

Each line compresses weights, KV cache, vocabulary (embedding and head) or several of them, always
in float32 otherwise. *Exact match* is the demo job, 500 tickets that training never saw, through
the engine (`flexpipe.LLM` with the policy's `compress_*` knobs). *Perplexity* is that of the right
answers, end token included, after their prompts: transformers' model of the same checkpoint, its
matrices replaced by what `flexpipe.kernels.codec` widens them to, and a cache that does the same to
every key and value before attention sees it, prompt tokens too, as the engine reads all of them
back. *By argmax* counts the answers of which every token is this model's first choice: what greedy
decoding would match, so a check of the engine by other means.

    PYTHONPATH=. python benchmarks/quality.py [--json FILE] [--num 500] [--only 8-bit]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.trial import machine, markdown
from flexpipe.api import LLM, SamplingParams
from flexpipe.cli.demo import MAX_TOKENS, MODEL
from flexpipe.demo.tickets import Ticket, tickets
from flexpipe.demo.train import EOS
from flexpipe.kernels import codec
from flexpipe.plan.codec import Codec
from flexpipe.plan.policy import Compression, Policy

ROWS = 50  # of one forward pass
IGNORED = -100
PARTS = ("compress_weight", "compress_cache", "compress_vocabulary")
CHOICES = {
    "weights": PARTS[:1],
    "KV cache": PARTS[1:2],
    "weights and KV cache": PARTS[:2],
    "vocabulary": PARTS[2:],
    "all three": PARTS,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line: the knobs that compress, in a policy file's words."""

    name: str
    compress_weight: Compression = "none"
    compress_cache: Compression = "none"
    compress_vocabulary: Compression = "none"
    compress_group: int = 64

    @property
    def given(self) -> dict[str, Any]:
        """What the engine is given: float32 but for what is compressed."""
        knobs = {key: value for key, value in asdict(self).items() if key != "name"}
        return {**knobs, "compute_dtype": "float32"}


def cases() -> Iterator[Case]:
    yield Case(name="none")
    levels: tuple[tuple[Compression, int], ...] = (("8", 64), ("4", 64), ("4", 32))
    for bits, group in levels:
        for what, parts in CHOICES.items():
            name = f"{bits}-bit, groups of {group}, {what}"
            yield Case(name=name, compress_group=group, **dict.fromkeys(parts, bits))


def exact_matches(case: Case, asked: Sequence[Ticket]) -> int:
    """Answers of the engine that are right to the letter."""
    llm = LLM(MODEL, policy=case.given, device="cpu")
    outputs = llm.generate(
        [ticket.prompt for ticket in asked], SamplingParams(max_tokens=MAX_TOKENS), use_tqdm=False
    )
    said = [output.outputs[0].text.strip() for output in outputs]
    return sum(text == ticket.answer for text, ticket in zip(said, asked, strict=True))


class RoundedCache(DynamicCache):
    """Keeps what keys and values are once compressed and widened again, head by head."""

    def __init__(self, kind: Codec | None) -> None:
        super().__init__()
        self._kind = kind

    def update(self, keys: Tensor, values: Tensor, *args: Any, **more: Any) -> Any:
        if self._kind is not None:
            keys, values = rounded(keys, self._kind), rounded(values, self._kind)
        return super().update(keys, values, *args, **more)


def rounded(x: Tensor, kind: Codec) -> Tensor:
    """Every row of numbers (the last dimension), there and back."""
    rows = x.flatten(0, -2)
    narrow = torch.empty(len(rows), kind.row_bytes(rows.shape[1]), dtype=torch.uint8)
    codec.compress(rows, kind, narrow)
    wide = torch.empty(rows.shape)
    codec.widen(narrow, kind, wide)
    return wide.view(x.shape)


def rounded_model(policy: Policy) -> Any:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        layer = ".layers." in name
        kind = policy.weight_codec if layer else policy.vocabulary_codec
        if kind is not None and weight.dim() == 2:
            weight.copy_(rounded(weight, kind))
    return model


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of the right answers."""

    perplexity: float
    num_tokens: int
    num_by_argmax: int  # answers whose every token comes first


def likelihood(policy: Policy, asked: Sequence[Ticket]) -> Likelihood:
    model, tokenizer = rounded_model(policy), AutoTokenizer.from_pretrained(MODEL)
    loss, num_tokens, by_argmax = 0.0, 0, 0
    for first in range(0, len(asked), ROWS):
        ids_BS, wanted_BS = _padded(tokenizer, asked[first : first + ROWS])
        cache = RoundedCache(policy.cache_codec)
        # padding is on the right, where causal attention never looks: no mask needed
        logits_BSV = model(input_ids=ids_BS, past_key_values=cache, use_cache=True).logits[:, :-1]
        wanted_BS = wanted_BS[:, 1:]
        counts = wanted_BS != IGNORED
        loss += float(F.cross_entropy(logits_BSV[counts], wanted_BS[counts], reduction="sum"))
        num_tokens += int(counts.sum())
        by_argmax += int(((logits_BSV.argmax(2) == wanted_BS) | ~counts).all(1).sum())
    perplexity = math.exp(loss / num_tokens)
    return Likelihood(perplexity=perplexity, num_tokens=num_tokens, num_by_argmax=by_argmax)


def _padded(tokenizer: Any, some: Sequence[Ticket]) -> tuple[Tensor, Tensor]:
    """Token ids, and the same where they are an answer's."""
    prompts = tokenizer([ticket.prompt for ticket in some])["input_ids"]
    answers = tokenizer([ticket.answer + EOS for ticket in some])["input_ids"]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids_BS = torch.full((len(some), longest), tokenizer.pad_token_id)
    wanted_BS = torch.full_like(ids_BS, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids_BS[row, :end] = torch.tensor(prompt + answer)
        wanted_BS[row, len(prompt) : end] = torch.tensor(answer)
    return ids_BS, wanted_BS


def measure(case: Case, asked: Sequence[Ticket]) -> dict[str, Any]:
    start = time.perf_counter()
    told = likelihood(Policy(**case.given), asked)
    right = exact_matches(case, asked)
    return {
        **asdict(case),
        **asdict(told),
        "num": len(asked),
        "num_right": right,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Shares of the tickets; perplexity with its distance from the first line's."""
    plain = lines[0]["perplexity"]
    rows = [
        (
            line["name"],
            f"{line['num_right'] / line['num']:.1%}",
            f"{line['num_by_argmax'] / line['num']:.1%}",
            f"{line['perplexity']:.5f}",
            f"{line['perplexity'] / plain - 1:+.3%}",
        )
        for line in lines
    ]
    return markdown(("", "exact match", "by argmax", "perplexity", "beside none"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", help="beginnings of the lines beside the first")
    args = parser.parse_args()
    asked = list(tickets("held-out", args.num, 0))
    lines = []
    for case in cases():
        if not lines or args.only is None or case.name.startswith(tuple(args.only)):
            with torch.inference_mode():
                lines.append(measure(case, asked))
            print(json.dumps(lines[-1]), flush=True)
    print(f"\n{table(lines)}")
    if args.json:
        facts = {"machine": machine(), "lines": lines}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
