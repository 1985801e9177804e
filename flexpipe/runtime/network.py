"""How ranks reach each other: the limits of their patience, and the interface they listen at.

Gloo and NCCL each look for an interface by themselves and are content with the loopback; between
hosts that ends in a wait without end. So it is settled here, once, for both: the one asked for,
else the one on the way to the store.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from flexpipe.errors import InputError

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """How ranks find each other, and how long one may be silent."""

    interface: str | None = None
    join_limit_s: float = 300.0
    heartbeat_limit_s: float = 20.0

    def __post_init__(self) -> None:
        for option, seconds in (
            ("--join-timeout", self.join_limit_s),
            ("--heartbeat-timeout", self.heartbeat_limit_s),
        ):
            if seconds <= 0:
                raise InputError(f"{option} must be more than 0 seconds, got {seconds:g}")


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of this host by its name, and its address."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return self.address.startswith("127.") or self.address == "::1"

    def use(self, *, asked: bool) -> None:
        """Tell Gloo and NCCL; unless it was `asked` for, their own variables go first."""
        for variable in VARIABLES:
            if asked or not os.environ.get(variable):
                os.environ[variable] = self.name


def choose_interface(asked: str | None, address: str, port: int) -> Interface:
    """The interface `asked` for, else named by a variable, else the way to address:port."""
    name = asked or next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
    here = _interfaces()
    if name is not None:
        if name not in here:
            raise InputError(
                f"--interface {name} is not here; {socket.gethostname()} has {', '.join(here)}"
            )
        return here[name]
    source = _source_address(address, port)
    found = (interface for interface in here.values() if interface.address == source)
    return next(found, here.get("lo", Interface("lo", "127.0.0.1")))


def check_reachable(hosts: Sequence[str], interfaces: Sequence[Interface]) -> None:
    """Raise InputError where ranks of several hosts would wait for each other at a loopback."""
    if len(set(hosts)) == 1:
        return
    for rank, (host, interface) in enumerate(zip(hosts, interfaces, strict=True)):
        if interface.is_loopback:
            other = next(one for one in hosts if one != host)
            raise InputError(
                f"rank {rank} on {host} would listen at {interface.address} ({interface.name}), "
                f"where {other} cannot reach it; name the interface of the network between them "
                "with --interface"
            )


def _interfaces() -> Mapping[str, Interface]:
    """The interfaces that have an IPv4 address."""
    return {
        name: Interface(name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }


def _source_address(address: str, port: int) -> str:
    """This host's address on the way to another; no packet is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(
            f"cannot find the way to {address}: {error.strerror or error}; name rank 0's host in "
            "MASTER_ADDR"
        ) from error
