"""Messages between processes: of any size, both ways at once, and none that nobody can end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from flexpipe.errors import RunError
from flexpipe.memory.disk import Stopped
from flexpipe.runtime.board import Deadline, connect, serve
from flexpipe.runtime.device import device_of_rank
from flexpipe.runtime.failure import PeerLost
from flexpipe.runtime.ranks import Ranks
from flexpipe.runtime.transport import GroupTransport, Seat, backend_for, ring, sharing
from tests.runtime.gangs import run_gang

MIB = 1 << 20
CPU = torch.device("cpu")
_PATIENCE = timedelta(seconds=60)


@contextmanager
def connected(ranks: Ranks) -> Iterator[GroupTransport]:
    """This rank's transport; the store outlives all of them."""
    server = serve(ranks.port) if ranks.serves_store else None
    store = connect(ranks, Deadline(60.0))
    seats = [Seat(device_type="cpu", identity="")] * ranks.size
    with GroupTransport(ranks, seats, connect(ranks, Deadline(60.0)), CPU) as transport:
        yield transport
        store.set(f"done/{ranks.rank}", "")
        store.wait([f"done/{rank}" for rank in range(ranks.size)], _PATIENCE)
        if ranks.serves_store:  # to the last
            store.wait([f"gone/{rank}" for rank in range(1, ranks.size)], _PATIENCE)
        else:
            store.set(f"gone/{ranks.rank}", "")
    del server


def pass_around(ranks: Ranks, num_bytes: int, dtype: torch.dtype) -> None:
    """Every rank sends its number to the next, in a lane of its own, while it receives."""
    count = num_bytes // dtype.itemsize
    mine = torch.full((count,), ranks.rank + 1.0, dtype=dtype)
    got = torch.empty_like(mine)
    with connected(ranks) as transport, torch.inference_mode():
        lane = threading.Thread(target=transport.send, args=(mine,))
        lane.start()
        transport.receive(got.view(1, -1))
        lane.join()
        assert torch.equal(got, torch.full_like(got, ranks.previous + 1.0))


@pytest.mark.parametrize(
    ("stages", "num_bytes", "dtype"),
    [(2, 256 * MIB, torch.float32), (3, 6, torch.bfloat16), (2, 8, torch.int64)],
)
def test_every_rank_sends_and_receives_at_once(
    tmp_path: Path, stages: int, num_bytes: int, dtype: torch.dtype
) -> None:
    ended = run_gang(tmp_path, pass_around, num_bytes, dtype, stages=stages)
    assert [(rank.code, rank.stderr) for rank in ended] == [(0, "")] * stages


def sum_up(ranks: Ranks) -> None:
    with connected(ranks) as transport:
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.full((3, 5), 2.0**ranks.shard, dtype=dtype) * (ranks.stage + 1)
            transport.all_reduce(tensor)
            assert torch.equal(tensor, torch.full_like(tensor, 3.0 * (ranks.stage + 1)))
        hidden = torch.full((4,), ranks.rank, dtype=torch.bfloat16)
        if ranks.stage == 0:
            transport.send(hidden)
        else:
            transport.receive(hidden)
            assert torch.equal(hidden, torch.full_like(hidden, ranks.shard))


def test_shards_sum_within_their_stage_and_hand_on_to_their_like(tmp_path: Path) -> None:
    ended = run_gang(tmp_path, sum_up, stages=2, num_shards=2)
    assert [(rank.code, rank.stderr) for rank in ended] == [(0, "")] * 4


def abort_while_waiting(ranks: Ranks) -> None:
    """A receive that nobody serves, and a send that is taken half, end when they are aborted."""
    with connected(ranks) as transport:
        raised: list[BaseException] = []

        def wait(call: object) -> None:
            try:
                call(torch.zeros(64 * MIB, dtype=torch.uint8))  # type: ignore[operator]
            except RunError as error:
                raised.append(error)

        calls = (transport.send, transport.receive) if ranks.rank == 0 else ()
        lanes = [threading.Thread(target=wait, args=(call,)) for call in calls]
        for lane in lanes:
            lane.start()
        time.sleep(0.3 if lanes else 1.5)
        began = time.monotonic()
        transport.abort()
        for lane in lanes:
            lane.join(10)
        assert not any(lane.is_alive() for lane in lanes) and time.monotonic() - began < 2
        assert all(isinstance(error, Stopped) for error in raised) and len(raised) == len(lanes)
        with pytest.raises(Stopped):
            transport.send(torch.zeros(1))


def test_an_abort_ends_what_waits_and_what_comes_later(tmp_path: Path) -> None:
    ended = run_gang(tmp_path, abort_while_waiting)
    assert [rank.code for rank in ended] == [0, 0]


def lose_peer(ranks: Ranks) -> None:
    with connected(ranks) as transport:
        if ranks.rank == 1:
            raise SystemExit(9)
        try:
            transport.receive(torch.zeros(4))
        except PeerLost as error:
            raise SystemExit(str(error)) from None


def test_a_peer_that_ends_is_an_error_that_names_it(tmp_path: Path) -> None:
    first, second = run_gang(tmp_path, lose_peer)
    assert second.code == 9 and first.code == 1
    assert first.last_line == "the connection to rank 1 broke: it ended, or is not reached"


def test_gpus_speak_nccl_only_where_each_rank_has_one_of_its_own() -> None:
    a, b = (Seat(device_type="cuda", identity=f"host gpu-{name}") for name in "ab")
    assert backend_for([a, b]) == "nccl"
    assert backend_for([a, a]) == "gloo"
    assert backend_for([a, Seat(device_type="cpu", identity="host None")]) == "gloo"


def test_ranks_that_share_a_gpu_are_told_of() -> None:
    names = ("h gpu-a", "h gpu-b", "h gpu-a", "i gpu-a", "h gpu-a")
    gpus = [Seat(device_type="cuda", identity=name) for name in names]
    assert sharing(gpus) == ["0 and 2 and 4"]
    assert sharing([Seat(device_type="cpu", identity="h None")] * 2) == []


@pytest.mark.parametrize(
    ("asked", "local_rank", "taken"),
    [
        ("auto", 1, "cuda:1"),
        ("cuda", 3, "cuda:1"),
        ("cuda:0", 1, "cuda:0"),
        ("cpu", 1, "cpu"),
        ("emulated", 1, "emulated"),
    ],
)
def test_ranks_of_a_host_take_its_accelerators_in_turns(
    monkeypatch: pytest.MonkeyPatch, asked: str, local_rank: int, taken: str
) -> None:
    monkeypatch.setattr("flexpipe.runtime.device._accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_of_rank(asked, local_rank) == taken


def test_a_lone_stage_has_no_ring() -> None:
    assert not ring(Ranks(rank=0, num_stages=1, num_shards=2, port=1))
    assert ring(Ranks(rank=0, num_stages=2, port=1)) == [(0, 1), (1, 0)]
