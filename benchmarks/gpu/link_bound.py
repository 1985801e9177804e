"""How much of the link does a link-bound run use?

All weights rest in page-locked host memory, the rest on the device, and few rows decode: the wall
time is the weights' way to the device. Bytes over wall time are compared with plain copies of
page-locked memory, measured right before and right after.
"""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.part import Bench, Finding
from benchmarks.trial import llama_shape, run_trial, uniform_prompts
from flexpipe.memory.tier import TierMemory
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import Shares
from flexpipe.runtime.device import open_device
from flexpipe.units import format_rate

VOCAB = 1024
RATES = Emulation(h2d_bytes_per_s=100e6)
AIM = 0.85


def check(bench: Bench) -> Finding:
    """The run's bytes per second over the plain copy's."""
    small = bench.small or bench.is_emulated
    layers, hidden, ffn, heads = (10, 128, 352, 4) if small else (16, 4096, 14336, 32)
    dtype = "float32" if small else "float16"
    model = llama_shape(
        bench.directory / "model",
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        vocab=VOCAB,
        dtype=dtype,
    )
    plain = plain_rate(bench)
    trial = run_trial(
        bench.directory,
        model=model,
        prompts=uniform_prompts(4, 8, VOCAB),
        max_tokens=12 if small else 16,
        device=bench.device,
        emulation=bench.emulation(RATES),
        given={
            "weights": Shares(cpu=1.0),
            "kv_cache": Shares(gpu=1.0),
            "hidden": Shares(gpu=1.0),
            "micro_batch_size": 4,
            "compute_dtype": dtype,
        },
    )
    plain = max(plain, plain_rate(bench))
    rate = trial.link_bytes()["h2d"] / trial.wall_s
    return Finding(
        passed=rate >= AIM * plain and not trial.report.notes,
        summary=f"{format_rate(rate)} of {format_rate(plain)}: {rate / plain:.1%} "
        f"(aim: at least {AIM:.0%})",
        figures={
            "fraction": rate / plain,
            "bytes_per_s": rate,
            "plain_bytes_per_s": plain,
            "wall_s": trial.wall_s,
        },
        details=list(trial.report.notes),
    )


def plain_rate(bench: Bench, num_bytes: int = 2**30, repeats: int = 5) -> float:
    """Bytes per second of one long page-locked copy to the device; the best of a few."""
    if bench.is_emulated:
        num_bytes, repeats = 10 * 2**20, 2
    device = open_device(bench.device, bench.emulation(RATES))
    memory = TierMemory(device.torch_device, pin=True)
    source = memory.take_on_host(num_bytes, "a plain copy")
    target = torch.zeros(num_bytes, dtype=torch.uint8, device=device.torch_device)
    best = float("inf")
    for _ in range(repeats):
        if device.has_streams:
            torch.accelerator.synchronize()
        start = time.perf_counter()
        device.copy(target, source)
        device.h2d.deliver(num_bytes, start)
        if device.has_streams:
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    memory.close()
    return num_bytes / best
