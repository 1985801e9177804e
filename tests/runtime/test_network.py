"""Ranks of several hosts never wait for each other at a loopback."""

from __future__ import annotations

import os

import pytest

from flexpipe.errors import InputError
from flexpipe.runtime.network import (
    VARIABLES,
    Interface,
    Network,
    check_reachable,
    choose_interface,
)

LOOPBACK, WIRE = Interface("lo", "127.0.0.1"), Interface("eth0", "10.0.0.7")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_way_to_this_host_is_its_loopback() -> None:
    assert choose_interface(None, "127.0.0.1", 29500).is_loopback


def test_an_interface_that_is_not_here_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"--interface wire9 is not here; .* has .*lo"):
        choose_interface("wire9", "127.0.0.1", 29500)


def test_the_option_goes_before_the_variables_and_they_before_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "wire9")
    with pytest.raises(InputError, match="wire9"):
        choose_interface(None, "127.0.0.1", 29500)
    choose_interface("lo", "127.0.0.1", 29500).use(asked=True)
    assert [os.environ[name] for name in VARIABLES] == ["lo", "lo"]


def test_a_variable_of_ones_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    WIRE.use(asked=False)
    assert [os.environ[name] for name in VARIABLES] == ["eth0", "ib0"]


def test_a_loopback_with_more_than_one_host_names_the_option() -> None:
    with pytest.raises(InputError, match=r"rank 1 on b .* 127\.0\.0\.1 .* a cannot .* --interface"):
        check_reachable(["a", "b"], [WIRE, LOOPBACK])
    check_reachable(["a", "a"], [LOOPBACK, LOOPBACK])
    check_reachable(["a", "b"], [WIRE, WIRE])


@pytest.mark.parametrize("option", ["join", "heartbeat"])
def test_a_limit_of_no_time_is_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"--{option}-timeout must be more than 0 seconds"):
        Network(**{f"{option}_limit_s": 0.0})
