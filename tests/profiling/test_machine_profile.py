"""The machine is measured once, whole, and what is kept stays true."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexpipe.errors import PolicyError
from flexpipe.plan.tier import Tier
from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.profile import (
    LINKS,
    OVERHEADS,
    Profile,
    Rates,
    parse_profile,
    read_profile,
    render_profile,
)
from flexpipe.profiling import cache
from flexpipe.profiling.cache import (
    Measure,
    machine_profile,
    profile_path,
    write_profile,
)
from flexpipe.profiling.effort import FULL, QUICK, Effort
from flexpipe.profiling.machine import machine_id, measure_profile, with_dtypes
from flexpipe.profiling.overhead import calls_beside_calls, op_times, overheads
from flexpipe.profiling.products import ProductTasks
from flexpipe.profiling.slowdown import slowdowns
from flexpipe.profiling.stopwatch import Rated, Stopwatch, Task, TaskSource, rate_all
from flexpipe.profiling.wake import IDLE_S
from flexpipe.schedule.simulate import CALLS
from flexpipe.units import MIB

KIB = 1024
TINY = replace(
    QUICK,
    rounds=1,
    window_s=0.0,
    disk_window_s=0.0,
    weights=((64, 64), (512, 512)),
    rows=(8, 64),
    converted=((512, 512),),
    converted_rows=(8, 64),
    prefill=(16, 64),
    decode=(256 * KIB, 16 * MIB),
    compressed_tokens=(64,),
    norm=(1, 8),
    copies=(64 * KIB, 16 * MIB),
    transfers=(64 * KIB, MIB),
    file_bytes=16 * MIB,
    held_bytes=16 * MIB,
    pair_windows=1,
    pair_s=0.001,
    op_steps=4,
    wakes=1,
)


def test_a_real_measurement_has_all_that_a_prediction_reads(tmp_path: Path) -> None:
    made = measure_profile("cpu", tmp_path, ("float32",), quick=True, effort=TINY)
    assert set(made.links) == set(LINKS)
    assert set(made.overhead_s) == set(OVERHEADS)
    assert all(seconds >= 0 for seconds in made.overhead_s.values())
    assert set(made.wake_s) == set(IDLE_S) and min(made.wake_s.values()) >= 0
    assert set(made.memory) == {Tier.CPU, Tier.DISK}
    assert all(factor >= 1 for factor in made.slowdown.values())
    pairs = {("compute", "disk_read"), ("disk_read", "compute"), ("attend", "copy"), CALLS}
    assert pairs <= set(made.slowdown)
    rates = made.compute
    for known in (rates.matmul, rates.elementwise):
        assert set(known) == {"float32"}
    assert set(rates.converted) == set(rates.convert) | set(rates.widen)
    assert set(rates.prefill_attention) == {"float32", "float32/64"}
    assert set(rates.decode_attention) == {"float32", "4>float32", "8>float32"}
    assert set(rates.convert) == {"bfloat16>float32", "float16>float32"}
    assert set(rates.widen) == {"4>float32", "8>float32"}
    assert set(rates.compress) == {"4", "8"}
    assert set(rates.sample) == set(rates.decode_attention_flops) == {"float32"}
    assert set(made.load) == {"float32", "read", "pools"}
    assert (made.device, made.machine, made.quick) == ("cpu", machine_id(), True)
    assert_same(parse_profile_text(render_profile(made)), made)
    assert [path.name for path in tmp_path.rglob("*.bin")] == []


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two intra-op threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_what_computes_is_measured_with_all_threads_and_what_moves_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(sources: Sequence[TaskSource], watch: Stopwatch, rounds: int, **how: Any) -> Rated:
        threads.append(torch.get_num_threads())
        return rate_all(sources, watch, rounds, **how)

    monkeypatch.setattr("flexpipe.profiling.machine.rate_all", watched)
    measure_profile("cpu", tmp_path, ("float32",), quick=True, effort=TINY)
    *moves, computes = threads
    assert set(moves) == {1}
    assert computes == torch.get_num_threads() == 2


@pytest.mark.parametrize("effort", [QUICK, FULL])
def test_a_machine_of_little_memory_is_measured_at_smaller_sizes(effort: Effort) -> None:
    less = effort.within(512 * MIB)
    assert max(*less.decode, *less.copies, *less.transfers) <= less.held_bytes == 32 * MIB
    assert effort.weights[:2] == less.weights
    assert effort.within(2**40) == effort


@pytest.mark.usefixtures("two_threads")
def test_computing_is_measured_with_all_threads_whatever_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(turn: int) -> None:
        seen.append(torch.get_num_threads())

    key = ("matmul", "float32", 64.0, 1.0)
    source = lambda: iter([Task(key=key, amount=1.0, work=count)])  # noqa: E731
    monkeypatch.setattr(ProductTasks, "sources", lambda self, dtype: [source])
    measure_profile("cpu", tmp_path, ("float32",), quick=True, effort=TINY)
    with ThreadPoolExecutor(1) as thread:
        after = thread.submit(torch.get_num_threads).result()
    assert {*seen, after, torch.get_num_threads()} == {2}


def test_a_further_dtype_joins_what_was_measured() -> None:
    made = with_dtypes(profile(), "cpu", ("bfloat16",), effort=TINY)
    assert set(made.compute.matmul) == set(made.load) == {"float32", "bfloat16"}
    assert made.compute.matmul["float32"] == profile().compute.matmul["float32"]
    assert (made.links, made.date, made.quick) == (profile().links, "2001-02-03", False)


def test_slowdowns_are_of_both_ways_and_never_below_one() -> None:
    tasks = {name: task(name) for name in ("compute", "copy")}
    found = slowdowns(tasks, num_threads=1, windows=2, window_s=0.001)
    assert set(found) == {("compute", "copy"), ("copy", "compute")}
    assert min(found.values()) >= 1


def test_calls_are_slowed_by_what_of_the_time_others_call() -> None:
    def told(calls: float, beside: float, dispatching: float = 0.0) -> dict[str, float]:
        return {"calls": calls, "beside": beside, "busy_dispatching": dispatching}

    tries = [told(3.0, 0.5), told(2.0, 0.25)]
    assert calls_beside_calls(tries) == 5.0
    assert calls_beside_calls([*tries, told(1.2, 0.1)]) == pytest.approx((5 + 5 + 3) / 3)
    assert calls_beside_calls([told(3.0, 0.25, 0.25)]) == 5.0  # the dispatcher is one of them
    assert calls_beside_calls([told(0.9, 0.3)]) == 1.0
    assert calls_beside_calls([told(1.5, 0.0)]) == 1.0  # nothing to tell it by


def test_turns_and_hops_are_those_beside_no_dispatcher(tmp_path: Path) -> None:
    found = op_times("cpu", tmp_path, num_steps=12)
    made = overheads([{**found, "turn_beside": 0.0, "hop_beside": 0.0}])
    assert (made["turn"], made["hop"]) == (found["turn"], found["hop"])
    assert 0 < found["turn"] < 1 and 0 < found["hop"] < 1
    busy = {"calls": 3.0, "beside": 0.5, "busy_dispatching": 0.0}  # calls take five times as long
    made = overheads([{**found, **busy, "turn_beside": 0.25, "hop_beside": 0.5}])
    assert made["turn"] == pytest.approx(found["turn"] / 2)
    assert made["hop"] == pytest.approx(found["hop"] / 3)


def test_a_rate_is_that_of_all_rounds_together() -> None:
    class Slower(Stopwatch):
        def __init__(self) -> None:
            self._rates = iter([4.0, 4.0, 1.0])

        def rate(self, task: Task) -> float:
            return next(self._rates)

    assert rate_all([lambda: iter([task("copy")])], Slower(), 3) == {("copy",): 2.0}


def test_turns_of_a_task_count_up_from_its_first() -> None:
    turns: list[int] = []
    watch = Stopwatch(torch.device("cpu"), 0.0)
    assert set(rate_all([lambda: iter([task("copy", turns.append)])], watch, 1)) == {("copy",)}
    assert turns == [*range(len(turns))] and len(turns) > 1


def task(name: str, work: Callable[[int], object] = lambda turn: None) -> Task:
    return Task(key=(name,), amount=1.0, work=work)


# what is kept


def profile(*dtypes: str, **changes: Any) -> Profile:
    """A profile that nobody measured."""
    rates = Rates(
        matmul={name: Surface.of({1.0: Curve.flat(1e9)}) for name in dtypes or ("float32",)}
    )
    values: dict[str, Any] = {
        "name": "nowhere",
        "date": "2001-02-03",
        "source": "made up",
        "device": "cpu",
        "memory": {Tier.CPU: 2**30, Tier.DISK: 2**30},
        "links": {name: Curve.flat(1e9) for name in LINKS},
        "compute": rates,
        "load": {"float32": 1e9},
        "machine": machine_id(),
    }
    return Profile(**{**values, **changes})


@dataclass
class Fake:
    """Stands for measuring: keeps what it was asked."""

    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def whole(
        self,
        device: str,
        offload_dir: Path,
        dtypes: Sequence[str],
        *,
        quick: bool,
        rounds: int | None,
        progress: Any,
    ) -> Profile:
        self.asked.append(("whole", tuple(dtypes), rounds or quick))
        return profile(*dtypes, quick=quick)

    def dtypes(
        self, known: Profile, device: str, dtypes: Sequence[str], *, progress: Any
    ) -> Profile:
        self.asked.append(("dtypes", tuple(dtypes)))
        matmul = {**known.compute.matmul, **profile(*dtypes).compute.matmul}
        return replace(known, compute=replace(known.compute, matmul=matmul))


Ask = Callable[..., Profile]


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def ask(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask(dtypes…)` with a home of its own and nothing measured."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLEXPIPE_PROFILE")
    measure = Measure(whole=fake.whole, dtypes=fake.dtypes)

    def call(*dtypes: str, **options: Any) -> Profile:
        return machine_profile("cpu", tmp_path, dtypes, measure=measure, **options)

    return call


def test_a_machine_is_measured_once(ask: Ask, fake: Fake) -> None:
    assert_same(ask("float32"), ask("float32"))
    assert fake.asked == [("whole", ("float32",), True)]


def test_measuring_by_itself_is_told_with_the_command_that_refines(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flexpipe"):
        ask("float32")
        ask("float32")
    (line,) = caplog.messages
    assert "measuring this machine" in line and "`flexpipe profile`" in line


def test_a_lacking_dtype_is_measured_alone_and_kept(ask: Ask, fake: Fake) -> None:
    ask("float32", quick=False)
    for _ in range(2):
        assert set(ask("float32", "bfloat16").compute.matmul) == {"float32", "bfloat16"}
    assert fake.asked[1:] == [("dtypes", ("bfloat16",))]


def test_a_quick_profile_gives_way_to_a_full_one_and_never_the_other_way(
    ask: Ask, fake: Fake
) -> None:
    assert ask("float32").quick
    assert not ask("float32", quick=False).quick
    assert ask("float32", refresh=True).quick
    assert not ask("float32").quick
    assert [quick for *_, quick in fake.asked] == [True, False, True]


def test_more_rounds_are_asked_for_when_it_is_measured_again(ask: Ask, fake: Fake) -> None:
    ask("float32")
    ask("float32", quick=False, refresh=True, rounds=9)
    assert fake.asked[1:] == [("whole", ("float32",), 9)]


@pytest.mark.parametrize("text", ["", "name: [", "name: x\ndevice: cpu\n"])
def test_a_damaged_profile_is_measured_anew_and_told_in_a_line(
    ask: Ask, fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    ask("float32")
    path = profile_path("cpu", tmp_path)
    path.write_text(text)
    with caplog.at_level(logging.INFO, "flexpipe"):
        ask("float32")
    assert str(path) in caplog.messages[0]
    assert len(fake.asked) == 2 and read_profile(path).device == "cpu"


def test_a_profile_of_another_machine_is_measured_anew(
    ask: Ask, fake: Fake, tmp_path: Path
) -> None:
    write_profile(profile_path("cpu", tmp_path), profile(machine="another"))
    assert ask("float32").machine == machine_id()
    assert len(fake.asked) == 1


def test_a_write_that_fails_leaves_the_profile_as_it_was(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("float32")
    path = profile_path("cpu", tmp_path)
    before = path.read_text()

    def refuse(*args: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_profile(path, profile("float32", "bfloat16"))
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_mounts_and_numbers_of_threads_have_profiles_of_their_own(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {profile_path("cpu", tmp_path)}
    monkeypatch.setattr(cache, "mount_point", lambda directory: "/elsewhere")
    paths.add(profile_path("cpu", tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    paths.add(profile_path("cpu", tmp_path))
    assert len(paths) == 3


def test_an_emulated_accelerator_has_the_profile_of_its_cpu(ask: Ask, tmp_path: Path) -> None:
    assert profile_path("emulated", tmp_path) == profile_path("cpu", tmp_path)


def test_the_variable_stands_for_everything_and_nothing_is_measured(
    ask: Ask, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "given.yaml"
    write_profile(path, profile(machine="another"))
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(path))
    assert ask("bfloat16", refresh=True).machine == "another"
    assert fake.asked == []
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(tmp_path / "missing.yaml"))
    with pytest.raises(PolicyError, match=r"missing\.yaml"):
        ask("float32")


def test_a_given_profile_of_another_kind_of_device_is_refused(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "given.yaml"
    write_profile(path, profile(device="cuda"))
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(path))
    with pytest.raises(PolicyError, match="of nowhere, device cuda, but layers run on cpu"):
        ask("float32")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"machine": "another"}, ["a profile of another machine: nowhere"]),
        ({"threads": 77}, ["a profile of 77 threads, and torch has"]),
        ({}, []),
    ],
)
def test_a_given_profile_of_another_machine_is_told_once(
    ask: Ask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    told: list[str],
) -> None:
    cache.tell_once.cache_clear()
    path = tmp_path / "given.yaml"
    write_profile(path, profile(**{"threads": torch.get_num_threads(), **changes}))
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(path))
    with caplog.at_level(logging.INFO, "flexpipe"):
        ask("float32")
        ask("float32")
    assert len(caplog.messages) == len(told)
    assert all(text in line for text, line in zip(told, caplog.messages, strict=True))


def parse_profile_text(text: str) -> Profile:
    import yaml

    return parse_profile(yaml.safe_load(text))


def assert_same(one: Profile, other: Profile) -> None:
    """To the digits that a file shows."""
    assert render_profile(one) == render_profile(other)
