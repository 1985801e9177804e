"""Claims about devices: which there are, and which copies are asynchronous."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from flexpipe.errors import InputError
from flexpipe.runtime.device import Device, open_device


@dataclass
class FakeTensor:
    """Where it lies, whether it is locked, and how it was copied into."""

    kind: str
    pinned: bool = False
    nbytes: int = 100
    copies: list[tuple[Any, bool]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)

    def is_pinned(self) -> bool:
        assert self.kind == "cpu", "only host memory can be locked"
        return self.pinned

    def copy_(self, source: Any, non_blocking: bool = False) -> None:
        self.copies.append((source, non_blocking))


@pytest.fixture
def accelerator() -> Device:
    return replace(open_device("cpu", None), torch_device=torch.device("cuda"), has_streams=True)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("to_device", [True, False])
def test_a_copy_is_asynchronous_exactly_where_its_host_side_is_locked(
    accelerator: Device, pinned: bool, to_device: bool
) -> None:
    host, remote = FakeTensor("cpu", pinned), FakeTensor("cuda")
    target, source = (remote, host) if to_device else (host, remote)
    accelerator.copy(target, source)  # type: ignore[arg-type]
    accelerator.copy(target, source)  # type: ignore[arg-type]
    assert target.copies == [(source, pinned)] * 2
    told = accelerator.synchronous
    assert (told.num_copies, told.num_bytes) == ((0, 0) if pinned else (2, 200))


def test_on_the_cpu_a_copy_is_just_a_copy() -> None:
    device = open_device("cpu", None)
    target = torch.zeros(3)
    device.copy(target, torch.ones(3))
    assert target.tolist() == [1, 1, 1] and device.synchronous.num_copies == 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_an_accelerator_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(InputError, match="torch finds no accelerator here; use --device cpu"):
        open_device("cuda", None)
    assert open_device("auto", None).name == "cpu"


def test_every_device_has_a_stop_flag_of_its_own() -> None:
    one, other = open_device("cpu", None), open_device("cpu", None)
    one.stop.set()
    assert isinstance(one.stop, threading.Event) and not other.stop.is_set()
