"""Stop strings end an answer exactly where decoding all of it after each token would."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexpipe.job.stop import TextTail, cut_at_stop
from flexpipe.job.tokenizer import ByteTokenizer

Decode = Callable[[Sequence[int]], str]
BYTES = ByteTokenizer(256).decode
WORDS = ["the", "▁the", "▁", "▁▁", "a", "▁cat", "s", "é", "日", "\n", ".", "▁.", "Ġ"]
LLAMA_SIZE = 3 + 256 + len(WORDS)


def _llama() -> Decode:
    """Like Llama 2's: words with their space before them, and bytes for all else."""
    from tokenizers import Tokenizer, decoders, models

    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    model = models.BPE({word: id for id, word in enumerate(vocab)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def _gpt() -> Decode:
    """Like GPT-2's: pieces of UTF-8, cut anywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["æĹ", "¥æĹ", "Ġcat", "the", "ðŁ", "ĺĢ", "ĊĊ"]
    vocab = ["<s>", *alphabet, *pieces]
    tokenizer = Tokenizer(models.BPE({word: id for id, word in enumerate(vocab)}, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.ByteLevel()
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


DECODERS: dict[str, Decode] = {"bytes": BYTES, "llama": _llama(), "gpt": _gpt()}
SIZES = {"bytes": 256, "llama": LLAMA_SIZE, "gpt": 264}


def naive(decode: Decode, ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """The number of tokens after which the text of all of them holds a stop string."""
    for count in range(1, len(ids) + 1):
        if any(text in decode(ids[:count]) for text in stop):
            return count
    return None


def incremental(decode: Decode, ids: Sequence[int], stop: Sequence[str]) -> int | None:
    tail = TextTail(decode, stop)
    return next((count for count, id in enumerate(ids, start=1) if tail.push(id)), None)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[int], list[str]]:
    """Tokens with runs of bytes, of words and of one token, and stop strings found among them."""
    name = draw(st.sampled_from(sorted(DECODERS)))
    any_id = st.integers(0, SIZES[name] - 1)
    offset = 3 if name == "llama" else 0
    text = st.text("日é😀a€", max_size=8).map(lambda t: [byte + offset for byte in t.encode()])
    words = st.lists(st.integers(SIZES[name] - 13, SIZES[name] - 1), max_size=12)
    same = st.tuples(any_id, st.integers(1, 40)).map(lambda run: [run[0]] * run[1])
    parts = draw(st.lists(st.one_of(text, words, same, st.lists(any_id, max_size=5)), max_size=12))
    ids = [id for part in parts for id in part]
    shown = DECODERS[name](ids).replace("�", "")
    stop = [draw(st.text(max_size=3).filter(lambda t: "�" not in t)) or "x"]
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, max(0, len(shown) - 1)))
        stop.append(shown[start : start + draw(st.integers(1, 12))] or "y")
    return name, ids, stop


@settings(max_examples=200)
@given(answers())
@example(("llama", [3 + byte for byte in "日本".encode()] * 30 + [3 + 255] * 9, ["本日"]))
@example(("bytes", [255] * 500 + list(b"stop"), ["stop"]))
@example(("llama", [3 + byte for byte in b"\x80" + "a©ⴰ".encode() * 9 + b"a"], ["a"]))
def test_answer_ends_with_the_token_that_completes_a_stop_string(
    case: tuple[str, list[int], list[str]],
) -> None:
    name, ids, stop = case
    assert incremental(DECODERS[name], ids, stop) == naive(DECODERS[name], ids, stop)


@pytest.mark.parametrize("length", [1, 9, 40])
def test_long_answer_is_found_out_at_its_end(length: int) -> None:
    stop = ["".join(chr(0x4E00 + place) for place in range(length))]
    ids = list(("some text, " * 80 + stop[0] + "more").encode())
    end = incremental(BYTES, ids, stop)
    assert end == naive(BYTES, ids, stop)
    assert cut_at_stop(BYTES(ids[:end]), stop) == "some text, " * 80


def test_text_is_cut_before_the_first_stop_string() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one two", ["x"]) == "one two"


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("bytes", list(b"ordinary text ")),
        ("bytes", [255]),
        ("bytes", list("日".encode())),
        ("llama", [2]),
        ("llama", [3 + byte for byte in "é".encode()]),
        ("llama", [3 + 255]),
    ],
)
def test_cost_of_a_token_does_not_grow_with_the_answer(name: str, ids: list[int]) -> None:
    num_decoded = 0

    def decode(some: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(some)
        return DECODERS[name](some)

    tail = TextTail(decode, ["a stop string"])
    num_tokens = 4000
    for count in range(num_tokens):
        assert not tail.push(ids[count % len(ids)])
    is_text = "�" not in DECODERS[name](ids)
    assert num_decoded / num_tokens < (300 if is_text else 3000)
