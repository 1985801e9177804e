"""The machine without torch: cores, memory and who bounds it, kernel settings, limits.

Every reader takes the root of the file system, so a test can hand it another machine.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from flexpipe.doctor.finding import Finding, note, ok
from flexpipe.plan.hardware import ROOT, memory_bounds
from flexpipe.units import GIB, format_bytes

_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_ENOUGH_FILES = 4096
_SMALL = 4 * GIB


def check_cpu(root: Path = ROOT, usable: int | None = None, cores: int | None = None) -> Finding:
    """Cores of the machine, those this process may use, and units that matter for products."""
    usable = usable or len(os.sched_getaffinity(0))
    cores = cores or os.cpu_count() or usable
    units = [unit for unit in _UNITS if unit in _flags(root)]
    name = _cpuinfo(root, "model name") or "CPU"
    text = f"{name}, {cores} cores, {usable} usable; {', '.join(units) or 'no vector units told'}"
    quota = cpu_quota(root)
    if quota is not None and quota < usable:
        return note(
            "cpu",
            f"{text}; a cgroup grants {quota:g} of them",
            f"set OMP_NUM_THREADS={max(1, int(quota))}: more threads than that wait for each other",
        )
    return ok("cpu", text)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the process's control group grants, where it says so."""
    words = _text(root / "sys/fs/cgroup/cpu.max").split()
    if len(words) < 2:
        folder = root / "sys/fs/cgroup/cpu"
        words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None  # "max", -1 or nothing at all
    return int(words[0]) / int(words[1])


def check_memory(root: Path = ROOT) -> Iterator[Finding]:
    """Each bound of the host memory; what runs out first is what plans are made with."""
    bounds = memory_bounds(root)
    tightest = min(bounds, key=lambda bound: bound.free_bytes)
    for bound in bounds:
        if bound is not tightest:
            yield ok("memory", str(bound))
        elif bound.free_bytes >= _SMALL:
            yield ok("memory", f"{bound}: plans start from that")
        else:
            yield note(
                "memory",
                f"{bound}: plans start from that",
                "end other programs, or raise the limit of the cgroup or container",
            )


def check_swap(root: Path = ROOT) -> Finding:
    """Swapped-out pools would be read back at the speed of a disk, one page at a time."""
    sizes = {name: _kib(root / "proc/meminfo", f"Swap{name}:") for name in ("Total", "Free")}
    if not sizes["Total"]:
        return ok("swap", "none")
    used = sizes["Total"] - sizes["Free"]
    text = f"{format_bytes(sizes['Total'])}, {format_bytes(used)} in use"
    if used < sizes["Total"] // 10:
        return ok("swap", text)
    return note("swap", text, "lower --cpu-mem or run `swapoff -a`, so that no pool is swapped out")


def check_huge_pages(root: Path = ROOT) -> Finding:
    """Direct reads into huge pages are about twice as fast as into small ones."""
    about = "huge pages"
    text = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    if not text:
        return note(about, "the kernel has none", "disk reads into small pages are slower")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        return ok(about, chosen)
    return note(
        about,
        f"{chosen}: disk reads go into small pages, at about half the rate",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )


def check_open_files(limit: tuple[int, int] | None = None) -> Finding:
    """A checkpoint of many files has them open at once; the soft limit is raised by itself."""
    _, hard = limit or resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    if hard >= _ENOUGH_FILES:
        return ok("open files", f"up to {hard}")
    return note(
        "open files",
        f"up to {hard}, too few for the largest checkpoints",
        f"raise the hard limit of `ulimit -n` to {_ENOUGH_FILES} or more",
    )


def locked_memory_limit(limit: int | None = None) -> str:
    """How much memory this process may lock, for people."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    return "no limit" if soft == resource.RLIM_INFINITY else f"a limit of {format_bytes(soft)}"


def _flags(root: Path) -> set[str]:
    return set((_cpuinfo(root, "flags") or _cpuinfo(root, "Features") or "").split())


def _cpuinfo(root: Path, name: str) -> str | None:
    """The first processor's value of one line."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def _kib(path: Path, name: str) -> int:
    lines = (line.split() for line in _text(path).splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[:1] == [name]), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
