"""However the command ends, the user reads one text and a script reads the exit code."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

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


@pytest.mark.parametrize("command", [[], ["run"], ["demo"], ["sweep"], ["doctor"]])
def test_help_imports_neither_torch_nor_transformers(command: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom flexpipe.cli.main import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: flexpipe")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "20000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_of_a_team_sleep_soon_unless_the_user_says_otherwise(
    given: dict[str, str], found: str
) -> None:
    others = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    code = (
        "import os, sys, flexpipe; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=others | given, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [found, "False"]  # torch comes later


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
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flexpipe: interrupted; what is done is kept, go on with: flexpipe run ")
    assert len(err.splitlines()) == 1 and "--overwrite" not in err


def test_what_is_logged_is_told_on_stderr_in_one_line_each(
    flexpipe: Flexpipe, job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(spec: object) -> None:
        log = logging.getLogger("flexpipe")
        log.info("removed the leftovers of %d dead jobs", 2)
        log.warning("transfers are buffered\n  which is slower")
        log.debug("of no interest")

    job.act = act
    assert flexpipe(*RUN) == 0
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[:2]) == (
        "",
        [
            "flexpipe: removed the leftovers of 2 dead jobs",
            "flexpipe: warning: transfers are buffered which is slower",
        ],
    )
    assert "of no interest" not in err
    assert logging.getLogger("flexpipe").handlers == []


def test_what_is_logged_does_not_break_the_progress_bar(
    flexpipe: Flexpipe, job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(spec: object) -> None:
        with tqdm(total=9, file=sys.stderr, desc="bar", mininterval=0) as bar:
            bar.update()
            logging.getLogger("flexpipe").info("drawing dummy weights")

    job.act = act
    assert flexpipe(*RUN) == 0
    err = capsys.readouterr().err
    lines = re.split(r"[\r\n]+", err)
    assert lines.count("flexpipe: drawing dummy weights") == 1
    assert [line for line in lines if "bar" in line and "flexpipe" in line] == []


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
        ([*RUN, "--top-z", "0.9"], "No such option '--top-z'"),
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
