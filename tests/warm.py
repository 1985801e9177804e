"""The command line in a process of its own, without paying for the imports each time.

A fork server imports torch and the job once and computes nothing, so its children may use torch's
threads; each run is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PRELOADED = ("torch", "transformers", "flexpipe.cli.main", "flexpipe.job.run")


@dataclass(frozen=True)
class Finished:
    """How a process ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def flexpipe_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """`flexpipe_process("run", "--model", …)`: runs `flexpipe` to its end; keyword `cwd`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))

    def run(*arguments: object, cwd: Path | None = None) -> Finished:
        out = tmp_path_factory.mktemp("process")
        texts = [str(argument) for argument in arguments]
        process = context.Process(target=_flexpipe, args=(texts, out, cwd or out))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Finished(
            process.exitcode, (out / "stdout").read_text(), (out / "stderr").read_text()
        )

    return run


def _flexpipe(arguments: Sequence[str], out: Path, cwd: Path) -> None:
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        with (out / name).open("wb") as file:
            os.dup2(file.fileno(), 1 if name == "stdout" else 2)
    os.chdir(cwd)
    from flexpipe.cli.main import main

    main(arguments)
