"""What torch can and cannot do here is found by trying, and never ends the doctor's round."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexpipe.doctor.device import check_device, nvidia_driver
from flexpipe.doctor.examine import examine
from flexpipe.doctor.finding import Finding, num_problems

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2026\nGCC\n"


def found(name: str, root: Path) -> dict[str, Finding]:
    return {finding.about: finding for finding in check_device(name, root)}


def test_the_cpu_is_looked_at_without_an_accelerator(tmp_path: Path) -> None:
    for name in ("cpu", "emulated"):
        findings = found(name, tmp_path)
        assert list(findings) == ["device", "pinned memory", "threads", "kernels", "bfloat16"]
        assert findings["device"].text == f"{name}: layers run on the CPU"
        assert findings["device"].level == "ok"


def test_a_device_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    (device,) = found("cuda:99", tmp_path).values()
    assert device.level == "problem" and "--device cuda:99" in device.text


def test_a_driver_without_its_gpu_in_torch_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(DRIVER)
    assert nvidia_driver(tmp_path) == "535.183.01"
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    without = found("cpu", tmp_path)["device"]
    assert without.level == "note" and "a build of torch with CUDA" in without.advice
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "too old for CUDA 13.0" in found("cpu", tmp_path)["device"].advice


def test_more_threads_than_cores_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    for count, level in ((2, "ok"), (3, "note")):
        monkeypatch.setattr("torch.get_num_threads", lambda count=count: count)
        assert found("cpu", tmp_path)["threads"].level == level


def test_missing_kernels_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpipe.kernels.team.available", lambda: False)
    assert found("cpu", tmp_path)["kernels"].level == "note"


def test_a_torch_that_does_not_load_is_one_problem_among_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEXPIPE_PROFILE", raising=False)
    monkeypatch.setitem(sys.modules, "flexpipe.doctor.device", None)
    findings = examine("auto", tmp_path)
    (broken,) = [finding for finding in findings if finding.level == "problem"]
    assert broken.about == "torch" and "cannot be imported" in broken.text
    assert {"cpu", "memory", "offload", "profile"} <= {finding.about for finding in findings}
    assert num_problems(findings) == 1
