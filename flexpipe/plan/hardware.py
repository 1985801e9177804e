"""What the machine has, and what an emulated one pretends to have.

Free memory is the least of what the kernel calls available and what every cgroup above this process
(v1 and v2, nested, with or without a cgroup namespace) still allows; page cache that the kernel
would drop first counts as free. Nothing here decides how much of it to use. Every reader takes the
root of the file system, so a test can hand it another machine.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

from flexpipe.errors import InputError
from flexpipe.units import format_bytes, parse_bytes, parse_flops, parse_rate

ROOT = Path("/")
# what a transfer has in flight, and others on its device wait for
DISK_QUEUE_BYTES = 16 << 20
EMULATED_TURN_S = 1e-3
# v1 says "no limit" with the largest multiple of a page that fits a signed 64-bit number
_V1_NO_LIMIT = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulation:
    """The accelerator that `--device emulated` pretends to be: its links, its rate, its memory.

    The host links default to a rate that any host's memcpy keeps up with, so that an emulated link
    is as fast as it says. None leaves the disk or the compute as fast as it is, and the memory to
    `--gpu-mem` or to what the host has free.
    """

    h2d_bytes_per_s: float = 2e9
    d2h_bytes_per_s: float = 2e9
    disk_read_bytes_per_s: float | None = None
    disk_write_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(
                    f"--emulate: {item.name} must be positive and finite, got {value:g}"
                )

    @classmethod
    def parse(cls, text: str) -> Emulation:
        """Read `h2d=2GB/s,d2h=2GB/s,disk_read=1GB/s,compute=100GFLOP/s,memory=1GiB`."""
        values: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (word.strip() for word in part.partition("="))
            if key not in _EMULATED or not equals:
                raise InputError(
                    f"--emulate cannot read {part!r}; it takes {', '.join(_EMULATED)}, each as "
                    "name=value: h2d=2GB/s,d2h=2GB/s,compute=100GFLOP/s,memory=1GiB"
                )
            name, read = _EMULATED[key]
            if name in values:
                raise InputError(f"--emulate gives {key} twice")
            values[name] = _read(key, value, read)
        return cls(**values)  # type: ignore[arg-type]

    @property
    def spelled(self) -> str:
        """The text that `parse` reads as this."""
        values = {key: getattr(self, name) for key, (name, _) in _EMULATED.items()}
        return ",".join(f"{key}={value:f}" for key, value in values.items() if value is not None)


def _read(key: str, text: str, read: Callable[[str], float]) -> float:
    try:
        return read(text)
    except InputError as error:
        raise InputError(f"--emulate {key}={text}: {error}") from None


# word of --emulate -> field and how it is read
_EMULATED: dict[str, tuple[str, Callable[[str], float]]] = {
    "h2d": ("h2d_bytes_per_s", parse_rate),
    "d2h": ("d2h_bytes_per_s", parse_rate),
    "disk_read": ("disk_read_bytes_per_s", parse_rate),
    "disk_write": ("disk_write_bytes_per_s", parse_rate),
    "compute": ("flops_per_s", parse_flops),
    "memory": ("memory_bytes", parse_bytes),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBound:
    """One thing that bounds this process's memory, and the bytes it still allows."""

    source: str
    free_bytes: int

    def __str__(self) -> str:
        return f"{self.source} leaves {format_bytes(self.free_bytes)}"


def free_memory(root: Path = ROOT) -> int:
    """Bytes this process may still take before the kernel, or a cgroup above it, objects."""
    return tightest_memory_bound(root).free_bytes


def tightest_memory_bound(root: Path = ROOT) -> MemoryBound:
    """What runs out first, for messages that say why there is so little."""
    return min(memory_bounds(root), key=lambda bound: bound.free_bytes)


def memory_bounds(root: Path = ROOT) -> tuple[MemoryBound, ...]:
    """The machine's available memory, then every limited cgroup from this process's upwards."""
    machine = MemoryBound(source="the machine", free_bytes=_available(root))
    return (machine, *_cgroup_bounds(root))


def _available(root: Path) -> int:
    for name, value in _pairs(root / "proc/meminfo"):
        if name == "MemAvailable:":
            return value * 1024
    return int(psutil.virtual_memory().available)


def _cgroup_bounds(root: Path) -> Iterator[MemoryBound]:
    for mount, directory in _memory_cgroups(root):
        while True:
            free = _cgroup_free(directory)
            if free is not None:
                shown = directory.relative_to(root)
                yield MemoryBound(source=f"cgroup /{shown}", free_bytes=free)
            if directory == mount:
                break
            directory = directory.parent


def _memory_cgroups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Mount point and this process's directory of each hierarchy that may account memory."""
    paths = dict(_own_cgroups(root))
    for kind, mount_root, mount_point in _cgroup_mounts(root):
        path = paths.get(kind)
        if path is None:
            continue
        mount = root / mount_point.lstrip("/")
        yield mount, mount / _below(path, mount_root)


def _own_cgroups(root: Path) -> Iterator[tuple[str, str]]:
    """Lines of /proc/self/cgroup: `4:memory:/a/b` is v1, `0::/a/b` is v2."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield "v2", path
        elif "memory" in controllers.split(","):
            yield "v1", path


def _cgroup_mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Lines of /proc/self/mountinfo: root in the hierarchy, mount point, and after ` - ` the type
    and the options of the superblock."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or not kind:
            continue
        mount_root, mount_point = _unescape(words[3]), _unescape(words[4])
        if kind[0] == "cgroup2":
            yield "v2", mount_root, mount_point
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(","):
            yield "v1", mount_root, mount_point


def _below(path: str, mount_root: str) -> str:
    """Where `path` lies under the mount; the mount itself when it lies outside what we can see."""
    relative = os.path.relpath(path, mount_root)
    return "" if relative.startswith("..") or ".." in Path(path).parts else relative


def _cgroup_free(directory: Path) -> int | None:
    """Bytes one cgroup still allows; None without a limit or without memory accounting."""
    if (directory / "memory.limit_in_bytes").exists():
        limits = [directory / "memory.limit_in_bytes"]
        usage = _number(directory / "memory.usage_in_bytes")
    else:
        # past memory.high a process is slowed to a crawl, which is no place to plan for
        limits = [directory / "memory.max", directory / "memory.high"]
        usage = _number(directory / "memory.current")
    given = [limit for limit in map(_number, limits) if limit is not None and limit < _V1_NO_LIMIT]
    if usage is None or not given:
        return None
    return max(0, min(given) - max(0, usage - _droppable(directory)))


def _droppable(directory: Path) -> int:
    """Page cache that the kernel gives up before anything else; v1 sums children in `total_`."""
    stat = dict(_pairs(directory / "memory.stat"))
    return stat.get("total_inactive_file", stat.get("inactive_file", 0))


def rss_bytes(root: Path = ROOT) -> int:
    """Memory of this process that is in RAM now."""
    return _status_bytes(root, "VmRSS:") or int(psutil.Process().memory_info().rss)


def peak_rss_bytes(root: Path = ROOT) -> int:
    """The most that `rss_bytes` has been since the start or the last `reset_peak_rss`."""
    return max(_status_bytes(root, "VmHWM:") or 0, rss_bytes(root))


def reset_peak_rss(root: Path = ROOT) -> bool:
    """Start a new peak from what is in RAM now; False where the kernel does not let us."""
    before = _status_bytes(root, "VmHWM:")
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return before is not None


def free_disk(path: Path) -> int:
    """Bytes free for this user where `path` is, or would be created."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _status_bytes(root: Path, name: str) -> int | None:
    return next((kib * 1024 for key, kib in _pairs(root / "proc/self/status") if key == name), None)


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    """Lines that begin with a name and a whole number, as many files of the kernel do."""
    for line in _lines(path):
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            yield words[0], int(words[1])


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
