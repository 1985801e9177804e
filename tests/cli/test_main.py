"""However the command ends, the user reads one text and a script reads the exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexpipe import __version__
from flexpipe.errors import (
    FlexpipeError,
    InputError,
    ModelError,
    PlanError,
    PolicyError,
    RunError,
)
from tests.cli.conftest import FakeJob

Flexpipe = Callable[..., int]
RUN = ("run", "--model", "m", "-i", "in", "-o", "out")


def raising(error: BaseException) -> Callable[[object], None]:
    def act(spec: object) -> None:
        raise error

    return act


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["demo", "--help"]])
def test_help_imports_neither_torch_nor_transformers(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom flexpipe.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: flexpipe")


def test_module_and_version() -> None:
    command = [sys.executable, "-m", "flexpipe", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"flexpipe, version {__version__}\n")


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (FlexpipeError("ask for less"), 1),
        (InputError("ask for less"), 2),
        (PolicyError("ask for less"), 2),
        (ModelError("ask for less"), 3),
        (PlanError("ask for less"), 4),
        (RunError("ask for less"), 5),
        (OSError("ask for less"), 1),
    ],
)
def test_error_of_the_user_is_a_text_and_an_exit_code(
    flexpipe: Flexpipe,
    job: FakeJob,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    exit_code: int,
) -> None:
    job.act = raising(error)
    assert flexpipe(*RUN) == exit_code
    assert capsys.readouterr() == ("", "flexpipe: error: ask for less\n")


@pytest.mark.parametrize("how", ["--debug", "FLEXPIPE_DEBUG"])
def test_debug_lets_the_traceback_through(
    flexpipe: Flexpipe, job: FakeJob, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job.act = raising(PlanError("too big"))
    monkeypatch.setenv("FLEXPIPE_DEBUG", "0" if how == "--debug" else "1")
    with pytest.raises(PlanError):
        flexpipe(*(["--debug"] if how == "--debug" else []), *RUN)


def test_a_bug_shows_its_traceback(flexpipe: Flexpipe, job: FakeJob) -> None:
    job.act = raising(AssertionError("never"))
    with pytest.raises(AssertionError):
        flexpipe(*RUN)


def test_ctrl_c_is_one_line_and_130(
    flexpipe: Flexpipe, job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job.act = raising(KeyboardInterrupt())
    assert flexpipe(*RUN) == 130
    assert capsys.readouterr() == ("", "flexpipe: interrupted\n")


def test_reader_that_left_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "flexpipe", "run", "--help"],
            stdout=closed,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["runn"], "No such command 'runn'"),
        ([*RUN, "--top-p", "0.9"], "No such option '--top-p'"),
        (["run", "--model", "m", "-i", "in"], "Missing option '-o' / '--output-file'"),
        ([*RUN, "extra"], "unexpected extra argument (extra)"),
        ([*RUN, "--max-tokens", "0"], "'--max-tokens'"),
    ],
)
def test_what_is_not_an_option_is_refused_by_name(
    flexpipe: Flexpipe,
    job: FakeJob,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    assert flexpipe(*arguments) == 2
    out, err = capsys.readouterr()
    usage, message = err.strip().splitlines()
    assert out == "" and usage.startswith("Usage: flexpipe")
    assert message.startswith("flexpipe: error: ") and named in message
    assert job.specs == []
