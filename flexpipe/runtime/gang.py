"""The ranks of a job come together: each says where it is, all are watched from then on.

    with joined(ranks, network) as gang:
        gang.watch.stage = "stage 1 (rank 1, layers 8-15)"
        budgets = gang.board.exchange("budgets", mine)

Ranks that do not come within the limit are listed by number. The block ends on all ranks alike: the
error of the first that failed is raised by every one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed import Store

from flexpipe.errors import RunError
from flexpipe.model.config import Shard
from flexpipe.runtime.board import Board, Deadline, connect, serve
from flexpipe.runtime.network import Interface, Network, check_reachable, choose_interface
from flexpipe.runtime.ranks import Ranks
from flexpipe.runtime.supervise import Watch, heeding_signals

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Where a rank runs; `machine` is the same for ranks that can signal each other."""

    host: str
    machine: str
    pid: int
    interface: str
    address: str


@dataclass(frozen=True, slots=True)
class Gang:
    """All ranks of a job, seen from one of them."""

    ranks: Ranks
    members: Sequence[Member]
    board: Board
    watch: Watch

    @property
    def here(self) -> Member:
        return self.members[self.ranks.rank]

    @property
    def shard(self) -> Shard:
        """This rank's part of its stage."""
        return Shard(index=self.ranks.shard, size=self.ranks.num_shards)

    def connect(self) -> Store:
        """A client of the store for a thread of its own."""
        return connect(self.ranks, Deadline(0.0))

    def introduce(self, device: str, layers: str) -> None:
        """Tell on stderr who this is, and in messages from now on: `layers` is "layers 8-15"."""
        name, here = self.ranks.name(), self.here
        self.watch.stage = f"{name} (rank {self.ranks.rank}, {layers})"
        log.info(
            "%s is rank %d of %d on %s, interface %s (%s), device %s, %s",
            name,
            self.ranks.rank,
            self.ranks.size,
            here.host,
            here.interface,
            here.address,
            device,
            layers,
        )


@contextlib.contextmanager
def joined(ranks: Ranks, network: Network) -> Iterator[Gang]:
    """Meet the other ranks, watch over them and be watched until the block ends."""
    with heeding_signals():
        deadline = Deadline(network.join_limit_s)
        interface = choose_interface(network.interface, ranks.address, ranks.port)
        server = serve(ranks.port, attempt=ranks.attempt) if ranks.serves_store else None
        watch = Watch(ranks, lambda: connect(ranks, deadline), limit_s=network.heartbeat_limit_s)
        watch.start()
        try:
            board = Board(ranks, connect(ranks, deadline), watch.stop)
            members = _meet(ranks, board, interface, deadline)
            interface.use(asked=network.interface is not None)
            watch.watch_others(_Neighbours(ranks, members))
            yield Gang(ranks, members, board, watch)
            board.meet("end")
            watch.finish()
        except BaseException as error:
            told = watch.ended_by(error)
            if told is error:
                raise
            raise told from error
        finally:
            del server


def _meet(ranks: Ranks, board: Board, interface: Interface, deadline: Deadline) -> list[Member]:
    board.put(f"member/{ranks.rank}", asdict(_member(interface)))
    missing = board.missing("member", deadline)
    if missing:
        raise RunError(
            f"{len(missing)} of {ranks.size} ranks did not come within --join-timeout: "
            f"{', '.join(map(str, missing))}. Look whether they were started and find "
            f"{ranks.address}:{ranks.port}."
        )
    members = [Member(**board.get(f"member/{rank}")) for rank in range(ranks.size)]
    check_reachable(
        [member.host for member in members],
        [Interface(member.interface, member.address) for member in members],
    )
    return members


class _Neighbours:
    """The processes of other ranks on this machine."""

    def __init__(self, ranks: Ranks, members: Sequence[Member]) -> None:
        here = members[ranks.rank].machine
        self._pids = {
            rank: member.pid
            for rank, member in enumerate(members)
            if member.machine == here and rank != ranks.rank
        }
        self._fds = {rank: _pidfd(pid) for rank, pid in self._pids.items()}

    def has_ended(self, rank: int) -> bool:
        fd = self._fds.get(rank)
        return rank in self._fds and (fd is None or bool(select.select([fd], [], [], 0)[0]))

    def kill(self, rank: int) -> None:
        if rank in self._pids and not self.has_ended(rank):
            with contextlib.suppress(OSError):
                os.kill(self._pids[rank], signal.SIGKILL)


def _pidfd(pid: int) -> int | None:
    """What tells when a process has ended; None if it has already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _member(interface: Interface) -> Member:
    host = socket.gethostname()
    pids = Path("/proc/self/ns/pid").stat().st_ino
    return Member(
        host=host,
        machine=f"{_BOOT_ID.read_text().strip()} {pids}",
        pid=os.getpid(),
        interface=interface.name,
        address=interface.address,
    )
