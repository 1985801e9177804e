"""A file of prompts is read whole, or refused with the lines and reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import InputError
from flexpipe.job.request import Request, read_requests


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


def read(file: Path, content: str | bytes, max_tokens: int = 16) -> tuple[Request, ...]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_requests(file, max_tokens)


def fault(file: Path, content: str | bytes) -> str:
    with pytest.raises(InputError) as refusal:
        read(file, content)
    return str(refusal.value)


def test_json_lines_give_id_prompt_and_max_tokens(file: Path) -> None:
    requests = read(file, '{"id": "a", "prompt": "one", "max_tokens": 3}\n{"prompt": "two"}\n')
    assert requests == (Request(1, "a", "one", None, 3), Request(2, "2", "two", None, 16))


def test_plain_lines_are_prompts_numbered_by_line(file: Path) -> None:
    assert read(file, "one\n\n  two {\n") == (
        Request(1, "1", "one", None, 16),
        Request(3, "3", "  two {", None, 16),
    )


def test_token_ids_may_stand_for_the_prompt(file: Path) -> None:
    assert read(file, '{"prompt_token_ids": [5, 0]}')[0].prompt_token_ids == (5, 0)


def test_whole_number_ids_stay_numbers(file: Path) -> None:
    assert [request.id for request in read(file, '{"id": 7, "prompt": "x"}\n')] == [7]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_endings_bom_and_blank_lines_do_not_matter(
    file: Path, ending: str, bom: bytes
) -> None:
    lines = ["", '{"id": "é", "prompt": "日本語"}', "   ", '{"prompt": "b"}']
    requests = read(file, bom + ending.join(lines).encode())
    assert [(item.index, item.id, item.prompt) for item in requests] == [
        (2, "é", "日本語"),
        (4, "4", "b"),
    ]


@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_every_text_that_json_can_say_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str]
) -> None:
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    requests = read(tmp_path_factory.mktemp("any") / "prompts", "\n".join(lines))
    assert [request.prompt for request in requests] == prompts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("{" * 100_000, "not JSON"),
        ("plain", "not JSON"),
        ("[1]", "expected an object"),
        ("{}", "give either prompt or prompt_token_ids"),
        ('{"prompt": "x", "prompt_token_ids": [1]}', "give either"),
        ('{"prompt": "x", "prompt": "y"}', "given twice"),
        ('{"prompt": 3}', "prompt must be a text, got 3"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt": "x", "id": 1.5}', "id must be"),
        ('{"prompt": "x", "id": true}', "id must be"),
        ('{"prompt": "x", "id": null}', "id must be"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens must be a whole number from 1, got 0"),
        ('{"prompt": "x", "max_tokens": "9"}', "max_tokens must be"),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens must be"),
        ('{"prompt": "x", "temperature": 1}', "unknown key 'temperature'"),
        ('{"prompt_token_ids": [1, -1]}', "prompt_token_ids must be"),
        ('{"prompt_token_ids": []}', "prompt_token_ids is empty"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_faulty_line_is_named_with_its_reason(file: Path, line: str | bytes, reason: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    text = fault(file, b'{"id": "ok", "prompt": "x"}\n\n' + line)
    assert "1 of 2 lines" in text
    assert "line 3: " in text
    assert reason in text


@pytest.mark.parametrize(("one", "other"), [('"a"', '"a"'), ("1", '"1"'), ('"3"', None)])
def test_an_id_is_used_once(file: Path, one: str, other: str | None) -> None:
    second = f'{{"id": {other}, "prompt": "y"}}' if other else '{"prompt": "y"}'
    text = fault(file, f'{{"id": {one}, "prompt": "x"}}\n\n{second}')
    assert "line 3: id" in text and "was used in line 1" in text


def test_only_the_first_faults_are_shown(file: Path) -> None:
    text = fault(file, "{}\n" * 50)
    assert "50 of 50 lines" in text and "line 5:" in text and "line 6:" not in text
    assert text.endswith("and 45 more")


@pytest.mark.parametrize("content", ["", "\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(file: Path, content: str | bytes) -> None:
    assert "holds no prompts" in fault(file, content)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"cannot read the input file {path}"):
            read_requests(path, 16)
