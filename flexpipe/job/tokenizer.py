"""Text to token ids and back.

A checkpoint's own tokenizer, through transformers, reading local files only; without one (a dummy
model has no files) UTF-8 bytes stand in. transformers is imported when a tokenizer is opened, and
of it as little as the checkpoint allows: a tokenizer that says it is the plain fast one needs
neither torch nor the table of all model families.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexpipe.errors import InputError, ModelError
from flexpipe.job.request import check_messages

# any one of these holds a vocabulary; tokenizer_config.json alone does not
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class Tokenizer(ABC):
    """What a job asks of a tokenizer."""

    @staticmethod
    def open(
        directory: Path | None, vocab_size: int, *, bytes_if_missing: bool = False
    ) -> Tokenizer:
        """The tokenizer in `directory`; without its files bytes, if that is allowed."""
        if directory is not None and any((directory / name).is_file() for name in TOKENIZER_FILES):
            return CheckpointTokenizer(directory, vocab_size)
        if bytes_if_missing:
            return ByteTokenizer(vocab_size)
        raise ModelError(
            f"no tokenizer in {directory}: looked for {', '.join(TOKENIZER_FILES)}. "
            "Copy the tokenizer's files beside the checkpoint"
        )

    @property
    @abstractmethod
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as far as the tokenizer knows; the model's config may add some."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, with the special tokens that the tokenizer puts around one."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a chat and of what opens the answer, by the model's chat template.

        An InputError says why there are none; it is one request's, like a misshapen prompt.
        """
        check_messages(messages)
        raise InputError("this model has no chat template; give prompt instead of messages")

    def encode(self, text: str) -> list[int]:
        """`encode_batch` of one text; slower than a batch."""
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids, modulo the vocabulary: enough to run a model of random weights."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return ()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte % self._vocab_size for byte in text.encode("utf-8")] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id % 256 for id in ids).decode("utf-8", errors="replace")


class CheckpointTokenizer(Tokenizer):
    """The tokenizer that lies beside a checkpoint, as transformers reads it."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._tokenizer = _load(directory)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (int(eos),)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._ids(list(texts))

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        chat = list(check_messages(messages))
        if not self._tokenizer.chat_template:
            return super().encode_messages(chat)
        try:
            text = self._tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is a program; what it refuses it says
            raise InputError(f"the chat template refuses these messages: {error}") from error
        return self._ids([text], add_special_tokens=False)[0]  # the template wrote them

    def _ids(self, texts: list[str], **settings: Any) -> list[list[int]]:
        # verbose=False: prompts longer than the model are the job's to refuse, with their id
        batch: list[list[int]] = self._tokenizer(texts, verbose=False, **settings)["input_ids"]
        largest = max((id for ids in batch for id in ids), default=0)
        if largest >= self._vocab_size:
            raise ModelError(
                f"the tokenizer in {self._directory} gives token {largest}, but the model has "
                f"only {self._vocab_size}; the two do not belong together"
            )
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _load(directory: Path) -> Any:
    try:
        return _class_for(directory).from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever the file's reader raised
        raise ModelError(f"cannot read the tokenizer in {directory}: {error}") from error


def _class_for(directory: Path) -> Any:
    if (directory / "tokenizer.json").is_file() and _declared_class(directory) in _PLAIN_CLASSES:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _declared_class(directory: Path) -> str | None:
    try:
        content = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = content.get("tokenizer_class") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None
