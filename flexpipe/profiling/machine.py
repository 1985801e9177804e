"""Measuring this machine: everything the cost model asks, as one `Profile`.

Each part is measured alone, as the engine does it, by the modules beside this one. Here is decided
where: what computes in one thread with all intra-op threads, copies in one with a single one, so
that no second team fights for the cores. Files lie in a folder of the offload directory that goes
away with the measurement.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from flexpipe.kernels import attend
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.memory.tier import populated
from flexpipe.model.matmul import packs
from flexpipe.plan.hardware import free_memory
from flexpipe.plan.mount import mount_point
from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.profile import OVERHEADS, Profile, Rates
from flexpipe.profiling.attention import PAIR_BYTES, AttentionTasks
from flexpipe.profiling.effort import FULL, QUICK, Effort
from flexpipe.profiling.links import DiskTasks, copy_tasks
from flexpipe.profiling.messages import message_tasks
from flexpipe.profiling.overhead import calls_beside_calls, op_times, overheads
from flexpipe.profiling.products import PAIR_ROWS, ProductTasks
from flexpipe.profiling.slowdown import slowdowns
from flexpipe.profiling.stopwatch import Rated, Stopwatch, Task, TaskSource, rate_all
from flexpipe.profiling.wake import wake_times
from flexpipe.runtime.device import Device, open_device
from flexpipe.runtime.usable import usable_memory
from flexpipe.schedule.simulate import CALLS
from flexpipe.units import MIB

CPU = torch.device("cpu")
_POOL_BYTES, _POOLS = 64 * MIB, 4

Tell = Callable[[str], None]
_T = TypeVar("_T")


def measure_profile(
    device_name: str,
    offload_dir: Path,
    dtypes: Sequence[str] = (),
    *,
    quick: bool,
    rounds: int | None = None,
    progress: Tell = lambda what: None,
    effort: Effort | None = None,
) -> Profile:
    """This machine, with `offload_dir` on its disk; `progress` is told what is measured next.
    `rounds` of every rate instead of the usual number say what it keeps up for longer.

    An emulated accelerator has its CPU's profile. No `dtypes` means those worth computing in.
    """
    device = measured_device(device_name)
    effort = (effort or (QUICK if quick else FULL)).within(free_memory())
    effort = replace(effort, rounds=rounds or effort.rounds)
    dtypes = dtypes or worthwhile_dtypes(device.torch_device)
    pools, kernels_s = _populating(), _compiling(dtypes[-1])  # as a process begins
    waking, first_s = _waking(device, effort), _first(device, dtypes[-1], effort)
    with OffloadDirectory(offload_dir) as offload:
        memory = usable_memory(device, offload.path)
        progress("what ops cost beside their work")
        tries = [_op_times(device, offload.job, effort)]
        with contextlib.closing(DiskTasks(offload.job, effort)) as disk:
            progress("links and the disk")
            links = _links(device, disk, effort)
            latencies = _latencies(disk, effort)
            if not effort.quick:
                tries.append(_op_times(device, offload.job, effort))
            rates = _compute(device.torch_device, dtypes, effort, progress)
            host = None if device.torch_device == CPU else _host(dtypes, effort, progress)
            progress("how activities disturb each other")
            slowdown = _slowdowns(device, dtypes[-1], disk, effort)
        if not effort.quick:
            tries.append(_op_times(device, offload.job, effort))
    pools = min(pools, _populating())  # what is at hand may have run out since
    overhead_s = {**overheads(tries), **latencies, "kernels": kernels_s, "first": first_s}
    calls = calls_beside_calls(tries)
    return Profile(
        name=_name(device),
        date=datetime.date.today().isoformat(),
        source=f"measured by flexpipe profile{' --quick' if effort.quick else ''}",
        device=device.torch_device.type,
        memory=memory,
        links=_curves(links, "links"),
        compute=_rates(rates),
        host=host,
        overhead_s={name: overhead_s[name] for name in OVERHEADS},
        slowdown={**slowdown, CALLS: calls},
        wake_s=waking,
        load={**_flat(rates, "load"), **_flat(links, "load"), "pools": pools},
        details=_curves(links, "details"),
        threads=torch.get_num_threads(),
        quick=effort.quick,
        machine=machine_id(),
        mount=mount_point(offload_dir),
    )


def with_dtypes(
    profile: Profile,
    device_name: str,
    dtypes: Sequence[str],
    *,
    progress: Tell = lambda what: None,
    effort: Effort = QUICK,
) -> Profile:
    """The profile, completed by compute dtypes that it lacks."""
    device, effort = measured_device(device_name), effort.within(free_memory())
    found = _compute(device.torch_device, dtypes, effort, progress)
    host = profile.host
    if host is not None:
        host = _joined(host, _host(dtypes, effort, progress))
    return replace(
        profile,
        compute=_joined(profile.compute, _rates(found)),
        host=host,
        load={**profile.load, **_flat(found, "load")},
    )


def measured_device(name: str) -> Device:
    """The device whose profile `name` has."""
    return open_device("cpu" if name == "emulated" else name, None)


def worthwhile_dtypes(device: torch.device) -> tuple[str, ...]:
    """float32 on a CPU, with bfloat16 where it has kernels for it; the narrow ones elsewhere."""
    if device.type != "cpu":
        return ("float16", "bfloat16")
    narrow = packs((4096, 4096), torch.bfloat16, device)
    return ("float32", "bfloat16") if narrow else ("float32",)


def machine_id() -> str:
    """The same for equal machines: processor, cores this process may use, memory."""
    parts = (_processor(), len(os.sched_getaffinity(0)), psutil.virtual_memory().total >> 26)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _name(device: Device) -> str:
    cores = len(os.sched_getaffinity(0))
    host = f"{_processor()}, {torch.get_num_threads()} threads on {cores} cores"
    if device.torch_device == CPU:
        return host
    return f"{torch.get_device_module(device.torch_device).get_device_name()} beside {host}"


def _watch(device: torch.device, effort: Effort) -> Stopwatch:
    return Stopwatch(device, effort.window_s)


def _in_thread(work: Callable[[], _T], num_threads: int | None = None) -> _T:
    """In a thread of its own, whose team of workers ends with it; all intra-op threads or some."""
    team = num_threads or torch.get_num_threads()  # a new thread would have what was set last

    def run() -> _T:
        torch.get_num_threads()  # lets torch set up this thread before it is overruled
        torch.set_num_threads(team)
        with torch.inference_mode():
            return work()

    with _threads_kept(), ThreadPoolExecutor(1, "flexpipe-measure") as thread:
        return thread.submit(run).result()


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """What one thread sets, later threads start with: undo it."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _op_times(device: Device, directory: Path, effort: Effort) -> dict[str, float]:
    return op_times(device.torch_device.type, directory, effort.op_steps)


def _links(device: Device, disk: DiskTasks, effort: Effort) -> Rated:
    """A disk's rate is what it keeps up, so neither the best of its rounds nor a moment's. Further
    figures are for people: one round of them will do."""
    watch, longer = _watch(device.torch_device, effort), Stopwatch(CPU, effort.disk_window_s)
    copies = [partial(copy_tasks, device, effort)]
    moves: list[TaskSource] = [partial(disk.moves, effort.transfers), disk.loads]
    further: list[TaskSource] = [] if effort.quick else [disk.details]
    if device.has_streams and not effort.quick:
        further.append(partial(copy_tasks, device, effort, pin=False))

    def rate() -> Rated:
        return {
            **rate_all(copies, watch, effort.rounds),
            **rate_all(moves, longer, effort.rounds),
            **rate_all([partial(message_tasks, effort)], watch, effort.rounds),
            **rate_all(further, watch, 1),
        }

    return _in_thread(rate, num_threads=1)


def _latencies(disk: DiskTasks, effort: Effort) -> dict[str, float]:
    """Seconds."""
    rate = partial(rate_all, [disk.latencies], _watch(CPU, effort), effort.rounds)
    return {str(key[1]): 1 / each for key, each in _in_thread(rate, num_threads=1).items()}


def _compute(device: torch.device, dtypes: Sequence[str], effort: Effort, progress: Tell) -> Rated:
    products, attention = ProductTasks(device, effort), AttentionTasks(device, effort)
    watch = _watch(device, effort)
    sources: list[TaskSource] = [attention.compression]
    for dtype in dtypes:
        sources += [*products.sources(dtype), *attention.sources(dtype)]
    progress(f"products and attention in {', '.join(dtypes)}")
    return _in_thread(partial(rate_all, sources, watch, effort.rounds))


def _host(dtypes: Sequence[str], effort: Effort, progress: Tell) -> Rates:
    """What a CPU beside an accelerator may be asked to do."""
    products, attention = ProductTasks(CPU, effort), AttentionTasks(CPU, effort)
    watch = _watch(CPU, effort)
    sources: list[TaskSource] = [attention.compression]
    for dtype in dtypes:
        sources += [products.least(dtype), *attention.decoding(dtype)]
    progress("attention on the CPU")
    return _rates(_in_thread(partial(rate_all, sources, watch, effort.rounds)))


def _populating() -> float:
    """Bytes per second of the slowest of some pools that are taken one after the other: the first
    come from what is at hand, and a virtual machine's host may take twenty times as long to give
    more."""
    slabs, rates = [], []
    for _ in range(_POOLS):
        start = time.perf_counter()
        slabs.append(populated(_POOL_BYTES, "measuring how fast pools are taken"))
        rates.append(_POOL_BYTES / (time.perf_counter() - start))
    return min(rates)


def _compiling(dtype: str) -> float:
    """Seconds until decoding rows can attend on the CPU."""
    start = time.perf_counter()
    if attend.runs_here(CPU):
        attend.compile_for(num_heads=32, num_kv_heads=8, head_dim=128, dtype=dtype, codec=None)
    return time.perf_counter() - start


def _waking(device: Device, effort: Effort) -> dict[float, float]:
    """An accelerator's streams do not sleep."""
    if device.torch_device != CPU:
        return {}
    with _threads_kept():
        return wake_times(effort.wakes, torch.get_num_threads())


def _first(device: Device, dtype: str, effort: Effort) -> float:
    """An accelerator's kernels suit any number of rows."""
    if device.torch_device != CPU:
        return 0.0
    return _in_thread(partial(ProductTasks(CPU, effort).first_s, dtype))


def _slowdowns(
    device: Device, dtype: str, disk: DiskTasks, effort: Effort
) -> dict[tuple[str, str], float]:
    """On an accelerator only the host's activities share anything."""
    with torch.inference_mode(), contextlib.closing(copy_tasks(device, effort)) as copies:
        pair = AttentionTasks(CPU, effort).pair(dtype)
        tasks = {"attend": pair, "copy": _of_size(copies, PAIR_BYTES)}
        for task in disk.moves((PAIR_BYTES,)):
            tasks[str(task.key[1])] = task
        if device.torch_device == CPU:
            products = ProductTasks(CPU, effort)
            tasks |= {name: products.pair(dtype, rows) for name, rows in PAIR_ROWS.items()}
        with _threads_kept():
            return slowdowns(
                tasks,
                num_threads=torch.get_num_threads(),
                windows=effort.pair_windows * effort.rounds,
                window_s=effort.pair_s,
            )


def _of_size(tasks: Iterator[Task], num_bytes: int) -> Task:
    return next(task for task in tasks if task.amount >= num_bytes)


def _rates(found: Rated) -> Rates:
    """Each field of what was measured in its own form: numbers, curves or surfaces."""
    forms: Mapping[str, Callable[[Rated, str], Mapping[str, Any]]] = {
        "matmul": _surfaces,
        "packed": _surfaces,
        "converted": _surfaces,
        "prefill_attention": _curves,
        "decode_attention": _curves,
        "elementwise": _curves,
        "rotary": _curves,
        "gating": _curves,
    }
    return Rates(
        **{item.name: forms.get(item.name, _flat)(found, item.name) for item in fields(Rates)}
    )


def _joined(one: Rates, other: Rates) -> Rates:
    return Rates(
        **{
            item.name: {**getattr(one, item.name), **getattr(other, item.name)}
            for item in fields(Rates)
        }
    )


def _flat(found: Rated, field: str) -> dict[str, float]:
    return {str(key[1]): rate for key, rate in found.items() if key[0] == field}


def _curves(found: Rated, field: str) -> dict[str, Curve]:
    points: dict[str, dict[float, float]] = {}
    for key, rate in found.items():
        if key[0] == field:
            points.setdefault(str(key[1]), {})[float(key[2])] = rate
    return {name: Curve.of(some) for name, some in points.items()}


def _surfaces(found: Rated, field: str) -> dict[str, Surface]:
    points: dict[str, dict[float, dict[float, float]]] = {}
    for key, rate in found.items():
        if key[0] == field:
            of_weight = points.setdefault(str(key[1]), {}).setdefault(float(key[2]), {})
            of_weight[float(key[3])] = rate
    return {
        name: Surface.of({size: Curve.of(some) for size, some in sizes.items()})
        for name, sizes in points.items()
    }
