"""One command starts all ranks of this host, and ends with them.

The launcher starts the same command once per rank, with torchrun's variables, serves the store and
passes on stdout of rank 0 and everybody's stderr, each line with its stage but for rank 0's report.
When a rank ends badly the others have some seconds and are killed. The reason of the first failure
is printed last, once: a rank's own last words are kept back until it is known whose were first.

A rank holds the read end of a pipe that nobody writes. It ends with the launcher, however that
dies, and the rank then ends itself, as by Ctrl-C; the kernel wakes it for that if it was stopped.
Nothing at the top imports torch, so that the ranks begin before the launcher has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from flexpipe.errors import RunError
from flexpipe.runtime.ranks import rank_name

if TYPE_CHECKING:
    from torch.distributed import Store

    from flexpipe.runtime.failure import Failure

DEATH_PIPE = "FLEXPIPE_DEATH_PIPE"  # the variable with a rank's end of it
GRACE_S = 4.0  # what the other ranks may take once one has failed; they allow themselves less
INTERRUPT_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1
_LOOPBACK = "127.0.0.1"
_ERROR, _INTERRUPTED = b"flexpipe: error: ", b"flexpipe: interrupted"
_ROOT = Path(__file__).resolve().parents[2]


def flexpipe_command(arguments: Sequence[str]) -> list[str]:
    """What starts this flexpipe again, and not one that lies in the working directory."""
    return [sys.executable, "-P", "-m", "flexpipe", *arguments]


def launch(
    command: Sequence[str],
    *,
    num_stages: int,
    num_shards: int = 1,
    completed: Sequence[int] = (0,),
) -> int:
    """Run `command` once per rank to the end; the exit code that stands for all.

    Codes in `completed` are no failure. Raises RunError with the first failure's reason and code.
    Ctrl-C and SIGTERM are handed on, and KeyboardInterrupt is raised once all have ended.
    """
    with _sigterm_as_ctrl_c():
        gang = _Gang(command, num_stages, num_shards, completed)
        try:
            gang.start()
            gang.serve_store()
            gang.wait_for_all()
        finally:
            gang.kill()
    return gang.exit_code()


def heed_launcher() -> None:
    """In a rank: end when the launcher does. Does nothing in a process that none started."""
    fd = os.environ.pop(DEATH_PIPE, None)
    if fd is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    # a rank that was stopped could not see the pipe's end
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    threading.Thread(
        target=_end_with, args=(int(fd),), name="flexpipe-heed-launcher", daemon=True
    ).start()


def _end_with(pipe: int) -> None:
    os.read(pipe, 1)  # comes back when the other end is gone
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


class _Rank:
    """A started rank: passes its stderr on, but for its last words."""

    def __init__(self, rank: int, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self.rank = rank
        self.name = name
        self.process = process
        self.stderr = process.stderr.fileno()
        self.pidfd = os.pidfd_open(process.pid)
        self.last_words = b""
        self._line = b""

    def read(self) -> bool:
        """Pass on what it wrote; False at the end."""
        data = os.read(self.stderr, 1 << 16)
        *lines, self._line = (self._line + data).split(b"\n")
        if not data and self._line:
            lines, self._line = [self._line], b""
        for line in lines:
            self._pass_on(line)
        return bool(data)

    def drain(self) -> None:
        """Pass on what is there, also where a process of its own keeps the pipe open."""
        os.set_blocking(self.stderr, False)
        with contextlib.suppress(BlockingIOError):
            while self.read():
                pass

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    @property
    def ending(self) -> str:
        """How it ended, for messages."""
        code = self.process.returncode
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        words = self.last_words.removeprefix(_ERROR).decode(errors="replace").strip()
        return words or f"ended with exit code {code} and said nothing"

    def signal(self, number: signal.Signals) -> None:
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _pass_on(self, line: bytes) -> None:
        if self.last_words or line.startswith((_ERROR, _INTERRUPTED)):
            self.last_words += line + b"\n"
            return
        text = line.decode(errors="replace")
        if self.rank or text.startswith("flexpipe: "):  # rank 0's report needs no name
            text = f"[{self.name}] {text}"
        with contextlib.suppress(OSError):  # nobody reads our stderr any more
            print(text, file=sys.stderr, flush=True)


class _Gang:
    """All ranks, from start to end."""

    def __init__(
        self, command: Sequence[str], num_stages: int, num_shards: int, completed: Sequence[int]
    ) -> None:
        self._command = command
        self._num_stages = num_stages
        self._num_shards = num_shards
        self._completed = completed
        self._listener = socket.create_server((_LOOPBACK, 0))
        self._port: int = self._listener.getsockname()[1]
        self._store: Store
        self._pipe: tuple[int, int] = os.pipe()
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._failure: Failure | None = None
        self._interrupted = False
        self._end_s: float | None = None

    def start(self) -> None:
        size = self._num_stages * self._num_shards
        for rank in range(size):
            process = subprocess.Popen(
                self._command,
                stdin=None if rank == 0 else subprocess.DEVNULL,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                process_group=0,  # a Ctrl-C of the terminal is ours to hand on, once
                pass_fds=self._pipe[:1],
                env=os.environ | self._variables(rank, size),
            )
            started = _Rank(rank, rank_name(rank, self._num_shards), process)
            self._ranks.append(started)
            self._selector.register(started.stderr, selectors.EVENT_READ, started)
            self._selector.register(started.pidfd, selectors.EVENT_READ, started)

    def serve_store(self) -> None:
        """Let the ranks meet; torch is imported while they import it too."""
        from flexpipe.runtime.board import serve

        self._store = serve(self._port, listener=self._listener.detach())

    def wait_for_all(self) -> None:
        """Come back when no rank is left; on Ctrl-C too."""
        while any(rank.is_running for rank in self._ranks):
            try:
                self._turn()
            except KeyboardInterrupt:
                self._interrupt()

    def kill(self) -> None:
        """Leave nothing running, and nothing unread."""
        for rank in self._ranks:
            rank.signal(signal.SIGKILL)
            rank.process.wait()
            rank.drain()
            os.close(rank.pidfd)
        for fd in self._pipe:
            os.close(fd)

    def exit_code(self) -> int:
        """Rank 0's if all went well; raises what the first failure says if not."""
        if self._interrupted:
            raise KeyboardInterrupt
        if self._failure is not None:
            raise self._failure.error()
        return self._ranks[0].process.returncode

    def _turn(self) -> None:
        """Wait for the next thing that happens to a rank, or for the end of their time."""
        left_s = None if self._end_s is None else max(0.0, self._end_s - time.monotonic())
        for key, _ in self._selector.select(left_s):
            rank: _Rank = key.data
            if key.fd == rank.stderr and rank.read():
                continue
            self._selector.unregister(key.fd)
            if key.fd == rank.pidfd:
                rank.process.wait()
                rank.drain()
                self._ended(rank)
        if self._end_s is not None and time.monotonic() >= self._end_s:
            self._signal(signal.SIGKILL)

    def _ended(self, rank: _Rank) -> None:
        """Tell the others, who may not know it yet."""
        code = rank.process.returncode
        if code in self._completed or self._interrupted or self._failure is not None:
            return
        self._failure = self._first_failure(rank)
        self._end_s = time.monotonic() + GRACE_S

    def _first_failure(self, rank: _Rank) -> Failure:
        from flexpipe.runtime.failure import Failure

        code = rank.process.returncode
        if code < 0 or not rank.last_words:
            stage = f"stage/{rank.rank}"
            known = self._store.check([stage])
            name = self._store.get(stage).decode() if known else f"{rank.name} (rank {rank.rank})"
            reason = f"{name} {rank.ending}"
        else:
            reason = rank.ending
        code = code if code > 0 else RunError.exit_code
        return Failure(rank=rank.rank, reason=reason, exit_code=code).record(self._store)

    def _interrupt(self) -> None:
        """Hand on the first Ctrl-C; the second ends all at once."""
        self._signal(signal.SIGKILL if self._interrupted else signal.SIGINT)
        self._interrupted = True
        self._end_s = time.monotonic() + INTERRUPT_GRACE_S

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            rank.signal(number)

    def _variables(self, rank: int, size: int) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0))
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": _LOOPBACK,
            "MASTER_PORT": str(self._port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // size))),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
            DEATH_PIPE: str(self._pipe[0]),
        }


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
