"""Requests as a file gives them.

A file is JSON lines if its first line that is not blank starts with "{", plain prompts (one a line)
otherwise. All lines are read and checked before anything runs, so one error tells the first few
faults of the file. Tokens are not counted here: that takes the tokenizer and is the job's work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpipe.errors import InputError

KEYS = ("id", "prompt", "prompt_token_ids", "max_tokens")
_SHOWN_FAULTS = 5


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of the input file; exactly one of `prompt` and `prompt_token_ids` is given.

    `index` is the line number, from 1. `id` is what the user wrote, a text or a whole number, and
    comes back as it is.
    """

    index: int
    id: str | int
    prompt: str | None
    prompt_token_ids: tuple[int, ...] | None
    max_tokens: int


class _Fault(Exception):
    """Why one line cannot be used."""


def read_requests(path: Path, default_max_tokens: int) -> tuple[Request, ...]:
    """All requests of `path` in its order, or one InputError that lists the first faulty lines."""
    lines = list(_numbered_lines(path))
    if not lines:
        raise InputError(f"{path} holds no prompts; it takes JSON lines or one prompt a line")
    read = _read_json if lines[0][1].lstrip().startswith(b"{") else _read_text
    requests, faults, lines_by_id = [], [], dict[str, int]()
    for index, line in lines:
        try:
            request = read(index, _decode(line), default_max_tokens)
            first = lines_by_id.setdefault(str(request.id), index)
            if first != index:
                raise _Fault(f"id {request.id!r} was used in line {first}")
            requests.append(request)
        except _Fault as fault:
            faults.append(f"line {index}: {fault}")
    if faults:
        raise InputError(_listed(path, faults, len(lines)))
    return tuple(requests)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with something in them. Only a newline ends a line: a prompt may hold U+2028."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the input file {path}: {error.strerror}") from error
    for index, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if line.strip():
            yield index, line


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(f"not UTF-8 (byte {line[error.start]:#04x} at {error.start})") from None


def _read_text(index: int, line: str, default_max_tokens: int) -> Request:
    return Request(index, str(index), line, None, default_max_tokens)


def _read_json(index: int, line: str, default_max_tokens: int) -> Request:
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise _Fault(f'expected an object like {{"prompt": …}}, got {_shown(value)}')
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise _Fault(f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    if ("prompt" in value) == ("prompt_token_ids" in value):
        raise _Fault("give either prompt or prompt_token_ids")
    return Request(
        index,
        _id(value.get("id", str(index))),
        _prompt(value["prompt"]) if "prompt" in value else None,
        _token_ids(value["prompt_token_ids"]) if "prompt_token_ids" in value else None,
        _max_tokens(value.get("max_tokens", default_max_tokens)),
    )


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def _id(value: object) -> str | int:
    if isinstance(value, str):
        return _encodable("id", value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _Fault(f"id must be a text or a whole number, got {_shown(value)}")


def _prompt(value: object) -> str:
    if not isinstance(value, str):
        raise _Fault(f"prompt must be a text, got {_shown(value)}")
    if not value:
        raise _Fault("prompt is empty")
    return _encodable("prompt", value)


def _encodable(key: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Fault(f"{key} holds half of a surrogate pair") from None
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(_is_count(item) for item in value):
        raise _Fault(f"prompt_token_ids must be a list of token ids, got {_shown(value)}")
    if not value:
        raise _Fault("prompt_token_ids is empty")
    return tuple(value)


def _max_tokens(value: object) -> int:
    if not isinstance(value, int) or not _is_count(value) or value < 1:
        raise _Fault(f"max_tokens must be a whole number from 1, got {_shown(value)}")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(path: Path, faults: Sequence[str], num_lines: int) -> str:
    shown = "\n".join(f"  {fault}" for fault in faults[:_SHOWN_FAULTS])
    more = len(faults) - _SHOWN_FAULTS
    tail = f"\n  and {more} more" if more > 0 else ""
    return (
        f"{path}: {len(faults)} of {num_lines} lines cannot be used; nothing was run\n{shown}{tail}"
    )
