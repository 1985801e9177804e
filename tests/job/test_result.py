"""A result is a whole line in the file, or no line at all."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from flexpipe.errors import InputError, RunError
from flexpipe.job.params import SamplingParams
from flexpipe.job.request import BadLine, Request
from flexpipe.job.result import Rejection, Result, ResultWriter, read_done
from tests.limits import file_size

REJECTION = Rejection(id=None, line=2, error="not JSON")
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


def test_rejected_line_says_which_and_why() -> None:
    bad = BadLine(index=2, id=None, reason="not JSON")
    assert json.loads(Rejection.of(bad).to_json()) == {
        "id": None,
        "line": 2,
        "error": "not JSON",
        "finish_reason": "error",
    }


def test_any_text_becomes_a_line_that_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with ResultWriter(path) as writer:
        writer.write(Rejection(id="a", line=1, error="half \ud800, \n and \0"))
    assert json.loads(path.read_text(encoding="utf-8"))["error"] == "half \ud800, \n and \0"


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


def test_line_that_did_not_fit_leaves_no_half(tmp_path: Path) -> None:
    path = tmp_path / "out"
    two_and_a_half = int(2.5 * len(RESULT.to_json().encode()))
    with ResultWriter(path) as writer, file_size(two_and_a_half):
        writer.write(RESULT)
        writer.write(RESULT)
        with pytest.raises(RunError, match="results before it are complete"):
            writer.write(RESULT)
    assert path.read_text(encoding="utf-8") == 2 * (RESULT.to_json() + "\n")


def request(index: int, id: str | int) -> Request:
    return Request(index=index, id=id, params=SamplingParams(), prompt="x")


def write(path: Path, *records: Result | Rejection) -> bytes:
    with ResultWriter(path, overwrite=True) as writer:
        for record in records:
            writer.write(record)
    return path.read_bytes()


def failed(id: str | int) -> Result:
    return Result(
        id=id, text="", token_ids=(), finish_reason="error", prompt_tokens=1, error="not finite"
    )


def test_what_is_there_needs_not_be_done_again(tmp_path: Path) -> None:
    whole = write(tmp_path / "out", RESULT, REJECTION, failed(7))
    done = read_done(tmp_path / "out")
    assert done.holds(request(1, "a")) and done.holds(request(3, 7))
    assert done.holds(BadLine(index=2, id=None, reason="not JSON"))
    assert not done.holds(request(4, "b")) and not done.holds(BadLine(index=5, id="a", reason=""))
    assert (done.num_failed, len(done.lines), done.valid_bytes) == (1, 1, len(whole))


def test_request_with_the_id_of_a_rejected_line_is_still_to_be_done(tmp_path: Path) -> None:
    write(tmp_path / "out", Rejection(id="a", line=2, error="id was used in line 1"))
    assert not read_done(tmp_path / "out").holds(request(1, "a"))


def test_missing_and_empty_output_hold_nothing(tmp_path: Path) -> None:
    assert read_done(tmp_path / "out").valid_bytes == 0
    (tmp_path / "out").touch()
    assert read_done(tmp_path / "out").valid_bytes == 0


def test_torn_last_line_is_cut_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = write(path, RESULT)
    second = write(path, failed("b"))
    for length in range(len(second)):
        path.write_bytes(first + second[:length])
        done = read_done(path)
        assert done.valid_bytes == len(first) and not done.holds(request(2, "b"))
        with ResultWriter(path, mode="append", keep_bytes=done.valid_bytes) as writer:
            writer.write(failed("b"))
        assert path.read_bytes() == first + second


@pytest.mark.parametrize("rest", [b"\0" * 100, b'{"id": "b", "te\0\0', b'{"id": "b", "te\n'])
def test_what_a_power_failure_leaves_is_cut(tmp_path: Path, rest: bytes) -> None:
    first = write(tmp_path / "out", RESULT)
    (tmp_path / "out").write_bytes(first + rest)
    assert read_done(tmp_path / "out").valid_bytes == len(first)


@pytest.mark.parametrize(
    "line",
    [
        b"precious\n",
        b"precious",
        b'{"id": 1, "prompt": "x"}\n',
        b'{"id": 1, "prompt": "x"}',
        b'{"id": null, "finish_reason": "stop"}\n',
        b'{"id": "a", "finish_reason": "?"}\n',
        b"[" * 100_000,
    ],
)
def test_file_of_something_else_is_never_cut(tmp_path: Path, line: bytes) -> None:
    first = write(tmp_path / "out", RESULT)
    (tmp_path / "out").write_bytes(first + line)
    with pytest.raises(InputError, match="line 2 is no result of a job"):
        read_done(tmp_path / "out")


@pytest.mark.parametrize("line", [b"\n", b'{"id": "b"\n', b"\0\n"])
def test_damage_before_the_last_line_is_named(tmp_path: Path, line: bytes) -> None:
    whole = write(tmp_path / "out", RESULT)
    (tmp_path / "out").write_bytes(whole + line + whole)
    with pytest.raises(InputError, match="line 2 is no result"):
        read_done(tmp_path / "out")


def test_output_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot read the output file {tmp_path}"):
        read_done(tmp_path)


def test_appending_needs_no_overwrite_and_makes_the_file(tmp_path: Path) -> None:
    for _ in range(2):
        with ResultWriter(tmp_path / "out", mode="append") as writer:
            writer.write(RESULT)
    assert (tmp_path / "out").read_text(encoding="utf-8") == 2 * (RESULT.to_json() + "\n")


def test_memory_for_what_is_done_is_a_digest_per_record(tmp_path: Path) -> None:
    path, num = tmp_path / "out", 20_000
    with path.open("w") as file:
        for index in range(num):
            file.write(json.dumps({"id": f"{index}" * 40, "finish_reason": "stop"}) + "\n")
    tracemalloc.start()
    done = read_done(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(done.ids) == num and peak < 200 * num
