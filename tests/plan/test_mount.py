"""The mount of a path is the one that files written there land on."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexpipe.plan.mount import Mount, mount_of

TABLE = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 25 0:27 / /ram rw - tmpfs shm rw,size=24683660k
31 27 8:1 / /data rw - xfs /dev/old rw
32 27 0:40 / /data rw - nfs4 server:/export rw
33 27 8:2 / /my\040disk rw - btrfs /dev/sdb rw
a line that the kernel never writes
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    table = tmp_path / "proc/self/mountinfo"
    table.parent.mkdir(parents=True)
    table.write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/home/me", "/", "ext4"),
        ("/ram", "/ram", "tmpfs"),
        ("/ram/deep/down", "/ram", "tmpfs"),
        ("/ramble", "/", "ext4"),
        ("/data/x", "/data", "nfs4"),  # the later mount hides the earlier one
        ("/my disk/x", "/my disk", "btrfs"),
    ],
)
def test_the_closest_and_latest_mount_holds_the_path(
    root: Path, path: str, point: str, kind: str
) -> None:
    mount = mount_of(Path(path), root)
    assert mount is not None and (str(mount.point), mount.kind) == (point, kind)


def test_kinds_that_mislead_are_told_apart() -> None:
    def kind(name: str) -> tuple[bool, bool]:
        mount = Mount(point=Path("/"), kind=name, source="x")
        return mount.is_in_ram, mount.is_remote

    assert kind("tmpfs") == (True, False)
    assert kind("nfs4") == kind("fuse.sshfs") == (False, True)
    assert kind("ext4") == kind("xfs") == kind("overlay") == (False, False)


def test_without_a_table_there_is_no_answer(tmp_path: Path) -> None:
    assert mount_of(Path("/"), tmp_path) is None
