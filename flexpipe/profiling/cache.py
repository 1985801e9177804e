"""The profile of this machine, measured once and kept.

One file per machine, device, number of threads, mount of the offload directory and `METHOD`, the
number of the way in which it was measured, which goes up when figures come to mean more or
something else. A full profile outlives quick ones; one that lacks a compute dtype is completed by
it. What cannot be read is measured anew. `FLEXPIPE_PROFILE=FILE` stands for all of this: then
nothing is ever measured.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexpipe.errors import FlexpipeError, PolicyError
from flexpipe.memory.offload import file_lock
from flexpipe.plan.mount import mount_point
from flexpipe.plan.policy_file import write_whole
from flexpipe.policy.profile import (
    PROFILE_VARIABLE,
    PROFILES,
    Profile,
    read_profile,
    render_profile,
)
from flexpipe.profiling.machine import (
    Tell,
    machine_id,
    measure_profile,
    measured_device,
    with_dtypes,
    worthwhile_dtypes,
)

METHOD = 7

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How profiles are come by; tests put in their own."""

    whole: Callable[..., Profile] = measure_profile
    dtypes: Callable[..., Profile] = with_dtypes


def machine_profile(
    device: str,
    offload_dir: Path,
    dtypes: Sequence[str] = (),
    *,
    refresh: bool = False,
    quick: bool = True,
    rounds: int | None = None,
    progress: Tell = lambda what: None,
    measure: Measure | None = None,
) -> Profile:
    """This machine's profile, which knows at least `dtypes`; measured if there is none yet.

    An emulated accelerator has its CPU's. `refresh` measures in any case; without `quick` a quick
    profile does not do. `rounds` are those of `measure_profile`.
    """
    if given := os.environ.get(PROFILE_VARIABLE):
        return _checked(read_profile(Path(given)), device)
    measure = measure or Measure()
    dtypes = tuple(dtypes) or worthwhile_dtypes(measured_device(device).torch_device)
    path = profile_path(device, offload_dir)
    offload_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(offload_dir / "profile.lock"):  # ranks of one host must not measure each other
        return _measured(
            path, device, offload_dir, dtypes, refresh, quick, rounds, progress, measure
        )


def _measured(
    path: Path,
    device: str,
    offload_dir: Path,
    dtypes: Sequence[str],
    refresh: bool,
    quick: bool,
    rounds: int | None,
    progress: Tell,
    measure: Measure,
) -> Profile:
    """The profile at `path`, which this process alone may measure now."""
    known = _read(path)
    if known is not None and not refresh and (quick or not known.quick):
        return _completed(known, path, device, dtypes, progress, measure)
    if not refresh:
        log.info(
            "measuring this machine (%s), once; `flexpipe profile` %s",
            "some 20 s" if quick else "up to 2 minutes",
            "does it more exactly" if quick else "--refresh does it again",
        )
    made = measure.whole(device, offload_dir, dtypes, quick=quick, rounds=rounds, progress=progress)
    if known is not None and made.quick and not known.quick:
        log.info("kept the full profile of %s in %s", known.date, path)
        return made
    write_profile(path, made)
    return made


def _checked(profile: Profile, device: str) -> Profile:
    """A given profile, which must be of the kind of device in use; of another machine like it, it
    is taken at its word, and that is told."""
    used = measured_device(device).torch_device.type
    kind = profile.device.partition(":")[0]
    if kind != used:
        raise PolicyError(
            f"{PROFILE_VARIABLE} names a profile of {profile.name}, device {kind}, but layers run "
            f"on {used}; name one of this machine, or unset {PROFILE_VARIABLE} to measure it"
        )
    if profile.machine != machine_id():
        tell_once(f"{PROFILE_VARIABLE} names a profile of another machine: {profile.name}")
    elif profile.threads != torch.get_num_threads():
        threads = f"{profile.threads} threads, and torch has {torch.get_num_threads()}"
        tell_once(f"{PROFILE_VARIABLE} names a profile of {threads}")
    return profile


@functools.cache
def tell_once(line: str) -> None:
    """A sweep asks for the profile at every point."""
    log.info(line)


def profile_path(device: str, offload_dir: Path) -> Path:
    """Where the profile of this machine lies, or would."""
    if given := os.environ.get(PROFILE_VARIABLE):
        return Path(given)
    kind = measured_device(device).torch_device.type
    mount = mount_point(offload_dir)
    key = repr((METHOD, machine_id(), kind, torch.get_num_threads(), mount))
    name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.yaml"
    return PROFILES.expanduser() / name


def write_profile(path: Path, profile: Profile) -> None:
    """All of it or nothing."""
    write_whole(path, render_profile(profile))


def _read(path: Path) -> Profile | None:
    """The cached profile, unless it is not there or not fit for use."""
    if not path.exists():
        return None
    try:
        profile = read_profile(path)
    except FlexpipeError as error:
        log.info("measuring this machine anew: %s", error)
        return None
    if profile.machine != machine_id():
        log.info("measuring this machine anew: %s describes another one", path)
        return None
    return profile


def _completed(
    known: Profile,
    path: Path,
    device: str,
    dtypes: Sequence[str],
    progress: Tell,
    measure: Measure,
) -> Profile:
    lacking = [dtype for dtype in dtypes if dtype not in known.compute.matmul]
    if not lacking:
        return known
    log.info("measuring this machine in %s, which its profile lacks", ", ".join(lacking))
    made = measure.dtypes(known, device, lacking, progress=progress)
    write_profile(path, made)
    return made
