"""Requests as a file gives them, one line at a time.

A file is JSON lines if it is named so or its first line that is not blank starts with "{", plain
prompts (one a line) otherwise. A line that cannot be used costs itself only: it comes as a
`BadLine` with the reason, between the requests of its neighbours. No more than one line is held at
a time, and of those before it only what finds an id again: some 150 bytes for each line of JSON.

Tokens are not counted here: that takes the tokenizer and is the job's work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flexpipe.errors import InputError, RunError
from flexpipe.job.params import SamplingParams, check_text, is_whole, shown
from flexpipe.units import MIB, format_bytes

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
PARAM_KEYS = tuple(field.name for field in fields(SamplingParams))
KEYS = ("id", *PROMPT_KEYS, *PARAM_KEYS)
JSON_SUFFIXES = (".jsonl", ".ndjson")
MAX_LINE_BYTES = 16 * MIB  # a longer line is bad; read, it may take several times as much
MAX_ID_CHARS = 1024  # a job keeps the ids of what waits
MAX_TOKEN_ID = 2**31 - 1
_CHUNK_BYTES = MIB
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt; exactly one of `prompt`, `messages` and `prompt_token_ids` is given.

    `index` is the line number, from 1, and `offset` the place of the line in the file. `id` is what
    the user wrote, a text or a whole number, and comes back as it is; without one it is the line
    number as a text.
    """

    index: int
    id: str | int
    params: SamplingParams
    prompt: str | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BadLine:
    """A line that cannot be run; `id` is what it called itself, if that much could be read."""

    index: int
    id: str | int | None
    reason: str
    offset: int = 0


class RequestFile:
    """The requests of a regular file, as often as they are asked for."""

    def __init__(self, path: Path, defaults: SamplingParams) -> None:
        """`defaults` hold where a line says nothing; an InputError if there is nothing to read."""
        self.path = path
        self.defaults = defaults
        self.is_json = _is_json(path)

    def __iter__(self) -> Iterator[Request | BadLine]:
        """Every line that is not blank, in order; the first line with an id keeps it."""
        first_lines: dict[bytes, int] = {}
        with _opened(self.path) as file:
            for line in read_lines(file):
                if not line.is_blank:
                    item = self._read(line)
                    # plain lines are named by their number, so no two are alike
                    yield _unless_used(item, first_lines) if self.is_json else item

    @property
    def has_text(self) -> bool:
        """Whether some line has text to encode; a model may come without a tokenizer otherwise."""
        requests = (item for item in self if isinstance(item, Request))
        return any(request.prompt_token_ids is None for request in requests)

    def at(self, offset: int, index: int) -> Request:
        """The request of line `index`, which starts at `offset`, read again."""
        with _opened(self.path) as file:
            file.seek(offset)
            for line in read_lines(file):
                item = self._read(line._replace(number=index, offset=offset))
                if isinstance(item, Request):
                    return item
                break
        raise InputError(f"{self.path} changed while the job ran: line {index} is no request now")

    def _read(self, line: Line) -> Request | BadLine:
        id = None
        try:
            text = _decode(line)
            if not self.is_json:
                return Request(
                    index=line.number,
                    id=str(line.number),
                    params=self.defaults,
                    prompt=text,
                    offset=line.offset,
                )
            values = _object(text)
            id = _id(values["id"]) if "id" in values else None
            return _request(line, id, values, self.defaults)
        except InputError as error:
            return BadLine(index=line.number, id=id, reason=str(error), offset=line.offset)


class Line(NamedTuple):
    """One line of a file, by its number from 1 and its first byte's place.

    `raw` ends with the newline if the file has one there. Of a line that is too long it holds only
    the beginning.
    """

    number: int
    offset: int
    raw: bytes
    is_too_long: bool

    @property
    def content(self) -> bytes:
        """Without the byte order mark of the file and without CR and LF."""
        raw = self.raw.removesuffix(b"\n").removesuffix(b"\r")
        return raw if self.offset else raw.removeprefix(_BOM)

    @property
    def is_blank(self) -> bool:
        return not self.is_too_long and not self.content.strip()


def read_lines(file: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Lines from where `file` stands, blank ones too; it holds no more than one.

    Only a newline ends a line: a prompt may hold U+2028.
    """
    number = offset = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        is_too_long = len(raw) > max_bytes and not raw.endswith(b"\n")
        yield Line(number, offset, raw, is_too_long)
        offset += len(raw)
        while is_too_long and (rest := file.readline(_CHUNK_BYTES)):
            offset += len(rest)
            is_too_long = not rest.endswith(b"\n")


def is_stream(path: Path) -> bool:
    """Whether what `path` names can be read only once: standard input, a pipe, a terminal."""
    return str(path) == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def spool(stream: BinaryIO, directory: Path) -> Path:
    """Copy what can be read only once to a file in `directory`, piece by piece."""
    path = directory / "input"
    try:
        with path.open("wb") as file:
            while chunk := stream.read(_CHUNK_BYTES):
                file.write(chunk)
    except OSError as error:
        raise RunError(f"cannot keep the input in {directory}: {error.strerror}") from error
    return path


def id_digest(id: str | int) -> bytes:
    """16 bytes that stand for an id; 1 and "1" are the same one."""
    return hashlib.blake2b(str(id).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def check_messages(value: object) -> tuple[dict[str, str], ...]:
    """A chat as chat templates take it: a list of {role, content}, both texts."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"messages must be a list of {{role, content}}, got {shown(value)}")
    if not value:
        raise InputError("messages is empty")
    return tuple(_message(f"messages[{place}]", item) for place, item in enumerate(value))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read the input file {path}: {error.strerror}") from error


def _is_json(path: Path) -> bool:
    if is_stream(path):  # opening a pipe would wait for its writer
        raise InputError(f"the input file {path} can be read only once; copy it to a file first")
    with _opened(path) as file:
        for line in read_lines(file):
            if not line.is_blank:
                named = path.suffix.lower() in JSON_SUFFIXES
                return named or line.content.lstrip().startswith(b"{")
    raise InputError(f"{path} holds no prompts; it takes JSON lines or one prompt a line")


def _decode(line: Line) -> str:
    if line.is_too_long:
        raise InputError(f"the line is longer than {format_bytes(MAX_LINE_BYTES)}")
    content = line.content
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise InputError(f"not UTF-8 (byte {byte:#04x} at {error.start})") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at character {error.pos})") from None
    except ValueError:  # Python reads no whole number of thousands of digits
        raise InputError("not JSON that can be read (a number has too many digits)") from None
    except RecursionError:
        raise InputError("not JSON that can be read (nested too deep)") from None
    if not isinstance(value, dict):
        raise InputError(f'expected an object like {{"prompt": …}}, got {shown(value)}')
    return value


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise InputError(f"the key {shown(key)} is given twice")
        value[key] = item
    return value


def _no_constant(name: str) -> None:
    raise InputError(f"not JSON ({name} is no number there)")


def _id(value: object) -> str | int:
    if isinstance(value, str):
        check_text("id", value)
    elif not is_whole(value):
        raise InputError(f"id must be a text or a whole number, got {shown(value)}")
    if len(str(value)) > MAX_ID_CHARS:
        raise InputError(f"id is longer than {MAX_ID_CHARS} characters")
    return value


def _request(
    line: Line, id: str | int | None, values: Mapping[str, Any], defaults: SamplingParams
) -> Request:
    for key in values:
        if key not in KEYS:
            raise InputError(f"unknown key {shown(key)}; known are {', '.join(KEYS)}")
    if sum(key in values for key in PROMPT_KEYS) != 1:
        raise InputError("give one of prompt, messages and prompt_token_ids")
    own = {key: values[key] for key in PARAM_KEYS if key in values}
    return Request(
        index=line.number,
        id=str(line.number) if id is None else id,
        params=replace(defaults, **own) if own else defaults,
        prompt=_prompt(values["prompt"]) if "prompt" in values else None,
        messages=check_messages(values["messages"]) if "messages" in values else None,
        prompt_token_ids=(
            _token_ids(values["prompt_token_ids"]) if "prompt_token_ids" in values else None
        ),
        offset=line.offset,
    )


def _unless_used(item: Request | BadLine, first_lines: dict[bytes, int]) -> Request | BadLine:
    if isinstance(item, BadLine):
        return item
    first = first_lines.setdefault(id_digest(item.id), item.index)
    if first == item.index:
        return item
    reason = f"id {shown(item.id)} was used in line {first}"
    return BadLine(index=item.index, id=item.id, reason=reason, offset=item.offset)


def _prompt(value: object) -> str:
    if value == "":
        raise InputError("prompt is empty")
    return check_text("prompt", value)


def _token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InputError(f"prompt_token_ids must be a list of token ids, got {shown(value)}")
    if not value:
        raise InputError("prompt_token_ids is empty")
    for item in value:
        if not is_whole(item) or not 0 <= item <= MAX_TOKEN_ID:
            raise InputError(f"prompt_token_ids must be a list of token ids, got {shown(item)}")
    return tuple(value)


def _message(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        raise InputError(f"{name} must be {{role, content}}, got {_shown_keys(value)}")
    message = {key: check_text(f"{name}.{key}", value[key]) for key in ("role", "content")}
    if not message["role"]:
        raise InputError(f"{name}.role is empty")
    return message


def _shown_keys(value: object) -> str:
    if not isinstance(value, Mapping):
        return shown(value)
    return f"the keys {shown(', '.join(map(str, value)))}"
