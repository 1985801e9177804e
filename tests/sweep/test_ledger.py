"""Whatever ends a sweep, its file holds what was finished; another's file is not touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexpipe.errors import InputError, RunError
from flexpipe.sweep.ledger import Ledger, read_ledger
from tests.limits import file_size


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_lines_are_there_when_the_file_is_opened_again(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.write("a", {"n": 1})
        ledger.write("b", {"n": 2})
        ledger.write("a", {"n": 3})
    with Ledger(path) as ledger:
        assert ledger.lines == {"a": {"key": "a", "n": 3}, "b": {"key": "b", "n": 2}}


def test_a_torn_last_line_costs_that_line_alone(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.write("a", {"n": 1})
        whole = path.read_bytes()
        ledger.write("b", {"n": 2})
    both = path.read_bytes()
    for length in range(len(whole), len(both)):
        path.write_bytes(both[:length])
        with Ledger(path) as ledger:
            assert list(ledger.lines) == ["a"]
            ledger.write("c", {})
        assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_zeros_that_a_power_failure_left_are_a_torn_line(path: Path) -> None:
    path.write_bytes(b'{"key": "a"}\n{"key"\0\0\0')
    with Ledger(path) as ledger:
        assert list(ledger.lines) == ["a"]


@pytest.mark.parametrize(
    "text", ["notes", "notes\n", '{"id": 1}\n', '{"key": "a"}\nnotes', "[1]\n"]
)
def test_a_file_of_something_else_is_refused_and_kept(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=r"line \d was not written by a sweep"):
        Ledger(path)
    assert path.read_text() == text


def test_two_sweeps_cannot_write_one_file(path: Path) -> None:
    with Ledger(path) as ledger:
        with pytest.raises(InputError, match="another sweep is writing"):
            Ledger(path)
        ledger.write("a", {})
    Ledger(path).close()


def test_a_file_without_lines_is_not_left_behind(path: Path) -> None:
    with Ledger(path):
        with pytest.raises(InputError, match="another sweep is writing"):
            Ledger(path)
        assert path.is_file()
    assert not path.exists()


def test_a_line_that_the_disk_does_not_take_is_taken_back(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.write("a", {})
        whole = path.read_bytes()
        with file_size(len(whole) + 10), pytest.raises(RunError, match="points before are kept"):
            ledger.write("b", {"text": "long enough to be cut off"})
        assert path.read_bytes() == whole
        ledger.write("c", {})
    assert list(read_ledger(path)[0]) == ["a", "c"]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write --output-file .*: No such file"):
        Ledger(tmp_path / "none" / "rows.jsonl")
