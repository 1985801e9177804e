"""A file of prompts is read line by line; a bad line costs itself and is told with its reason."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flexpipe.job.request
from flexpipe.errors import InputError, RunError
from flexpipe.job.params import SamplingParams
from flexpipe.job.request import (
    BadLine,
    Request,
    RequestFile,
    is_stream,
    spool,
)

DEFAULTS = SamplingParams(max_tokens=16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


def read(file: Path, content: str | bytes) -> list[Request | BadLine]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(RequestFile(file, DEFAULTS))


def good(file: Path, content: str | bytes) -> list[Request]:
    items = read(file, content)
    assert not [item for item in items if isinstance(item, BadLine)]
    return [item for item in items if isinstance(item, Request)]


def test_json_lines_give_what_they_say_and_the_defaults_else(file: Path) -> None:
    line = {"id": "a", "prompt": "one", "max_tokens": 3, "temperature": 0.5, "stop": "\n"}
    content = json.dumps(line) + '\n{"prompt": "two"}\n'
    assert read(file, content) == [
        Request(
            index=1,
            id="a",
            prompt="one",
            params=SamplingParams(max_tokens=3, temperature=0.5, stop=("\n",)),
        ),
        Request(index=2, id="2", prompt="two", params=DEFAULTS, offset=content.index("\n") + 1),
    ]


def test_each_param_of_a_line_wins_over_its_default(file: Path) -> None:
    own = {
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "seed": 3,
        "max_tokens": 5,
        "stop": ["a", "b"],
        "ignore_eos": True,
    }
    assert set(own) == set(SamplingParams.__dataclass_fields__)
    line = json.dumps({"prompt": "x", **own})
    assert good(file, line)[0].params == SamplingParams(**own)  # type: ignore[arg-type]


def test_empty_list_of_stop_strings_takes_the_default_ones_back(file: Path) -> None:
    file.write_text('{"prompt": "x", "stop": []}\n')
    (item,) = RequestFile(file, SamplingParams(stop=("a",)))
    assert isinstance(item, Request) and item.params.stop == ()


def test_plain_lines_are_prompts_numbered_by_line(file: Path) -> None:
    items = good(file, 'one\n\n  two {\n{"id": 1}\n')
    assert [(item.index, item.id, item.prompt) for item in items] == [
        (1, "1", "one"),
        (3, "3", "  two {"),
        (4, "4", '{"id": 1}'),
    ]


def test_token_ids_and_messages_may_stand_for_the_prompt(file: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    lines = [{"prompt_token_ids": [5, 0]}, {"messages": chat}]
    tokens, messages = good(file, "\n".join(map(json.dumps, lines)))
    assert tokens.prompt_token_ids == (5, 0) and tokens.prompt is None
    assert list(messages.messages or ()) == chat and messages.prompt is None


def test_whole_number_ids_stay_numbers(file: Path) -> None:
    assert [request.id for request in good(file, '{"id": 7, "prompt": "x"}\n')] == [7]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_endings_bom_and_blank_lines_do_not_matter(
    file: Path, ending: str, bom: bytes
) -> None:
    lines = ["", '{"id": "é", "prompt": "日本語"}', "   ", '{"prompt": "b"}']
    items = good(file, bom + ending.join(lines).encode())
    assert [(item.index, item.id, item.prompt) for item in items] == [
        (2, "é", "日本語"),
        (4, "4", "b"),
    ]
    assert good(file, bom + f"a{ending}{ending}b".encode())[0].prompt == "a"


@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_every_text_that_json_can_say_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str]
) -> None:
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    requests = good(tmp_path_factory.mktemp("any") / "prompts", "\n".join(lines))
    assert [request.prompt for request in requests] == prompts


BAD_LINES: list[tuple[str | bytes, str]] = [
    ('{"prompt": "x"', "not JSON (Expecting ',' delimiter at character 14)"),
    ("{" * 100_000, "not JSON"),
    ('{"prompt": ' + "[" * 100_000, "nested too deep"),
    ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "too many digits"),
    ('{"prompt": "x", "temperature": NaN}', "not JSON (NaN"),
    ('{"prompt": "x", "temperature": 1e999}', "got Infinity"),
    ('{"prompt": "a\0b"}', "not JSON"),
    ("plain", "not JSON"),
    ("[1]", "expected an object"),
    ("null", "expected an object"),
    ("{}", "give one of prompt, messages and prompt_token_ids"),
    ('{"prompt": "x", "prompt_token_ids": [1]}', "give one of"),
    ('{"prompt": "x", "prompt": "y"}', 'the key "prompt" is given twice'),
    ('{"prompt": 3}', "prompt must be a text, got 3"),
    ('{"prompt": null}', "prompt must be a text, got null"),
    ('{"prompt": ""}', "prompt is empty"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"prompt": "x", "id": 1.5}', "id must be"),
    ('{"prompt": "x", "id": true}', "id must be"),
    ('{"prompt": "x", "id": null}', "id must be"),
    ('{"prompt": "x", "id": "\\udfff"}', "surrogate"),
    ('{"prompt": "x", "id": "%s"}' % ("a" * 1025), "id is longer than 1024 characters"),
    ('{"prompt": "x", "id": %s}' % ("7" * 1025), "id is longer than 1024 characters"),
    ('{"prompt": "x", "max_tokens": 0}', "max_tokens must be a whole number from 1 to"),
    ('{"prompt": "x", "max_tokens": "9"}', "max_tokens must be"),
    ('{"prompt": "x", "stop": ""}', "stop must hold texts"),
    ('{"prompt": "x", "top_q": 1}', 'unknown key "top_q"; known are id, prompt, '),
    ('{"prompt_token_ids": [1, -1]}', "prompt_token_ids must be"),
    ('{"prompt_token_ids": [1, 4294967296]}', "prompt_token_ids must be"),
    ('{"prompt_token_ids": [true]}', "got true"),
    ('{"prompt_token_ids": {}}', "prompt_token_ids must be a list of token ids, got an object"),
    ('{"prompt_token_ids": []}', "prompt_token_ids is empty"),
    ('{"messages": []}', "messages is empty"),
    ('{"messages": "hi"}', "messages must be a list of {role, content}"),
    ('{"messages": ["hi"]}', 'messages[0] must be {role, content}, got "hi"'),
    ('{"messages": [{"role": "user"}]}', 'got the keys "role"'),
    ('{"messages": [{"role": "", "content": ""}]}', "messages[0].role is empty"),
    ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content must be a text"),
    (b'{"prompt": "\xff"}', "not UTF-8 (byte 0xff at 12)"),
    ('{"prompt": "x"}'.encode("utf-16-be"), "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_is_told_with_its_reason_and_costs_only_itself(
    file: Path, line: str | bytes, reason: str
) -> None:
    line = line.encode() if isinstance(line, str) else line
    first, bad, last = read(file, b'{"prompt": "x"}\n\n' + line + b'\n{"prompt": "y"}')
    assert isinstance(first, Request) and isinstance(last, Request)
    assert isinstance(bad, BadLine) and bad.index == 3 and bad.id is None
    assert reason in bad.reason and len(bad.reason) < 300


def test_bad_line_tells_its_id_where_it_has_one(file: Path) -> None:
    (bad,) = read(file, '{"id": "a", "prompt": 3}')
    assert isinstance(bad, BadLine) and bad.id == "a"


def test_bad_line_of_plain_text_costs_only_itself(file: Path) -> None:
    items = read(file, b"one\n\xff\nthree\n")
    assert [isinstance(item, Request) for item in items] == [True, False, True]


def test_file_that_is_named_json_lines_may_start_with_a_bad_one(tmp_path: Path) -> None:
    items = read(tmp_path / "prompts.jsonl", 'oops\n{"prompt": "x"}\n')
    assert [type(item) for item in items] == [BadLine, Request]


@pytest.mark.parametrize(("one", "other"), [('"a"', '"a"'), ("1", '"1"'), ('"3"', None)])
def test_an_id_is_used_once_and_the_first_line_keeps_it(
    file: Path, one: str, other: str | None
) -> None:
    second = f'{{"id": {other}, "prompt": "y"}}' if other else '{"prompt": "y"}'
    first, bad = read(file, f'{{"id": {one}, "prompt": "x"}}\n\n{second}')
    assert isinstance(first, Request)
    assert isinstance(bad, BadLine) and bad.index == 3 and "was used in line 1" in bad.reason


def test_bad_line_does_not_use_up_its_id(file: Path) -> None:
    bad, request = read(file, '{"id": "a", "prompt": 3}\n{"id": "a", "prompt": "x"}')
    assert isinstance(bad, BadLine) and isinstance(request, Request)


def test_line_that_is_too_long_costs_only_itself(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_lines = flexpipe.job.request.read_lines
    monkeypatch.setattr(flexpipe.job.request, "read_lines", lambda file: read_lines(file, 40))
    monkeypatch.setattr(flexpipe.job.request, "_CHUNK_BYTES", 7)
    fits = json.dumps({"prompt": "x" * 26})
    assert len(fits) == 40
    items = read(file, f"{fits}\n{fits} \n{' ' * 90}\n{fits}\n{fits * 9}")
    assert [type(item) for item in items] == [Request, BadLine, BadLine, Request, BadLine]
    assert isinstance(items[1], BadLine) and "longer than 16 MiB" in items[1].reason
    assert isinstance(items[3], Request)
    assert RequestFile(file, DEFAULTS).at(items[3].offset, 4) == items[3]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_every_request_can_be_read_again_from_its_place(file: Path, bom: str) -> None:
    lines = [bom, '{"prompt": "é"}', "bad", "", '{"id": 3, "prompt": "b"}', '{"prompt": "c"}']
    requests = [item for item in read(file, "\r\n".join(lines)) if isinstance(item, Request)]
    again = RequestFile(file, DEFAULTS)
    assert [again.at(item.offset, item.index) for item in reversed(requests)] == requests[::-1]
    first = good(file, f"{bom}plain\nlines")[0]
    assert RequestFile(file, DEFAULTS).at(first.offset, 1) == first


def test_file_that_changed_under_the_job_is_told(file: Path) -> None:
    items = read(file, '{"prompt": "one"}\n{"prompt": "two"}\n')
    requests = RequestFile(file, DEFAULTS)
    for content in ("x" * 100, ""):
        file.write_text(content)
        with pytest.raises(InputError, match="changed while the job ran: line 2"):
            requests.at(items[1].offset, 2)


def test_file_can_be_read_as_often_as_wanted(file: Path) -> None:
    first = read(file, '{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "x"}\n')
    requests = RequestFile(file, DEFAULTS)
    assert list(requests) == list(requests) == first


@pytest.mark.parametrize("content", ["", "\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(file: Path, content: str | bytes) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        read(file, content)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"cannot read the input file {path}"):
            RequestFile(path, DEFAULTS)


def test_what_can_be_read_only_once_is_spooled_first(tmp_path: Path, file: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    file.touch()
    assert is_stream(pipe) and is_stream(Path("-"))
    assert not is_stream(file) and not is_stream(tmp_path) and not is_stream(tmp_path / "missing")
    with pytest.raises(InputError, match="only once"):
        RequestFile(pipe, DEFAULTS)  # and does not wait for a writer


def test_spool_copies_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexpipe.job.request, "_CHUNK_BYTES", 3)
    path = spool(io.BytesIO(b'{"prompt": "x"}\n'), tmp_path)
    assert [item.index for item in RequestFile(path, DEFAULTS)] == [1]
    with pytest.raises(RunError, match=f"cannot keep the input in {tmp_path / 'missing'}"):
        spool(io.BytesIO(b"x"), tmp_path / "missing")


@pytest.mark.parametrize("num", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_lines_take_200_bytes_each_at_most(file: Path, num: int) -> None:
    with file.open("w") as lines:
        lines.writelines(f'{{"id": "request-{n:09}", "prompt": "some text"}}\n' for n in range(num))
    tracemalloc.start()
    count = sum(isinstance(item, Request) for item in RequestFile(file, DEFAULTS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == num and peak < 200 * num


def test_plain_lines_and_bad_ones_take_no_memory(file: Path) -> None:
    for line in ("some text", '{"id": 1, "prompt": 3}'):
        file.write_text(f"{line}\n" * 10_000)
        tracemalloc.start()
        assert sum(1 for _ in RequestFile(file, DEFAULTS)) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000


NOT_CHARS = st.characters(exclude_characters="\n")
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers().map(lambda n: n * 10**300)
    | st.floats()
    | st.text(st.characters(categories=["Cs", "Cc", "L", "N"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(flexpipe.job.request.KEYS) | st.text(max_size=5)
OBJECTS = st.dictionaries(KEYS, JSON_VALUES, max_size=5)
ALMOST = st.builds(
    lambda value, key, other: {"prompt": "x"} | {key: other} | value,
    st.just({}) | OBJECTS,
    st.sampled_from(flexpipe.job.request.KEYS),
    JSON_VALUES,
)


def _spoiled(value: Any, place: int, byte: bytes) -> bytes:
    """A line of JSON with one byte cut out and another put there."""
    line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    place %= len(line) + 1
    return line[:place] + byte + line[place + 1 :]


NESTED = st.tuples(st.sampled_from(["[", '{"a":', '[{"a":', '{"prompt":[']), st.integers(1, 50_000))
LINES = st.one_of(
    st.binary(max_size=200),
    st.text(NOT_CHARS).map(lambda text: text.encode("utf-8", "surrogatepass")),
    JSON_VALUES.map(lambda value: json.dumps(value).encode()),
    ALMOST.map(lambda value: json.dumps(value).encode()),
    ALMOST.map(lambda v: json.dumps(v, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    ALMOST.map(lambda value: json.dumps(value).encode("utf-16")),
    st.builds(_spoiled, ALMOST, st.integers(0, 200), st.binary(max_size=3)),
    NESTED.map(lambda nest: (nest[0] * nest[1]).encode()),
    NESTED.map(lambda nest: b'{"prompt": "x", "stop": ' + b"[" * nest[1] + b"]" * nest[1] + b"}"),
    st.integers(1, 9000).map(lambda n: b'{"prompt": "x", "seed": -' + b"7" * n + b"}"),
    st.integers(1, 200_000).map(lambda n: b'{"prompt": "' + b"\0 \\" * n + b'"}'),
).map(lambda line: line.replace(b"\n", b" "))


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(LINES, min_size=8, max_size=12))
def test_2000_fuzzed_lines_each_cost_themselves_only(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed"
    woven = [b'{"id": "neighbour 0", "prompt": "x"}']
    for number, line in enumerate(lines, start=1):
        woven += [line, b'{"id": "neighbour %d", "prompt": "x"}' % number]
    items = {item.index: item for item in read(file, b"\n".join(woven) + b"\n")}
    neighbours = [items[index] for index in range(1, len(woven) + 1, 2)]
    assert all(isinstance(item, Request) for item in neighbours)
    assert [item.id for item in neighbours] == [f"neighbour {n}" for n in range(len(lines) + 1)]
    for index, line in enumerate(woven, start=1):
        if line.strip():
            check(items.pop(index), line)
        else:
            assert index not in items
    assert not items


def check(item: Request | BadLine, line: bytes) -> None:
    """A bad line can be reported, a request can be run, and Python's JSON agrees."""
    if isinstance(item, BadLine):
        assert item.reason.encode() and len(item.reason) < 400
        json.dumps([item.id, item.reason], ensure_ascii=False).encode()
    else:
        value = json.loads(line)
        assert isinstance(value, dict) and str(value.get("id", item.index)) == str(item.id)
        assert (item.prompt, item.messages, item.prompt_token_ids).count(None) == 2
        json.dumps([item.id, item.prompt, item.messages], ensure_ascii=False).encode()
        own = {key: value[key] for key in SamplingParams.__dataclass_fields__ if key in value}
        assert item.params == SamplingParams(**({"max_tokens": 16} | own))
