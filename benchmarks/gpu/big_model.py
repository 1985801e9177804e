"""Does a model run that is four times the accelerator's memory?

An OPT-30B shape with random fp16 weights (60 GB) under a budget of 16 GiB of accelerator memory and
100 GiB of host memory; a small OPT shape under a small budget where there is no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.part import Bench, Finding
from benchmarks.trial import run_trial, uniform_prompts
from flexpipe.plan.hardware import free_memory
from flexpipe.plan.policy import Shares
from flexpipe.units import GIB, MIB, format_bytes

VOCAB = 50272
SMALL: Mapping[str, Any] = {
    "model_type": "opt",
    "torch_dtype": "float16",
    "vocab_size": 2048,
    "hidden_size": 256,
    "word_embed_proj_dim": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "ffn_dim": 1024,
    "max_position_embeddings": 512,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "tie_word_embeddings": True,
}
SLACK = 1.10


def check(bench: Bench) -> Finding:
    """Run it, and compare the peaks with the budgets and with the plan."""
    small = bench.small or bench.is_emulated
    trial = run_trial(bench.directory, **(_small(bench) if small else _opt_30b(bench)))
    report = trial.report
    gpu = next(tier for tier in report.tiers if tier.tier == "gpu")
    host = next(tier for tier in report.tiers if tier.tier == "cpu")
    problems = [
        *report.notes,
        *trial.errors.values(),
        *(["not every request finished"] if report.num_finished < report.num_requests else []),
    ]
    for tier in (gpu, host):
        limit = SLACK * tier.planned_bytes
        if tier.measured_bytes > min(limit, tier.asked_bytes or limit):
            problems.append(f"{tier.tier}: more than planned or asked")
    return Finding(
        passed=not problems,
        summary=f"{report.generated_tokens_per_s:.1f} tokens/s (decode "
        f"{report.decode_tokens_per_s:.1f}); gpu {format_bytes(gpu.measured_bytes)} of "
        f"{format_bytes(gpu.asked_bytes or 0)}, host {format_bytes(host.measured_bytes)}",
        figures=report.to_dict(),
        details=[*problems, *report.render().splitlines()],
    )


def _small(bench: Bench) -> dict[str, Any]:
    model = bench.directory / "opt"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return {
        "model": model,
        "prompts": uniform_prompts(8, 64, 2048),
        "max_tokens": 4,
        "device": bench.device,
        "emulation": bench.emulation(),
        "given": {
            "gpu_mem": 16 * MIB,
            "compute_dtype": "float32" if bench.is_emulated else "float16",
            "micro_batch_size": 4,
            "num_micro_batches": 2,
        },
    }


def _opt_30b(bench: Bench) -> dict[str, Any]:
    gpu, rows, prompt, output = 0.10, 32, 512, 16
    weights = 60.0e9
    kv = rows * (prompt + output) * 2 * 7168 * 2 * 48
    host = min(100 * GIB, free_memory() * 0.95) - kv - 6 * GIB
    cpu = max(0.0, min(1 - gpu, int(20 * host / weights) / 20))
    return {
        "model": "opt-30b",
        "prompts": uniform_prompts(rows, prompt, VOCAB),
        "max_tokens": output,
        "device": bench.device,
        "given": {
            "weights": Shares(gpu=gpu, cpu=cpu, disk=1 - gpu - cpu),
            "kv_cache": Shares(cpu=1.0),
            "hidden": Shares(gpu=1.0),
            "gpu_mem": 16 * GIB,
            "cpu_mem": min(100 * GIB, int(free_memory() * 0.98)),
            "compute_dtype": "float16",
            "micro_batch_size": 16,
            "num_micro_batches": 2,
            "max_batch_tokens": 16 * prompt,
        },
    }
