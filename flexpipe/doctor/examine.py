"""The doctor's round: every check, in the order in which one would ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flexpipe.doctor.finding import Finding, problem
from flexpipe.doctor.machine import (
    check_cpu,
    check_huge_pages,
    check_memory,
    check_open_files,
    check_swap,
)
from flexpipe.doctor.software import check_hub, check_software


def examine(device: str, offload_dir: Path) -> list[Finding]:
    """What is here, what will not work and what to do about it."""
    return [
        *check_software(),
        *_device(device),
        check_cpu(),
        *check_memory(),
        check_swap(),
        check_huge_pages(),
        check_open_files(),
        *_storage(offload_dir),
        check_hub(),
    ]


def _device(name: str) -> Iterator[Finding]:
    try:
        from flexpipe.doctor.device import check_device
    except (ImportError, OSError) as error:  # a library of torch's that does not load
        yield problem("torch", f"cannot be imported: {error}", "install torch anew: pytorch.org")
        return
    yield from check_device(name)


def _storage(path: Path) -> Iterator[Finding]:
    try:
        from flexpipe.doctor.storage import check_offload, check_profile
    except ImportError as error:
        yield problem("offload", f"cannot be looked at: {error}", "install what is missing above")
        return
    yield from check_offload(path)
    yield from check_profile()
