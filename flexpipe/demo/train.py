"""Trains the demo model: a small Llama that answers support tickets.

Decides tokenizer, architecture and recipe, and writes a Hugging Face model directory. What a ticket
is and which answer is right is left to `flexpipe.demo.tickets`. Tickets are drawn as training goes,
so none is seen twice and memorizing cannot help. Invariants: training only sees the train split;
the accuracy reported is that of the float16 weights as written, read back and run in float32.

The tokenizer adds nothing by itself: there is no bos token, a prompt is exactly the tokens of its
text, and the answer ends with `<|end|>` (eos). `<|pad|>` only fills batches.

Shapes in names: B rows, S tokens, N counted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flexpipe.demo.tickets import Ticket, ticket_stream, tickets

EOS, PAD = "<|end|>", "<|pad|>"
IGNORED = -100
NUM_HELD_OUT = 500
HELD_OUT_SEED = 0
TOKENIZER_TICKETS = 20_000
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Size of the model and how it is trained."""

    vocab_size: int = 2048
    hidden_size: int = 256
    ffn_size: int = 640
    num_layers: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 1024
    batch_tokens: int = 3072
    learning_rate: float = 2e-3
    warmup_share: float = 0.04  # of the training time
    weight_decay: float = 0.05
    prompt_weight: float = 0.1  # predicting prompts, too, lets copying form early
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Tickets of similar length, padded on the right; position s of a row predicts s + 1."""

    ids_BS: Tensor
    weight_BS: Tensor  # of predicting this token: 0 for padding and the first one


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a finished training run took."""

    num_steps: int
    num_tickets: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Share of held-out answers that are right, as a whole and field by field."""

    exact: float
    category: float
    priority: float
    order_id: float


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from train tickets; each digit stays a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = tickets("train", TOKENIZER_TICKETS, seed=recipe.seed)
    tokenizer.train_from_iterator((t.prompt + t.answer for t in corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model with tied embeddings and grouped key and value heads."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.ffn_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=64,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_ANSWER_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Batches without end; each pool of tickets is cut by length, then shuffled."""
    stream = ticket_stream("train", recipe.seed + 1)
    rng = random.Random(recipe.seed)
    while True:
        pool = _encode(list(islice(stream, 1024)), tokenizer)
        pool.sort(key=lambda row: len(row[0]) + len(row[1]))
        cuts = list(_cut(pool, recipe.batch_tokens))
        rng.shuffle(cuts)
        for rows in cuts:
            yield _pad(rows, recipe, tokenizer)


Row = tuple[list[int], list[int]]  # tokens of the prompt, tokens of the answer with its eos


def _encode(some: Sequence[Ticket], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    prompts = tokenizer([ticket.prompt for ticket in some])["input_ids"]
    answers = tokenizer([ticket.answer + EOS for ticket in some])["input_ids"]
    return list(zip(prompts, answers, strict=True))


def _cut(pool: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Runs of rows whose padded size stays within `batch_tokens`."""
    rows: list[Row] = []
    for row in pool:  # ascending, so this row would be the longest
        if rows and (len(rows) + 1) * (len(row[0]) + len(row[1])) > batch_tokens:
            yield rows
            rows = []
        rows.append(row)
    yield rows


def _pad(rows: Sequence[Row], recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Batch:
    shape = (len(rows), max(len(prompt) + len(answer) for prompt, answer in rows))
    ids_BS = torch.full(shape, int(tokenizer.pad_token_id))
    weight_BS = torch.zeros(shape)
    for b, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids_BS[b, :end] = torch.tensor(prompt + answer)
        weight_BS[b, 1 : len(prompt)] = recipe.prompt_weight
        weight_BS[b, len(prompt) : end] = 1.0
    return Batch(ids_BS, weight_BS)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted loss to train on, and the mean loss of answer tokens to look at."""
    # padding is on the right and causal attention never looks there: no mask needed
    hidden_BSD = model.model(input_ids=batch.ids_BS[:, :-1], use_cache=False).last_hidden_state
    weight_BS = batch.weight_BS[:, 1:]
    counted_BS = weight_BS > 0
    logits_NV = model.lm_head(hidden_BSD[counted_BS])
    weight_N = weight_BS[counted_BS]
    loss_N = functional.cross_entropy(logits_NV, batch.ids_BS[:, 1:][counted_BS], reduction="none")
    answer = loss_N.detach()[weight_N == 1.0].mean()
    return (loss_N * weight_N).sum() / weight_N.sum(), answer


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warmup, then a cosine down to zero; `progress` is the share of the time spent."""
    if progress < recipe.warmup_share:
        return recipe.learning_rate * max(progress, 1e-3) / recipe.warmup_share
    left = (1.0 - progress) / (1.0 - recipe.warmup_share)
    return recipe.learning_rate * 0.5 * (1.0 - math.cos(math.pi * max(left, 0.0)))


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seconds: float
) -> Training:
    """Train until the time is up; the schedule follows the clock, so any machine finishes it."""
    optimizer = _optimizer(model, recipe)
    started, num_tickets, shown = time.monotonic(), 0, 0.0
    model.train()
    for step, batch in enumerate(batches(recipe, tokenizer)):
        elapsed = time.monotonic() - started
        if elapsed >= seconds:
            return Training(num_steps=step, num_tickets=num_tickets, seconds=elapsed)
        answer_loss = _step(model, optimizer, batch, learning_rate(recipe, elapsed / seconds))
        num_tickets += len(batch.ids_BS)
        if elapsed - shown >= 10.0:
            shown = elapsed
            _say(f"{elapsed:6.0f} s  step {step}  {num_tickets} tickets  loss {answer_loss:.4f}")
    raise AssertionError("batches never end")


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch: Batch, rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, answer_loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(answer_loss)


def evaluate(directory: Path) -> Accuracy:
    """Accuracy of a written model on held-out tickets, in float32."""
    import json

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    wanted = list(tickets("held-out", NUM_HELD_OUT, HELD_OUT_SEED))
    got = answers(model, tokenizer, [ticket.prompt for ticket in wanted])
    for t, g in zip(wanted, got):
        if t.answer != g: _say(f"{t.prompt!r}\n   {t.answer}\n   {g}")
    def f(k):
        n=0
        for t, g in zip(wanted, got):
            try: n+= json.loads(t.answer)[k]==json.loads(g)[k]
            except Exception: pass
        return n/len(wanted)
    return Accuracy(exact=sum(t.answer==g for t,g in zip(wanted,got))/len(wanted), category=f("category"),priority=f("priority"),order_id=f("order_id"))


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[str]:
    """What the model says to each prompt, greedily."""
    said: list[str] = []
    for first in range(0, len(prompts), 50):
        some = tokenizer(list(prompts[first : first + 50]), padding=True, return_tensors="pt", padding_side="left")
        ids = model.generate(input_ids=some["input_ids"], attention_mask=some["attention_mask"])
        new = ids[:, some["input_ids"].shape[1] :]
        said += tokenizer.batch_decode(new, skip_special_tokens=True)
    return said


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[])
    o = parser.parse_args(arguments)
    recipe = Recipe(**{k: (int(v) if v.isdigit() else float(v)) for k, v in (x.split("=") for x in o.set)})
    torch.set_num_threads(o.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    _say(f"vocab {len(tokenizer)} params {sum(p.numel() for p in model.parameters())/1e6}")
    t=train(model, tokenizer, recipe, 60*o.minutes)
    _say(str(t))
    model.half().save_pretrained(o.output); tokenizer.save_pretrained(o.output)
    t0=time.time(); _say(str(evaluate(o.output))); _say(f"{time.time()-t0:.1f}s eval")

if __name__ == "__main__":
    main()
