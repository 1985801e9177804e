"""Messages between ranks: hidden and tokens along the ring of stages, sums within a stage.

torch.distributed moves the bytes: NCCL between GPUs, Gloo between CPUs, and where two ranks share a
GPU, which NCCL refuses, Gloo again through a buffer on the host. Each directed edge of the ring has
a communicator of its own: NCCL knows no tags and takes one message after the other, so what goes
one way must not wait for what goes the other. Within one, both ends call in the same order.

Calls block and belong to the threads of lanes. Gloo offers no way to wake such a thread but its
death by timeout, which ends every wait of a communicator at once: `abort` lets one on purpose.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flexpipe.closing import Closing
from flexpipe.memory.disk import Stopped
from flexpipe.runtime.failure import PeerLost
from flexpipe.runtime.gang import Gang
from flexpipe.runtime.ranks import Ranks

log = logging.getLogger("flexpipe")

_NEVER = timedelta(days=365)  # failures are noticed by the watch; an offloading stage may be slow
_AT_ONCE = timedelta(milliseconds=1)
_ABORT_TAG = 1 << 20  # of a message that nobody sends


class Transport(Protocol):
    """What a stage asks of its neighbours. Every call returns when its buffer may be used again."""

    def send(self, tensor: Tensor) -> None:
        """Hand a contiguous tensor to the next rank of the ring."""

    def receive(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor with what the previous rank sent."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a contiguous tensor in place over the ranks of this stage."""

    def abort(self) -> None:
        """Wake, from another thread, whoever waits here: they raise Stopped, and so does who comes
        later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Where a rank computes: its device's type, and what tells one accelerator from another."""

    device_type: str
    identity: str

    @classmethod
    def of(cls, device: torch.device, machine: str) -> Seat:
        """Of this process; `machine` is the same for ranks of one host."""
        identity = str(device.index)
        if device.type == "cuda":
            identity = str(torch.cuda.get_device_properties(device).uuid)
        return cls(device_type=device.type, identity=f"{machine} {identity}")


def backend_for(seats: Sequence[Seat]) -> str:
    """`nccl` for ranks that each have a GPU to themselves, else `gloo`."""
    apart = len({seat.identity for seat in seats}) == len(seats)
    return "nccl" if apart and all(seat.device_type == "cuda" for seat in seats) else "gloo"


def sharing(seats: Sequence[Seat]) -> Sequence[str]:
    """Ranks that have to share an accelerator, one text for each that is shared."""
    users: dict[Seat, list[int]] = {}
    for rank, seat in enumerate(seats):
        if seat.device_type != "cpu":
            users.setdefault(seat, []).append(rank)
    return [" and ".join(map(str, ranks)) for ranks in users.values() if len(ranks) > 1]


@dataclass(frozen=True, slots=True)
class _Group:
    """A communicator, and one rank at its other end."""

    group: dist.ProcessGroup
    backend: str
    peer: int

    def takes(self, tensor: Tensor) -> bool:
        """Whether messages leave from where the tensor lies."""
        return (self.backend == "nccl") == (tensor.device.type == "cuda")

    def abort(self) -> None:
        """End every wait in it, and in its other end."""
        if self.backend == "nccl":
            self.group.abort()
            return
        nothing = torch.empty(1, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            message = dist.irecv(nothing, self.peer, group=self.group, tag=_ABORT_TAG)
            if message is not None:
                message.wait(_AT_ONCE)


class GroupTransport(Closing):
    """The ring and this rank's stage over torch.distributed."""

    def __init__(
        self, ranks: Ranks, seats: Sequence[Seat], store: dist.Store, device: torch.device
    ) -> None:
        """Connect with the neighbours; returns when all ranks did. Nobody else may use `store`.

        Only one of these lives in a process at a time. `num_sharing` counts the ranks on this
        rank's device, itself included.
        """
        self._aborted = threading.Event()
        self._buffers: dict[str, Tensor] = {}
        self._device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self.num_sharing = sum(seat == seats[ranks.rank] for seat in seats)
        self._next: _Group | None = None
        self._previous: _Group | None = None
        self._stage: _Group | None = None
        with self._told("the other ranks"):
            dist.init_process_group(
                "gloo", store=store, rank=ranks.rank, world_size=ranks.size, timeout=_NEVER
            )
            self._connect(ranks, seats)

    @classmethod
    def open(cls, gang: Gang, device: torch.device) -> GroupTransport:
        """Connect the ranks of `gang`, this one computing on `device`; a failure aborts it."""
        mine = Seat.of(device, gang.here.machine)
        seats = [Seat(**seat) for seat in gang.board.exchange("seat", asdict(mine))]
        for ranks in sharing(seats):
            log.info("ranks %s share a GPU; their messages go through the host", ranks)
        transport = cls(gang.ranks, seats, gang.connect(), device)
        gang.watch.on_failure(transport.abort)
        return transport

    def send(self, tensor: Tensor) -> None:
        edge = self._next
        assert edge is not None, "a lone stage sends nothing"
        with self._message(edge, tensor.view(-1).view(torch.uint8), reads=True) as wire:
            _wait(dist.isend(wire, edge.peer, group=edge.group))

    def receive(self, tensor: Tensor) -> None:
        edge = self._previous
        assert edge is not None, "a lone stage receives nothing"
        with self._message(edge, tensor.view(-1).view(torch.uint8), writes=True) as wire:
            _wait(dist.irecv(wire, edge.peer, group=edge.group))

    def all_reduce(self, tensor: Tensor) -> None:
        stage = self._stage
        assert stage is not None, "a stage of one rank sums nothing"
        with self._message(stage, tensor.view(-1), reads=True, writes=True) as wire:
            _wait(dist.all_reduce(wire, group=stage.group, async_op=True))

    def abort(self) -> None:
        if self._aborted.is_set():
            return
        self._aborted.set()
        for group in (self._next, self._previous, self._stage):
            if group is not None:
                group.abort()

    def close(self) -> None:
        """Disconnect; all ranks must be past their last message."""
        self._next = self._previous = self._stage = None
        if dist.is_initialized() and not self._aborted.is_set():
            dist.destroy_process_group()

    def _connect(self, ranks: Ranks, seats: Sequence[Seat]) -> None:
        """Every rank makes every group, in one order, and keeps its own."""
        for source, target in ring(ranks):
            group, backend = _new_group(seats, (source, target))
            if ranks.rank == source:
                self._next = _Group(group, backend, target)
            if ranks.rank == target:
                self._previous = _Group(group, backend, source)
        for stage in range(ranks.num_stages if ranks.num_shards > 1 else 0):
            first = stage * ranks.num_shards
            shards = tuple(range(first, first + ranks.num_shards))
            group, backend = _new_group(seats, shards)
            if ranks.rank in shards:
                other = next(rank for rank in shards if rank != ranks.rank)
                self._stage = _Group(group, backend, other)

    @contextlib.contextmanager
    def _message(
        self, group: _Group, tensor: Tensor, *, reads: bool = False, writes: bool = False
    ) -> Iterator[Tensor]:
        """What goes over the wire for a flat tensor: itself, or a buffer where it cannot."""
        with self._told(f"rank {group.peer}"), self._stream or contextlib.nullcontext():
            wire = tensor if group.takes(tensor) else self._buffer(group, tensor, writes)
            if wire is not tensor and reads:
                wire.copy_(tensor)
            yield wire
            if wire is not tensor and writes:
                tensor.copy_(wire)
            if self._stream is not None:
                self._stream.synchronize()

    def _buffer(self, group: _Group, tensor: Tensor, writes: bool) -> Tensor:
        """A view of the direction's buffer where the group takes messages from, which grows to the
        longest of them."""
        where = self._device if group.backend == "nccl" else torch.device("cpu")
        # lanes that may be at work at once differ in it
        name = f"{where} {tensor.dtype} {writes}"
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < tensor.numel():
            made = torch.empty(tensor.numel(), dtype=tensor.dtype, device=where)
            buffer = self._buffers[name] = made
        return buffer[: tensor.numel()]

    @contextlib.contextmanager
    def _told(self, peer: str) -> Iterator[None]:
        """Tell a broken connection from one that was ended here."""
        stopped = "the messages between stages were stopped"
        if self._aborted.is_set():
            raise Stopped(stopped)
        try:
            yield
        except RuntimeError as error:
            if self._aborted.is_set():
                raise Stopped(stopped) from error
            raise PeerLost(
                f"the connection to {peer} broke: it ended, or is not reached"
            ) from error


def ring(ranks: Ranks) -> Sequence[tuple[int, int]]:
    """The directed edges: from each rank to the one that holds its shard of the next stage."""
    if ranks.num_stages == 1:
        return ()
    return [(rank, (rank + ranks.num_shards) % ranks.size) for rank in range(ranks.size)]


def _new_group(seats: Sequence[Seat], members: Sequence[int]) -> tuple[dist.ProcessGroup, str]:
    backend = backend_for([seats[rank] for rank in members])
    return dist.new_group(list(members), backend=backend, timeout=_NEVER), backend


def _wait(message: dist.Work | None) -> None:
    assert message is not None, "this rank is no member of the group"
    message.wait()
