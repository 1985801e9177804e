"""Where an answer's text reaches a stop string.

Tokens are not characters: a stop string may span several, a character may be split over several,
and what a token adds to the text depends on those before it. So after each token the last few are
decoded together, just enough of them to hold the longest stop string, and searched. The answer
ends with the first token after which the whole text so far holds a stop string; its text is cut
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# characters that later tokens may still take back: bytes shown one by one that become one character
_UNSETTLED_CHARS = 16
_NO_TEXT = "�"  # what decoders put where bytes are no text
_MOST_UNSETTLED = 1024  # tokens; an answer of nothing but such bytes must not cost more and more
_REPEATS = 4  # bytes of the longest character


class TextTail:
    """The end of one answer's text, as tokens arrive."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        """`decode` gives the text of ids without special tokens; `stop` is not empty."""
        self._decode = decode
        self._stop = tuple(stop)
        self._num_chars = max(map(len, self._stop)) + _UNSETTLED_CHARS
        self._ids: list[int] = []
        self._text = ""
        self._trim_at = 0

    def push(self, token: int) -> bool:
        """Whether the text holds a stop string now that `token` is there."""
        text = self._decode([*self._ids, token])
        if text == self._text and self._is_silent(token):
            return False
        self._ids.append(token)
        self._text = text
        if any(stop in text for stop in self._stop):
            return True
        if len(text) >= 2 * self._num_chars and len(self._ids) >= self._trim_at:
            self._trim()
        return False

    def _is_silent(self, token: int) -> bool:
        """Whether a token never shows, like a special one; one byte of several does, repeated."""
        return not self._decode([token] * _REPEATS)

    def _trim(self) -> None:
        """Forget the older half, if what is left reads as before.

        It does not if the cut goes through a character, so a few places are tried; without one the
        next try waits until there are twice as many tokens. Bytes that are no text stay: they may
        be what keeps those after them from being any.
        """
        half = len(self._ids) // 2
        for start in range(half, min(half + 2 * _REPEATS, len(self._ids))):
            text = self._decode(self._ids[start:])
            if text.startswith(_NO_TEXT) and len(self._ids) < _MOST_UNSETTLED:
                continue
            if len(text) >= self._num_chars and self._text.endswith(text):
                self._ids, self._text, self._trim_at = self._ids[start:], text, 0
                return
        self._trim_at = 2 * len(self._ids)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings in it."""
    starts = [start for start in map(text.find, stop) if start >= 0]
    return text[: min(starts)] if starts else text
