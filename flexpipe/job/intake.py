"""What a job has to do: the lines of its input, tokenized and judged one by one.

A line that cannot be run costs itself: it becomes a `BadLine` with the reason. Of the others only a
few numbers are kept (`Entry`); text and tokens are read again when a row takes its place, so a file
of a hundred thousand lines needs no more memory than its rows in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flexpipe.errors import InputError
from flexpipe.job.batcher import Admitted, Entry
from flexpipe.job.request import BadLine, Request, RequestFile
from flexpipe.job.stop import TextTail
from flexpipe.job.tokenizer import Tokenizer
from flexpipe.model.config import ModelConfig

# what is tokenized at once: the tokenizer is several times faster on many texts
_GROUP_LINES = 256
_GROUP_CHARS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Intake:
    """Turns lines into entries, and entries into rows."""

    file: RequestFile
    tokenizer: Tokenizer
    config: ModelConfig
    eos_token_ids: frozenset[int]

    def judge(self, items: Iterable[Request | BadLine]) -> Iterator[Entry | BadLine]:
        """Each line as an entry that fits the model, or as a line that cannot be run."""
        for some in _groups(items):
            tokens = self._tokenize(some)
            for item, ids in zip(some, tokens, strict=True):
                yield item if isinstance(item, BadLine) else self._entry(item, ids)

    def admit(self, entry: Entry, generated: Sequence[int] = ()) -> Admitted:
        """A waiting request with its tokens; `generated` came from an earlier run."""
        request = self.file.at(entry.offset, entry.index)
        (tokens,) = self._tokenize([request])
        if isinstance(tokens, InputError):
            raise tokens
        params = request.params
        stop = TextTail(self.tokenizer.decode, params.stop) if params.stop else None
        for token in generated if stop else ():
            assert stop is not None
            stop.push(token)
        return Admitted(
            entry=entry,
            tokens=tokens,
            params=params,
            eos_token_ids=frozenset() if params.ignore_eos else self.eos_token_ids,
            stop=stop,
            generated=tuple(generated),
        )

    def _entry(self, request: Request, tokens: tuple[int, ...] | InputError) -> Entry | BadLine:
        reason = str(tokens) if isinstance(tokens, InputError) else self._fault(request, tokens)
        if reason is not None:
            return BadLine(index=request.index, id=request.id, reason=reason, offset=request.offset)
        assert not isinstance(tokens, InputError)
        most = request.params.max_tokens
        return Entry(request.index, request.id, request.offset, len(tokens), most)

    def _tokenize(self, items: Sequence[Request | BadLine]) -> list[tuple[int, ...] | InputError]:
        """Ids for each item: its own, its messages' or its text's; () for a bad line."""
        texts = [item.prompt for item in items if isinstance(item, Request) and item.prompt]
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else ())
        return [self._ids(item, encoded) for item in items]

    def _ids(
        self, item: Request | BadLine, encoded: Iterator[list[int]]
    ) -> tuple[int, ...] | InputError:
        if isinstance(item, BadLine):
            return ()
        if item.prompt:
            return tuple(next(encoded))
        if item.messages is None:
            return item.prompt_token_ids or ()
        try:
            return tuple(self.tokenizer.encode_messages(item.messages))
        except InputError as error:
            return error

    def _fault(self, request: Request, tokens: Sequence[int]) -> str | None:
        if not tokens:
            return "the prompt has no tokens"
        limit, most = self.config.max_positions, request.params.max_tokens
        if len(tokens) + most > limit:
            return (
                f"{len(tokens)} prompt tokens and max_tokens {most} make {len(tokens) + most}, "
                f"more than the model's {limit} positions; lower max_tokens to "
                f"{max(0, limit - len(tokens))} or shorten the prompt"
            )
        if max(tokens) >= self.config.vocab_size:
            return f"token {max(tokens)} lies outside the vocabulary of {self.config.vocab_size}"
        return None


def _groups(items: Iterable[Request | BadLine]) -> Iterator[list[Request | BadLine]]:
    """Neighbours, so many that their text stays small."""
    group: list[Request | BadLine] = []
    num_chars = 0
    for item in items:
        group.append(item)
        num_chars += len(item.prompt or "") if isinstance(item, Request) else 0
        if len(group) == _GROUP_LINES or num_chars >= _GROUP_CHARS:
            yield group
            group, num_chars = [], 0
    if group:
        yield group
