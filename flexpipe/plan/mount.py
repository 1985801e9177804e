"""Which file system a path lies on, or would, and what its kind means for a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flexpipe.plan.hardware import ROOT

_IN_RAM = {"tmpfs", "ramfs", "devtmpfs"}
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A mounted file system: where, of which kind, and the device or server behind it."""

    point: Path
    kind: str
    source: str

    @property
    def is_in_ram(self) -> bool:
        """Files there take the very memory that they should relieve."""
        return self.kind in _IN_RAM

    @property
    def is_remote(self) -> bool:
        """Files there cross a network, or a boundary of virtual machines."""
        return self.kind in _REMOTE or self.kind.startswith("fuse")


def mount_of(path: Path, root: Path = ROOT) -> Mount | None:
    """The mount that holds `path`; None where the kernel does not list its mounts."""
    path = path.resolve()
    found: Mount | None = None
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        words, more = before.split(), after.split()
        if len(words) < 5 or len(more) < 2:
            continue
        mount = Mount(point=Path(_unescape(words[4])), kind=more[0], source=_unescape(more[1]))
        # of two at one point the later one hides the earlier
        is_closer = found is None or len(mount.point.parts) >= len(found.point.parts)
        if is_closer and path.is_relative_to(mount.point):
            found = mount
    return found


def mount_point(path: Path) -> str:
    """Where the file system of `path`, or of what it would be made in, is mounted."""
    mount = mount_of(path.expanduser())
    return str(ROOT if mount is None else mount.point)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
