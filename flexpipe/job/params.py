"""How one answer is sampled and where it ends.

The names are those that vLLM's users know; the default temperature is 0, which is greedy. A value
of the wrong type or out of range is refused when the params are made, by the name of its field, so
a line of a file, an option and a Python call are told the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeGuard

from flexpipe.errors import InputError

MAX_TEMPERATURE = 100.0  # far past any use; keeps the quotient finite in float32
GREEDY_BELOW = 1e-5  # a temperature this close to 0 samples nothing but the likeliest token
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_STOPS = 64
MAX_STOP_CHARS = 1024  # the text looked at after each token is about twice as long
_SHOWN_CHARS = 40
_NO_TEXT = "�"  # what decoders put where bytes are no text


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What a request may choose.

    `top_k` 0 keeps all tokens and so does -1, which becomes 0; `stop` takes one text or several and
    becomes a tuple. An answer ends at the model's end-of-sequence tokens unless `ignore_eos`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        temperature = _number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        top_p = _number("top_p", self.top_p, 0, 1, above=True)
        _check_whole("top_k", self.top_k, -1, MAX_TOKENS)
        _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_flag("ignore_eos", self.ignore_eos)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", top_p)
        object.__setattr__(self, "top_k", max(0, self.top_k))
        object.__setattr__(self, "stop", _stops(self.stop))

    @property
    def is_greedy(self) -> bool:
        """Whether only the likeliest token can come next."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1


def shown(value: object) -> str:
    """A value as a file would write it, short enough for a message whatever it is."""
    if isinstance(value, str):
        text = json.dumps(value[:_SHOWN_CHARS], ensure_ascii=not value.isprintable())
        return text if len(value) <= _SHOWN_CHARS else f'{text[:-1]}…"'
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, (bool, int, float)):
        text = json.dumps(value)
        return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
    return f"a {type(value).__name__}"


def check_text(name: str, value: object) -> str:
    """`value` if it is a text that UTF-8 can say."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name} holds half of a surrogate pair") from None
    return value


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """`value` if it is a number in the range; `above` leaves `low` itself out."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN compares false; whole numbers of any size compare exactly
    if is_number and low <= value <= high and not (above and value == low):
        return float(value)
    bounds = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
    raise InputError(f"{name} must be a number {bounds}, got {shown(value)}")


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not is_whole(value) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {shown(value)}")


def _stops(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise InputError(f"stop must be a text or a list of texts, got {shown(value)}")
    if len(texts) > MAX_STOPS:
        raise InputError(f"stop takes up to {MAX_STOPS} texts, got {len(texts)}")
    return tuple(_stop(text) for text in texts)


def _stop(value: object) -> str:
    text = check_text("stop", value)
    if not 1 <= len(text) <= MAX_STOP_CHARS:
        raise InputError(
            f"stop must hold texts of 1 to {MAX_STOP_CHARS} characters, got one of {len(text)}"
        )
    if _NO_TEXT in text:
        raise InputError("stop holds U+FFFD, which stands for bytes that are no text")
    return text
