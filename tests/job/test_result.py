"""A result is a whole line in the file, or no line at all."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexpipe.errors import InputError, RunError
from flexpipe.job.result import Result, ResultWriter

RESULT = Result(id="a", text="né", token_ids=(4, 2), finish_reason="stop", prompt_tokens=3)


def test_line_has_the_shape_users_read() -> None:
    assert json.loads(RESULT.to_json()) == {
        "id": "a",
        "text": "né",
        "token_ids": [4, 2],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }


def test_failed_request_says_why() -> None:
    failed = Result(
        id=7, text="", token_ids=(), finish_reason="error", prompt_tokens=9, error="too long"
    )
    assert failed.to_dict()["error"] == "too long"
    assert failed.to_dict()["id"] == 7


def test_each_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with ResultWriter(path) as writer:
        for count in (1, 2, 3):
            writer.write(RESULT)
            assert len(path.read_text(encoding="utf-8").splitlines()) == count


def test_results_of_another_run_are_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("precious\n")
    with pytest.raises(InputError, match="--overwrite"):
        ResultWriter(path)
    assert path.read_text() == "precious\n"
    with ResultWriter(path, overwrite=True) as writer:
        writer.write(RESULT)
    assert path.read_text(encoding="utf-8") == RESULT.to_json() + "\n"


def test_empty_file_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch()
    with ResultWriter(path) as writer:
        writer.write(RESULT)
    assert path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["", "missing/out"])
def test_path_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="--output-file"):
        ResultWriter(tmp_path / name)


def test_full_disk_is_an_error_that_names_request_and_file() -> None:
    writer = ResultWriter(Path("/dev/full"))
    with pytest.raises(RunError, match="request 'a' to /dev/full: No space left on device"):
        writer.write(RESULT)
    writer.close()


@pytest.fixture
def small_files() -> Iterator[int]:
    """Files may grow to two lines and a half."""
    size = int(2.5 * len(RESULT.to_json().encode()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_line_that_did_not_fit_leaves_no_half(tmp_path: Path, small_files: int) -> None:
    path = tmp_path / "out"
    with ResultWriter(path) as writer:
        writer.write(RESULT)
        writer.write(RESULT)
        with pytest.raises(RunError, match="results before it are complete"):
            writer.write(RESULT)
    assert path.read_text(encoding="utf-8") == 2 * (RESULT.to_json() + "\n")
