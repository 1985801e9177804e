"""Does a layer's load lie under the computing of the layer before it, by the ops' own times?

Times come from the recorder: events on a GPU, clocks elsewhere. The workload is a long prefill
whose compute takes longer than the weights need to cross the link.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.part import Bench, Finding
from benchmarks.trial import Trial, llama_shape, run_trial, uniform_prompts
from flexpipe.job.probes import Probes
from flexpipe.model.cost import decoder_flops
from flexpipe.model.families import read_config
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import Shares
from flexpipe.schedule.op import Kind

VOCAB = 512
AIM = 0.8


def check(bench: Bench) -> Finding:
    """Share of LOAD_WEIGHT(j+1) that lies inside COMPUTE(j), under `event` and under `none`."""
    shares = {}
    for strategy in ("none", "event"):
        trial = _run(bench, strategy)
        shares[strategy] = _overlaps(trial)
    inside = {name: _mean([share > 0.99 for share in each]) for name, each in shares.items()}
    mean = {name: _mean(each) for name, each in shares.items()}
    return Finding(
        passed=mean["event"] >= AIM and mean["none"] < 0.02,
        summary=f"{mean['event']:.0%} of load(j+1) lies under compute(j), {inside['event']:.0%} of "
        f"the layers wholly; under `none` {mean['none']:.0%} (aim: at least {AIM:.0%}, and 0%)",
        figures={"mean_overlap": mean, "layers_inside": inside, "layers": len(shares["event"])},
    )


def _run(bench: Bench, strategy: str) -> Trial:
    small = bench.small or bench.is_emulated
    layers, hidden, ffn, heads = (8, 128, 352, 4) if small else (8, 4096, 14336, 32)
    rows, length, block = (2, 16, 4) if small else (4, 1024, 8)
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
    return run_trial(
        bench.directory,
        model=model,
        prompts=uniform_prompts(rows * block, length, VOCAB),
        max_tokens=1 if small else 2,
        device=bench.device,
        emulation=bench.emulation(_rates(model, rows, length, block)),
        given={
            "weights": Shares(cpu=1.0),
            "kv_cache": Shares(gpu=1.0),
            "hidden": Shares(gpu=1.0),
            "micro_batch_size": rows,
            "num_micro_batches": block,
            "max_batch_tokens": rows * length,
            "compute_dtype": dtype,
            "strategy": strategy,
        },
        probes=Probes(keep_spans=True),
    )


def _rates(model: Path, rows: int, length: int, block: int) -> Emulation:
    """Links and compute on which a layer's load takes 20 ms, its compute 30."""
    config = read_config(json.loads((model / "config.json").read_text("utf-8")))
    matrices = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_size
    flops = block * decoder_flops(config, rows * length, rows * length * length // 2)
    return Emulation(h2d_bytes_per_s=4 * matrices / 0.020, flops_per_s=flops / 0.030)


def _overlaps(trial: Trial) -> list[float]:
    """Share of each decoder layer's load in the first step that lies under the layer before."""
    computes: dict[int, list[tuple[float, float]]] = defaultdict(list)
    loads: dict[int, tuple[float, float]] = {}
    for span in sorted(trial.recorder.spans, key=lambda span: span.start_s):
        if span.op.step == 0 and span.op.kind == Kind.COMPUTE:
            computes[span.op.layer].append((span.start_s, span.end_s))
        elif span.op.step == 0 and span.op.kind == Kind.LOAD_WEIGHT:
            loads.setdefault(span.op.layer, (span.start_s, span.end_s))
    decoders = [layer.position for layer in trial.plan.layers if layer.layer is not None]
    return [_share(loads[layer], computes[layer - 1]) for layer in decoders[2:]]


def _share(load: tuple[float, float], computes: list[tuple[float, float]]) -> float:
    """Share of `load` that lies between the first compute's start and the last one's end."""
    start = max(load[0], computes[0][0])
    end = min(load[1], computes[-1][1])
    return max(0.0, end - start) / (load[1] - load[0])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
