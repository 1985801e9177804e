"""What torch finds here: the accelerator, page-locked memory, threads and kernels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flexpipe.doctor.finding import Finding, note, ok, problem
from flexpipe.doctor.machine import cpu_quota, locked_memory_limit
from flexpipe.errors import FlexpipeError
from flexpipe.kernels import team
from flexpipe.memory.tier import TierMemory
from flexpipe.model.matmul import multiplies_bfloat16_faster
from flexpipe.plan.hardware import ROOT
from flexpipe.runtime.device import Device, open_device
from flexpipe.units import MIB, format_bytes

_TRIED_BYTES = 256 * MIB  # of page-locked memory


def check_device(name: str, root: Path = ROOT) -> Iterator[Finding]:
    """The device that `--device name` opens, what it can do, and the CPU's part in it."""
    try:
        device = open_device(name, None)
    except (FlexpipeError, RuntimeError) as error:
        yield problem("device", " ".join(str(error).split()), "flexpipe doctor --device auto")
        return
    if device.has_streams:
        yield _accelerator(device, root)
        yield _pinned(device)
    else:
        yield _no_accelerator(device, root)
        yield ok("pinned memory", f"{locked_memory_limit()}; of use beside an accelerator only")
    yield _threads(torch.get_num_threads(), cpu_quota(root))
    yield _kernels(team.available())
    yield _bfloat16(device)


def _accelerator(device: Device, root: Path) -> Finding:
    free, total = torch.accelerator.get_memory_info(device.torch_device)
    properties: Any = torch.get_device_module(device.torch_device).get_device_properties(
        device.torch_device
    )
    runtime = torch.version.cuda or torch.version.hip or "unknown"
    text = (
        f"{device.name}: {properties.name}, {format_bytes(free)} of {format_bytes(total)} free, "
        f"runtime {runtime}, driver {nvidia_driver(root) or 'unknown'}"
    )
    if free < total // 2:
        return note("device", text, "other programs hold its memory; end them, or set --gpu-mem")
    return ok("device", text)


def _no_accelerator(device: Device, root: Path) -> Finding:
    text = f"{device.name}: layers run on the CPU"
    driver = nvidia_driver(root)
    if driver is None or torch.accelerator.is_available():
        return ok("device", text)
    build = torch.version.cuda
    return note(
        "device",
        f"{text}, though NVIDIA's driver {driver} is here",
        f"`nvidia-smi` should list the GPU; its driver may be too old for CUDA {build}"
        if build
        else "install a build of torch with CUDA: see pytorch.org",
    )


def nvidia_driver(root: Path = ROOT) -> str | None:
    """Version of the kernel's driver, where there is one."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"[0-9]+\.[0-9]+(\.[0-9]+)?", text)
    return found.group() if found else None


def _pinned(device: Device) -> Finding:
    """Whether the system lets copies run beside the computation."""
    limit = locked_memory_limit()
    memory = TierMemory(device.torch_device, pin=True)
    try:
        memory.take_on_host(_TRIED_BYTES, "a trial")
        pinned = memory.pinned_bytes
    finally:
        memory.close()
    if pinned:
        return ok("pinned memory", f"{format_bytes(pinned)} could be locked ({limit})")
    return note(
        "pinned memory",
        f"{format_bytes(_TRIED_BYTES)} could not be locked ({limit}): copies hold up their lane",
        "raise `ulimit -l`",
    )


def _threads(threads: int, quota: float | None) -> Finding:
    usable = len(os.sched_getaffinity(0))
    text = f"torch computes with {threads}"
    if threads > min(usable, quota or usable):
        return note("threads", f"{text}, more than may run at once", "set OMP_NUM_THREADS lower")
    return ok("threads", text)


def _kernels(available: bool) -> Finding:
    if available:
        return ok("kernels", "compiled for this CPU")
    return note(
        "kernels",
        "cannot be compiled here, so torch's attend to the KV cache on the CPU, more slowly",
        "pip install llvmlite, and a torch that computes with OpenMP",
    )


def _bfloat16(device: Device) -> Finding:
    about = "bfloat16"
    if not device.has_streams:
        faster = multiplies_bfloat16_faster()
        return ok(about, "multiplied faster than float32" if faster else "computed in float32")
    if device.torch_device.type != "cuda" or torch.cuda.is_bf16_supported(False):
        return ok(about, "the device has units for it")
    return note(about, "emulated here, and slow", "--dtype float16, also for bfloat16 checkpoints")
