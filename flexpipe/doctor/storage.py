"""Where a run offloads to, and where the machine's profile lies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from flexpipe.doctor.finding import Finding, note, ok, problem
from flexpipe.errors import FlexpipeError
from flexpipe.memory.disk import writes_directly
from flexpipe.plan.hardware import ROOT, free_disk
from flexpipe.plan.mount import mount_of
from flexpipe.policy.profile import PROFILE_VARIABLE, PROFILES, read_profile
from flexpipe.units import GIB, format_bytes

_RESERVED = GIB  # what plans leave free on a disk
_LITTLE = 10 * GIB
_OLD_DAYS = 90


def check_offload(
    path: Path, root: Path = ROOT, writes: Callable[[Path], bool] = writes_directly
) -> Iterator[Finding]:
    """The offload directory: whether it can be used, what it lies on, how much it can take."""
    about = "offload"
    folder = _nearest(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield problem(
            about,
            f"{path} cannot be written: {folder} refuses",
            "name a writable directory on a local disk with --offload-dir",
        )
        return
    yield _space(path)
    mount = mount_of(folder, root)
    where = "" if mount is None else f"{mount.kind} at {mount.point}"
    if mount is not None and mount.is_in_ram:
        yield note(
            about,
            f"{where} lies in memory: what is put there takes the host's memory a second time",
            "name a directory on a disk with --offload-dir",
        )
        return
    if mount is not None and mount.is_remote:
        yield note(
            about,
            f"{where} is not on a local disk, so its speed is that of a network or a host",
            "name a directory on a local disk with --offload-dir",
        )
    if writes(folder):
        yield ok(about, f"{where}: direct reads and writes work".removeprefix(": "))
    else:
        yield note(
            about,
            f"{where}: direct reads and writes do not work, buffered ones are slower".lstrip(": "),
            "name a directory on another file system (ext4, xfs) with --offload-dir",
        )


def _space(path: Path) -> Finding:
    free = free_disk(path)
    text = f"{path}, {format_bytes(free)} free"
    if free <= _RESERVED:
        return note("offload", text, "nothing can be offloaded: a run leaves the last GiB free")
    if free < _LITTLE:
        return note("offload", text, "free some space, or name a larger disk with --offload-dir")
    return ok("offload", text)


def _nearest(path: Path) -> Path:
    """The path, or what is there of it."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_profile(
    env: Mapping[str, str] = os.environ, folder: Path = PROFILES, now_s: float | None = None
) -> list[Finding]:
    """The measurements that predictions are made from, and how old they are."""
    given = env.get(PROFILE_VARIABLE)
    paths = [Path(given)] if given else sorted(folder.expanduser().glob("*.yaml"))
    if not paths:
        return [note("profile", "not measured yet", "flexpipe profile")]
    return [_profile(path, now_s or time.time(), bool(given)) for path in paths]


def _profile(path: Path, now_s: float, is_given: bool) -> Finding:
    try:
        profile = read_profile(path)
        days = timedelta(seconds=max(0.0, now_s - path.stat().st_mtime)).days
    except FlexpipeError as error:
        advice = f"correct or unset {PROFILE_VARIABLE}" if is_given else f"remove {path}"
        return problem("profile", " ".join(str(error).split()), advice)
    text = f"{profile.name} ({profile.device}), {_age(days)}: {path}"
    if days > _OLD_DAYS and not is_given:
        return note("profile", text, "flexpipe profile --refresh, if the machine has changed since")
    return ok("profile", text)


def _age(days: int) -> str:
    return "of today" if days == 0 else "a day old" if days == 1 else f"{days} days old"
