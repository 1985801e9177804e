"""One rank that fails ends all within seconds, and all tell the reason of the first."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from flexpipe.errors import RunError
from flexpipe.runtime import supervise
from flexpipe.runtime.board import serve
from flexpipe.runtime.failure import PeerLost
from flexpipe.runtime.gang import Gang, joined
from flexpipe.runtime.network import Network
from flexpipe.runtime.ranks import Ranks
from flexpipe.runtime.supervise import Pulse
from tests.runtime import gangs
from tests.runtime.gangs import Ended, run_gang
from tests.waiting import eventually

NETWORK = Network(join_limit_s=60.0)
IMPATIENT = Network(join_limit_s=60.0, heartbeat_limit_s=2.0)  # notices who is frozen
WITHIN_S = 5.0


def test_who_beats_is_not_late_and_who_stops_is() -> None:
    pulse = Pulse(2, max_looks=3)
    late = [pulse.late([str(look).encode(), b"7"]) for look in range(6)]
    assert late == [[], [], [], [], [1], [1]]


def test_who_left_is_not_late() -> None:
    pulse = Pulse(1, max_looks=1)
    assert [pulse.late([b"left"]) for _ in range(4)] == [[]] * 4


def test_the_store_sees_clients_under_addresses_that_have_names() -> None:
    """One that listens for IPv6 too sees ::ffff:127.0.0.1, and asks the name server for each."""
    port = gangs.free_port()
    server = serve(port)
    with pytest.raises(OSError):
        socket.create_connection(("::1", port), timeout=5.0)
    socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    with pytest.raises(RunError, match=f"cannot listen on port {port}.*MASTER_PORT"):
        serve(port)
    del server


def introduce(gang: Gang) -> None:
    first = 4 * gang.ranks.rank
    gang.introduce("cpu", f"layers {first}-{first + 3}")


def finish(ranks: Ranks) -> None:
    with joined(ranks, NETWORK) as gang:
        introduce(gang)
        assert gang.board.exchange("number", ranks.rank) == list(range(ranks.size))
        everybodys = list(range(ranks.size))
        assert gang.board.gather("again", ranks.rank) == ([] if ranks.rank else everybodys)
        assert gang.board.share("plan", {"cuts": [4, 4]} if ranks.rank == 0 else None) == {
            "cuts": [4, 4]
        }
        assert [member.host for member in gang.members] == [gang.here.host] * ranks.size
    time.sleep(0.2)
    raise SystemExit(7)


def test_a_gang_that_ends_well_says_nothing(tmp_path: Path) -> None:
    ended = run_gang(tmp_path, finish, stages=3)
    assert [(rank.code, rank.stderr) for rank in ended] == [(7, "")] * 3


def fail_at(ranks: Ranks, failing: int, folder: Path) -> None:
    """One rank fails while the others wait for each other, or for nobody."""
    with joined(ranks, NETWORK) as gang:
        introduce(gang)
        gang.watch.on_failure(lambda: (folder / f"woken-{ranks.rank}").touch())
        gang.board.meet("start")
        if ranks.rank == failing:
            (folder / "failed").touch()
            raise RunError("load_weight of layer 5 failed: the disk is full")
        if ranks.rank == (failing + 1) % ranks.size:
            gang.board.meet("never")
        time.sleep(60)


@pytest.mark.parametrize("failing", [0, 2])
def test_the_first_failure_is_what_every_rank_tells(tmp_path: Path, failing: int) -> None:
    ended = run_gang(tmp_path, fail_at, failing, tmp_path, stages=3)
    assert time.time() - (tmp_path / "failed").stat().st_mtime < WITHIN_S
    layers = f"{4 * failing}-{4 * failing + 3}"
    reason = (
        f"flexpipe: error: stage {failing} (rank {failing}, layers {layers}): "
        "load_weight of layer 5 failed: the disk is full"
    )
    assert [(rank.code, rank.last_line) for rank in ended] == [(5, reason)] * 3
    assert sorted(path.name for path in tmp_path.glob("woken-*")) == [
        f"woken-{rank}" for rank in range(3) if rank != failing
    ]


def lose_neighbour(ranks: Ranks) -> None:
    with joined(ranks, NETWORK) as gang:
        gang.board.meet("start")
        if ranks.rank == 0:
            raise PeerLost("the connection to rank 1 broke")
        time.sleep(0.5)
        raise RunError("the true reason")


def test_a_lost_connection_leaves_the_peer_time_to_tell_why(tmp_path: Path) -> None:
    ended = run_gang(tmp_path, lose_neighbour)
    reason = "flexpipe: error: stage 1 (rank 1): the true reason"
    assert [rank.last_line for rank in ended] == [reason] * 2


def fail_slowly(ranks: Ranks) -> None:
    """Rank 1 tells what it met, and takes as long to end as it is let."""
    supervise.GRACE_S = 0.5
    with joined(ranks, NETWORK) as gang:
        gang.board.meet("start")
        if ranks.rank == 0:
            raise PeerLost("the connection to rank 1 broke")
        gang.watch.tell(PeerLost("the connection to rank 0 broke"))
        gang.watch.tell(RunError("compute of layer 3 failed: the true reason"))
        time.sleep(60)


def test_a_rank_that_ends_slowly_is_not_outrun_by_the_loss_of_its_connection(
    tmp_path: Path,
) -> None:
    ended = run_gang(tmp_path, fail_slowly)
    reason = "flexpipe: error: stage 1 (rank 1): compute of layer 3 failed: the true reason"
    assert [(rank.code, rank.last_line) for rank in ended] == [(5, reason)] * 2


def stumble(ranks: Ranks) -> None:
    with joined(ranks, NETWORK) as gang:
        gang.board.meet("start")
        if ranks.rank == 1:
            raise TypeError("nobody thought of this")
        time.sleep(60)


def test_a_bug_shows_its_traceback_and_the_reason_below(tmp_path: Path) -> None:
    first, second = run_gang(tmp_path, stumble)
    reason = "flexpipe: error: stage 1 (rank 1): TypeError: nobody thought of this"
    assert (first.code, first.stderr) == (5, f"{reason}\n")
    assert second.last_line == reason and "Traceback" in second.stderr


def wait_to_be_hit(ranks: Ranks, folder: Path) -> None:
    with joined(ranks, IMPATIENT) as gang:
        introduce(gang)
        gang.board.meet("start")
        time.sleep(1.0)  # looks at the others, who have told their layers
        (folder / f"ready-{ranks.rank}").touch()
        time.sleep(60)


def hit(folder: Path, victim: int, number: signal.Signals) -> tuple[Sequence[Ended], float]:
    """How all ended, and after how many seconds, when one is sent a signal."""
    with gangs.Gang(folder, wait_to_be_hit, folder) as gang:
        assert eventually(lambda: len(list(folder.glob("ready-*"))) == 2)
        gang.signal(victim, number)
        began = time.monotonic()
        return gang.ended(within_s=30), time.monotonic() - began


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_rank_ends_all_within_the_limit_and_is_killed(tmp_path: Path, victim: int) -> None:
    ended, seconds = hit(tmp_path, victim, signal.SIGSTOP)
    told = ended[1 - victim]
    assert seconds < IMPATIENT.heartbeat_limit_s + WITHIN_S
    assert (told.code, ended[victim].code) == (5, -signal.SIGKILL)
    assert told.last_line == (
        f"flexpipe: error: stage {victim} (rank {victim}, layers {4 * victim}-{4 * victim + 3}) "
        "gave no sign of life for 2 s: it is frozen, or its host or the network is down"
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_missed_at_once_also_where_nobody_waits_for_it(
    tmp_path: Path, victim: int
) -> None:
    ended, seconds = hit(tmp_path, victim, signal.SIGKILL)
    told = ended[1 - victim]
    assert seconds < WITHIN_S and told.code == 5
    assert told.last_line == (
        f"flexpipe: error: stage {victim} (rank {victim}, layers {4 * victim}-{4 * victim + 3}) "
        "ended without a word, as if killed"
    )


@pytest.mark.slow
def test_ctrl_c_at_one_rank_interrupts_all(tmp_path: Path) -> None:
    ended, seconds = hit(tmp_path, 1, signal.SIGINT)
    assert seconds < WITHIN_S and [rank.code for rank in ended] == [130, 130]


def hang(ranks: Ranks, folder: Path) -> None:
    """Rank 1 heeds nothing when rank 0 fails."""
    supervise.GRACE_S = 0.5
    with joined(ranks, NETWORK) as gang:
        gang.watch.clean_up((folder / "cleaned").touch)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gang.board.meet("start")
        if ranks.rank == 0:
            raise RunError("broken")
        time.sleep(60)


def test_a_rank_that_does_not_end_by_itself_cleans_up_and_is_gone(tmp_path: Path) -> None:
    first, second = run_gang(tmp_path, hang, tmp_path)
    assert (first.code, second.code) == (5, 5)
    assert second.last_line == "flexpipe: error: stage 0 (rank 0): broken"
    assert (tmp_path / "cleaned").exists()


def come_late(ranks: Ranks) -> None:
    if ranks.rank in (1, 3):
        return
    with joined(ranks, Network(join_limit_s=1.0, heartbeat_limit_s=2.0)):
        pass


def test_ranks_that_do_not_come_are_listed(tmp_path: Path) -> None:
    ended = run_gang(tmp_path, come_late, stages=4)
    for rank in (ended[0], ended[2]):
        assert rank.code == 5
        assert "2 of 4 ranks did not come within --join-timeout: 1, 3." in rank.last_line


def never_start(ranks: Ranks) -> None:
    if ranks.rank == 1:
        with joined(ranks, Network(join_limit_s=0.5)):
            pass


def test_a_first_rank_that_does_not_come_is_told_with_its_address(tmp_path: Path) -> None:
    _, second = run_gang(tmp_path, never_start)
    assert second.code == 5
    assert "rank 1 found no store at 127.0.0.1:" in second.last_line
