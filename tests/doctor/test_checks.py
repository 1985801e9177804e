"""Each check says what is wrong on a machine where it is, with advice, and is quiet elsewhere."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flexpipe.doctor.finding import Finding, note, num_problems, ok, problem, render, to_dict
from flexpipe.doctor.machine import (
    check_cpu,
    check_huge_pages,
    check_memory,
    check_open_files,
    check_swap,
    cpu_quota,
)
from flexpipe.doctor.software import check_hub, check_package, check_software, requirements
from flexpipe.doctor.storage import check_offload, check_profile

MEMINFO = "MemAvailable: {free} kB\nSwapTotal: {swap} kB\nSwapFree: {unused} kB\n"
MOUNTS = "27 1 254:0 / / rw - {kind} /dev/vda rw\n"
GIB_IN_KIB = 2**20


def machine(tmp_path: Path, files: Mapping[str, str]) -> Path:
    """A root of a file system with these files."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# -- findings -------------------------------------------------------------------------------------


def test_whatever_is_not_ok_comes_with_advice() -> None:
    with pytest.raises(ValueError, match="needs advice"):
        Finding(level="note", about="disk", text="slow")


def test_each_finding_is_a_line_with_its_advice_below() -> None:
    findings = [ok("python", "3.11"), problem("torch", "is missing", "pip install torch")]
    assert render(findings).splitlines() == [
        "         python  3.11",
        "problem  torch   is missing",
        "                 → pip install torch",
        "",
        "1 problem, 0 notes",
    ]
    assert num_problems(findings) == to_dict(findings)["num_problems"] == 1
    assert to_dict(findings)["findings"][1]["advice"] == "pip install torch"
    long = note("disk", "word " * 60, "free " * 60)
    assert max(map(len, render([long]).splitlines())) <= 100


# -- software -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "level", "said"),
    [
        ("2.11.0", "ok", "2.11.0"),
        ("2.13.0+cpu", "ok", "2.13.0+cpu"),
        ("2.14.0.dev20260101", "ok", "2.14.0.dev20260101"),
        ("2.9.1", "problem", "2.9.1 is installed; flexpipe asks for >=2.11"),
        (None, "problem", "is not installed; flexpipe asks for >=2.11"),
    ],
)
def test_a_package_is_as_new_as_it_must_be_or_a_problem(
    version: str | None, level: str, said: str
) -> None:
    finding = check_package(Requirement("torch>=2.11"), version)
    assert (finding.level, finding.text) == (level, said)
    assert level == "ok" or finding.advice == "pip install 'torch>=2.11'"


@pytest.mark.parametrize("name", ["matplotlib", "llvmlite"])
def test_what_can_be_done_without_is_only_noted(name: str) -> None:
    finding = check_package(Requirement(f"{name}>=1"), None)
    assert finding.level == "note" and "without it" in finding.advice


def test_everything_that_is_asked_for_is_looked_up() -> None:
    assert {"torch", "transformers", "click", "matplotlib"} <= {r.name for r in requirements()}
    found = list(check_software(lambda name: None))
    assert found[0].level == "ok" and "Python 3." in found[0].text
    assert num_problems(found) == len(requirements()) - 2


def test_the_hub_tells_its_cache_and_whether_it_may_fetch(tmp_path: Path) -> None:
    (tmp_path / "hub/models--a--b").mkdir(parents=True)
    env = {"HF_HOME": str(tmp_path)}
    assert check_hub(env) == ok("hub", f"1 models in {tmp_path}/hub")
    assert check_hub({**env, "HF_HUB_OFFLINE": "1"}).level == "note"
    elsewhere = check_hub({**env, "HF_HUB_CACHE": str(tmp_path / "other")})
    assert elsewhere.text.startswith("0 models in") and elsewhere.text.endswith("other")


# -- machine --------------------------------------------------------------------------------------


def test_cpu_tells_its_cores_and_the_units_that_matter(tmp_path: Path) -> None:
    root = machine(
        tmp_path, {"proc/cpuinfo": "model name : Fast\nflags : fpu avx2 avx512_bf16 sse\n"}
    )
    text = "Fast, 8 cores, 4 usable; avx2, avx512_bf16"
    assert check_cpu(root, usable=4, cores=8) == ok("cpu", text)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_a_quota_below_the_cores_is_noted(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    root = machine(tmp_path, files)
    assert cpu_quota(root) == quota
    finding = check_cpu(root, usable=4, cores=4)
    assert finding.level == ("ok" if quota is None else "note")
    assert quota is None or f"OMP_NUM_THREADS={int(quota)}" in finding.advice


def test_every_bound_of_the_memory_is_told_and_the_tightest_marked(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO.format(free=64 * GIB_IN_KIB, swap=0, unused=0),
            "proc/self/cgroup": "0::/box\n",
            "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/box/memory.max": f"{3 * 2**30}\n",
            "sys/fs/cgroup/box/memory.current": "0\n",
        },
    )
    whole, box = check_memory(root)
    assert whole == ok("memory", "the machine leaves 64 GiB")
    assert box.level == "note" and box.text.startswith("cgroup /sys/fs/cgroup/box leaves 3 GiB: pl")


@pytest.mark.parametrize(("swap", "unused", "level"), [(0, 0, "ok"), (8, 8, "ok"), (8, 4, "note")])
def test_swap_matters_once_it_is_used(tmp_path: Path, swap: int, unused: int, level: str) -> None:
    sizes = {"free": 1, "swap": swap * GIB_IN_KIB, "unused": unused * GIB_IN_KIB}
    assert check_swap(machine(tmp_path, {"proc/meminfo": MEMINFO.format(**sizes)})).level == level


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("always [madvise] never", "ok"),
        ("[always] madvise never", "ok"),
        ("always madvise [never]", "note"),
        (None, "note"),
    ],
)
def test_pages_that_cannot_be_huge_are_noted(tmp_path: Path, text: str | None, level: str) -> None:
    name = "sys/kernel/mm/transparent_hugepage/enabled"
    assert check_huge_pages(machine(tmp_path, {name: text} if text else {})).level == level


@pytest.mark.parametrize(
    ("limit", "level"),
    [((1024, 1 << 20), "ok"), ((1024, resource.RLIM_INFINITY), "ok"), ((1024, 1024), "note")],
)
def test_only_the_hard_limit_of_open_files_counts(limit: tuple[int, int], level: str) -> None:
    assert check_open_files(limit).level == level


# -- storage --------------------------------------------------------------------------------------


def offload(tmp_path: Path, kind: str, direct: bool) -> list[Finding]:
    root = machine(tmp_path / "root", {"proc/self/mountinfo": MOUNTS.format(kind=kind)})
    folder = tmp_path / "not/yet/there"
    found = list(check_offload(folder, root, lambda folder: direct))
    assert not (tmp_path / "not").exists()
    return found[1:]


def test_a_local_disk_with_direct_access_is_fine(tmp_path: Path) -> None:
    (found,) = offload(tmp_path, "ext4", direct=True)
    assert found == ok("offload", "ext4 at /: direct reads and writes work")


@pytest.mark.parametrize(
    ("kind", "direct", "said"),
    [
        ("tmpfs", True, ["lies in memory"]),
        ("overlay", False, ["direct reads and writes do not work"]),
        ("nfs4", False, ["not on a local disk", "direct reads and writes do not work"]),
    ],
)
def test_a_file_system_that_misleads_is_noted(
    tmp_path: Path, kind: str, direct: bool, said: list[str]
) -> None:
    found = offload(tmp_path, kind, direct)
    assert levels(found) == ["note"] * len(said)
    assert all(text in finding.text for text, finding in zip(said, found, strict=True))


def test_direct_access_is_tried_where_the_directory_would_be(tmp_path: Path) -> None:
    asked: list[Path] = []
    list(check_offload(tmp_path / "a/b", writes=lambda folder: bool(asked.append(folder))))
    assert asked == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = check_offload(tmp_path / "file/offload")
    assert found.level == "problem" and "cannot be written" in found.text


@pytest.mark.parametrize(
    ("free", "level"), [(2**29, "note"), (5 * 2**30, "note"), (50 * 2**30, "ok")]
)
def test_a_disk_with_little_room_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    monkeypatch.setattr("flexpipe.doctor.storage.free_disk", lambda path: free)
    assert next(check_offload(tmp_path)).level == level


PROFILE = """
name: here
device: cpu
memory: {cpu: 1GiB, disk: 1GiB}
links: {disk_read: 1GB/s, disk_write: 1GB/s}
compute: {matmul: {float32: {1: 1GFLOP/s}}}
"""


def profiles(
    tmp_path: Path, text: str | None, env: Mapping[str, str] | None = None, days: float = 0
) -> Finding:
    if text is not None:
        (tmp_path / "cpu.yaml").write_text(text)
        days += (tmp_path / "cpu.yaml").stat().st_mtime / 86400
    (found,) = check_profile(env or {}, tmp_path, now_s=86400 * days + 1)
    return found


def test_a_profile_is_told_with_its_age(tmp_path: Path) -> None:
    found = profiles(tmp_path, PROFILE)
    assert found == ok("profile", f"here (cpu), of today: {tmp_path}/cpu.yaml")
    assert "a day old" in profiles(tmp_path, PROFILE, days=1).text
    assert profiles(tmp_path, PROFILE, days=100).level == "note"


def test_a_machine_without_a_profile_is_told_how_to_get_one(tmp_path: Path) -> None:
    assert profiles(tmp_path, None) == note("profile", "not measured yet", "flexpipe profile")


def test_a_profile_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    found = profiles(tmp_path, "name: here\n")
    assert found.level == "problem" and "needs device" in found.text
    missing = {"FLEXPIPE_PROFILE": str(tmp_path / "none.yaml")}
    found = profiles(tmp_path, PROFILE, missing)
    assert found.level == "problem" and "unset FLEXPIPE_PROFILE" in found.advice


def test_a_profile_that_was_named_is_the_only_one_and_never_too_old(tmp_path: Path) -> None:
    named = tmp_path / "named.yml"
    named.write_text(PROFILE)
    found = profiles(tmp_path, PROFILE, {"FLEXPIPE_PROFILE": str(named)}, days=1000)
    assert found.level == "ok" and str(named) in found.text
