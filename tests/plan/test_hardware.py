"""Free memory is the least of what the machine and every cgroup above the process allow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexpipe.errors import InputError
from flexpipe.plan.hardware import (
    Emulation,
    free_disk,
    free_memory,
    peak_rss_bytes,
    reset_peak_rss,
    rss_bytes,
    tightest_memory_bound,
)
from flexpipe.units import GIB, MIB

V1_UNLIMITED = 9223372036854771712


class Machine:
    """A root directory with the files that the kernel would show."""

    def __init__(self, root: Path, available: int) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable: {available // 1024} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def process(self, cgroup: str, mount: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", mount)

    def v1(self, path: str, limit: int, usage: int, inactive_file: int = 0) -> None:
        self.write(f"{path}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{path}/memory.usage_in_bytes", f"{usage}\n")
        stat = f"cache 1\ninactive_file 0\ntotal_inactive_file {inactive_file}\n"
        self.write(f"{path}/memory.stat", stat)

    def v2(self, path: str, limit: int | str, usage: int, inactive_file: int = 0) -> None:
        self.write(f"{path}/memory.max", f"{limit}\n")
        self.write(f"{path}/memory.current", f"{usage}\n")
        self.write(f"{path}/memory.stat", f"anon 5\ninactive_file {inactive_file}\n")


V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, available=64 * GIB)


def test_without_cgroups_the_machine_decides(machine: Machine) -> None:
    assert free_memory(machine.root) == 64 * GIB


def test_v1_limit_counts_what_is_used_less_the_cache_that_goes_first(machine: Machine) -> None:
    machine.process("4:memory:/job\n2:cpu:/elsewhere\n", V1_MOUNT)
    machine.v1("/sys/fs/cgroup/memory", V1_UNLIMITED, 0)
    machine.v1("/sys/fs/cgroup/memory/job", 10 * GIB, usage=7 * GIB, inactive_file=2 * GIB)
    assert free_memory(machine.root) == 5 * GIB


@pytest.mark.parametrize("tight", ["/outer", "/outer/middle", "/outer/middle/inner"])
def test_v2_takes_the_tightest_ancestor(machine: Machine, tight: str) -> None:
    machine.process("0::/outer/middle/inner\n", V2_MOUNT)
    for path in ("/outer", "/outer/middle", "/outer/middle/inner"):
        limit = 3 * GIB if path == tight else "max"
        machine.v2(f"/sys/fs/cgroup{path}", limit, usage=GIB)
    bound = tightest_memory_bound(machine.root)
    assert bound.free_bytes == 2 * GIB
    assert bound.source == f"cgroup /sys/fs/cgroup{tight}"


def test_v2_high_counts_as_a_limit(machine: Machine) -> None:
    machine.process("0::/job\n", V2_MOUNT)
    machine.v2("/sys/fs/cgroup/job", 8 * GIB, usage=GIB)
    machine.write("/sys/fs/cgroup/job/memory.high", f"{4 * GIB}\n")
    assert free_memory(machine.root) == 3 * GIB


def test_usage_past_the_limit_leaves_nothing(machine: Machine) -> None:
    machine.process("0::/job\n", V2_MOUNT)
    machine.v2("/sys/fs/cgroup/job", GIB, usage=2 * GIB)
    assert free_memory(machine.root) == 0


def test_container_sees_its_own_cgroup_at_the_mount_point(machine: Machine) -> None:
    mount = "9 8 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    machine.process("4:memory:/docker/abc/sub\n", mount)
    machine.v1("/sys/fs/cgroup/memory", 6 * GIB, usage=GIB)
    machine.v1("/sys/fs/cgroup/memory/sub", 4 * GIB, usage=GIB)
    assert free_memory(machine.root) == 3 * GIB


@pytest.mark.parametrize("path", ["/", "/../../elsewhere", "/unseen"])
def test_paths_out_of_sight_fall_back_to_the_mount(machine: Machine, path: str) -> None:
    machine.process(f"0::{path}\n", V2_MOUNT.replace(" / /sys", " /mine /sys"))
    machine.v2("/sys/fs/cgroup", 2 * GIB, usage=GIB)
    assert free_memory(machine.root) == GIB


def test_hybrid_hierarchies_both_count(machine: Machine) -> None:
    machine.process("4:memory:/a\n0::/b\n", V1_MOUNT + V2_MOUNT.replace("cgroup rw", "unified rw"))
    machine.v1("/sys/fs/cgroup/memory/a", 9 * GIB, usage=GIB)
    machine.v2("/sys/fs/unified/b", 3 * GIB, usage=GIB)
    assert free_memory(machine.root) in (2 * GIB, 8 * GIB)


def test_mount_points_with_spaces_are_unescaped(machine: Machine) -> None:
    machine.process("0::/job\n", V2_MOUNT.replace("/sys/fs/cgroup", "/my\\040cgroups"))
    machine.v2("/my cgroups/job", 2 * GIB, usage=GIB)
    assert free_memory(machine.root) == GIB


def test_this_machine_has_some_memory_and_disk(tmp_path: Path) -> None:
    assert free_memory() > 0
    assert free_disk(tmp_path / "not" / "there" / "yet") == pytest.approx(
        free_disk(tmp_path), rel=0.2
    )


def test_real_v1_limit_of_an_ancestor_is_seen_from_within() -> None:
    top = Path("/sys/fs/cgroup/memory")
    outer = top / f"flexpipe-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
        (outer / "memory.limit_in_bytes").write_text(str(300 * MIB))
    except OSError as error:
        pytest.skip(f"no v1 memory cgroup can be made here: {error}")
    try:
        free = int(_in_cgroup(inner, "print(free_memory())"))
        assert 200 * MIB < free <= 300 * MIB
    finally:
        inner.rmdir()
        outer.rmdir()


def _in_cgroup(cgroup: Path, statement: str) -> str:
    program = (
        f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')\n"
        f"from flexpipe.plan.hardware import free_memory\n{statement}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peak_memory_rises_with_use_and_starts_anew() -> None:
    if not reset_peak_rss():
        pytest.skip("this kernel does not reset the peak")
    before = peak_rss_bytes()
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() - before > 60 * MIB
    del block
    assert reset_peak_rss()
    assert peak_rss_bytes() < before + 32 * MIB
    assert rss_bytes() <= peak_rss_bytes()


def test_emulation_reads_rates_and_memory() -> None:
    text = "h2d=2GB/s, d2h=500MB/s,disk_read=1GiB/s,compute=1.5TFLOP/s,memory=1GiB"
    assert Emulation.parse(text) == Emulation(
        h2d_bytes_per_s=2e9,
        d2h_bytes_per_s=5e8,
        disk_read_bytes_per_s=float(GIB),
        flops_per_s=1.5e12,
        memory_bytes=GIB,
    )
    assert Emulation.parse("") == Emulation()


def test_emulation_is_spelled_as_it_is_read() -> None:
    some = Emulation(d2h_bytes_per_s=1.5e9, flops_per_s=2e12, memory_bytes=3 << 30)
    for emulation in (some, Emulation()):
        assert Emulation.parse(emulation.spelled) == emulation


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("pcie=2GB/s", "pcie=2GB/s"),
        ("h2d", "'h2d'"),
        ("h2d=fast", "h2d=fast"),
        ("h2d=0GB/s", "h2d_bytes_per_s"),
        ("compute=100GB/s", "compute=100GB/s"),
        ("memory=1GiB/s", "memory"),
        ("h2d=1GB/s,h2d=2GB/s", "h2d twice"),
        ("h2d=-2GB/s", "h2d=-2GB/s"),
    ],
)
def test_emulation_refuses_by_name_what_it_cannot_read(text: str, named: str) -> None:
    with pytest.raises(InputError, match="--emulate") as refusal:
        Emulation.parse(text)
    assert named in str(refusal.value)
