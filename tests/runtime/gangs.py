"""Ranks as processes of their own, forked from a server that has torch already.

Each runs a function with its `Ranks`, under the variables that mpirun would set, so that rank 0
serves the store.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from flexpipe.errors import FlexpipeError
from flexpipe.runtime.ranks import Ranks
from tests.warm import PRELOADED

Target = Callable[..., None]


@dataclass(frozen=True)
class Ended:
    """How a rank ended, by exit code or minus its signal, and what it wrote."""

    code: int | None
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.splitlines()[-1] if self.stderr else ""


class Gang:
    """Ranks that run `target(ranks, *arguments)`; those still there at the end are killed."""

    def __init__(
        self, folder: Path, target: Target, *arguments: Any, stages: int = 2, num_shards: int = 1
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._folder = folder
        size = stages * num_shards
        port = free_port()
        self.processes: list[ForkServerProcess] = []
        for rank in range(size):
            ranks = Ranks(
                rank=rank,
                num_stages=stages,
                num_shards=num_shards,
                local_rank=rank,
                port=port,
                store_is_served=False,
            )
            process = context.Process(target=_rank, args=(folder, ranks, target, arguments))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def ended(self, within_s: float = 60.0) -> Sequence[Ended]:
        """How all ended; None for one that did not in time."""
        for process in self.processes:
            process.join(within_s)
        return [
            Ended(process.exitcode, (self._folder / f"{rank}.err").read_text())
            for rank, process in enumerate(self.processes)
        ]


def run_gang(
    folder: Path, target: Target, *arguments: Any, stages: int = 2, num_shards: int = 1
) -> Sequence[Ended]:
    """All of it, start to end."""
    with Gang(folder, target, *arguments, stages=stages, num_shards=num_shards) as gang:
        return gang.ended()


def _rank(folder: Path, ranks: Ranks, target: Target, arguments: Sequence[Any]) -> None:
    with (folder / f"{ranks.rank}.err").open("wb") as file:
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        target(ranks, *arguments)
    except FlexpipeError as error:  # as the command line ends, and below the interpreter
        print(f"flexpipe: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        raise
    finally:
        atexit._run_exitfuncs()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
