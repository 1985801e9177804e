"""Claims about the generated tickets and about the model that comes with the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexpipe.demo import tickets as tickets_module
from flexpipe.demo.tickets import (
    CATEGORIES,
    CUE,
    PRIORITIES,
    Split,
    Ticket,
    all_templates,
    is_held_out_number,
    tickets,
)

MODEL = Path(tickets_module.__file__).parent / "model"
SPLITS: tuple[Split, ...] = ("train", "held-out")


def order_of(ticket: Ticket) -> str | None:
    order: str | None = json.loads(ticket.answer)["order_id"]
    return order


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_gives_the_same_tickets_and_another_seed_others(split: Split) -> None:
    assert list(tickets(split, 50, seed=3)) == list(tickets(split, 50, seed=3))
    others = {ticket.prompt for ticket in tickets(split, 50, seed=4)}
    assert not others & {ticket.prompt for ticket in tickets(split, 50, seed=3)}


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    assert list(tickets("held-out", 10, seed=0)) == list(tickets("held-out", 30, seed=0))[:10]


def test_held_out_templates_never_occur_in_training() -> None:
    assert not all_templates("train") & all_templates("held-out")


@pytest.mark.parametrize("split", SPLITS)
def test_order_numbers_come_from_the_ranges_of_their_split(split: Split) -> None:
    orders = [order for ticket in tickets(split, 2000, seed=1) if (order := order_of(ticket))]
    numbers = [int(re.sub(r"\D", "", order)) for order in orders]
    assert {is_held_out_number(number) for number in numbers} == {split == "held-out"}
    assert {len(str(number)) for number in numbers} == {4, 5, 6, 7}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_compact_json_with_known_words(split: Split) -> None:
    for ticket in tickets(split, 500, seed=2):
        answer = json.loads(ticket.answer)
        assert json.dumps(answer, separators=(",", ":")) == ticket.answer
        assert list(answer) == ["category", "priority", "order_id"]
        assert answer["category"] in CATEGORIES
        assert answer["priority"] in PRIORITIES


@pytest.mark.parametrize("split", SPLITS)
def test_every_category_priority_and_a_missing_order_id_occur(split: Split) -> None:
    answers = [json.loads(ticket.answer) for ticket in tickets(split, 1000, seed=0)]
    assert {answer["category"] for answer in answers} == set(CATEGORIES)
    assert {answer["priority"] for answer in answers} == set(PRIORITIES)
    assert 50 < sum(answer["order_id"] is None for answer in answers) < 200


@pytest.mark.parametrize("split", SPLITS)
def test_prompt_holds_the_order_id_and_ends_with_the_cue(split: Split) -> None:
    for ticket in tickets(split, 500, seed=5):
        assert ticket.prompt.endswith(CUE)
        assert "{" not in ticket.prompt
        order = order_of(ticket)
        assert order is None or order in ticket.prompt


def test_hardly_any_prompt_occurs_twice() -> None:
    prompts = [ticket.prompt for ticket in tickets("train", 5000, seed=0)]
    assert len(set(prompts)) > 0.999 * len(prompts)


def test_generator_runs_as_a_module_and_loads_no_torch() -> None:
    code = (
        "import sys, flexpipe.demo.tickets as t; t.main(['--num', '3', '--seed', '7']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [Ticket(**json.loads(line)) for line in done.stdout.splitlines()]
    assert lines == list(tickets("held-out", 3, seed=7))


def test_committed_model_fits_ten_megabytes_in_float16() -> None:
    from safetensors import safe_open

    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 10_000_000
    with safe_open(weights, framework="np") as opened:
        dtypes = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert dtypes == {"F16"}


def test_committed_config_names_a_llama_that_stops_at_eos() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(MODEL)
    generation = transformers.GenerationConfig.from_pretrained(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.max_position_embeddings >= 1024
    assert config.vocab_size == len(tokenizer)
    assert generation.eos_token_id == config.eos_token_id == tokenizer.eos_token_id


def test_committed_tokenizer_adds_nothing_and_gives_back_any_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    for text in (*(t.prompt for t in tickets("held-out", 50, seed=1)), "Zoë owes 12,50 €  \n日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("A-10442")[-5:] == ["1", "0", "4", "4", "2"]


def test_lengths_in_tokens_really_vary() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    held_out = list(tickets("held-out", 500, seed=0))
    prompts = sorted(len(ids) for ids in tokenizer([t.prompt for t in held_out])["input_ids"])
    answers = {len(ids) for ids in tokenizer([t.answer for t in held_out])["input_ids"]}
    assert prompts[10] < 40 and prompts[-10] > 150
    assert len(answers) >= 8
