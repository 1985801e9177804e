"""How close do the strategies come to the slowest link?

A Llama shape on the emulated accelerator; weights and KV cache rest on the host, so that loads and
stores both cross links. The links' rates are set so that load, compute and store take about the
same time, and so that each dominates in turn. Compute sleeps until its FLOPs are done at the given
rate, which leaves the cores to the engine and makes the bound exact:

    bound = max(bytes ÷ bandwidth of each link, compute time measured under `none`)

Prompts have one token, so every step weighs the same and the wall time of the whole job counts:
filling and draining the pipeline is in it, loading the model before it is not.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.trial import (
    Sample,
    Trial,
    llama_shape,
    machine,
    markdown,
    run_trial,
    scratch,
    uniform_prompts,
)
from flexpipe.model.config import ModelConfig
from flexpipe.model.cost import decoder_flops
from flexpipe.model.families import read_config
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import STRATEGIES, Shares
from flexpipe.schedule.op import Kind

LAYERS, HIDDEN, FFN, HEADS, VOCAB = 32, 256, 704, 4, 512
ROWS, BLOCK = 4, 4
AIM = 1.10


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Seconds that one decoder layer of a block takes on each resource."""

    name: str
    load_s: float
    compute_s: float
    store_s: float
    disk_s: float | None = None  # weights rest on the disk, which is read no faster than this

    def emulation(self, config: ModelConfig) -> Emulation:
        flops = BLOCK * decoder_flops(config, ROWS, ROWS)
        return Emulation(
            h2d_bytes_per_s=_layer_bytes(config) / self.load_s,
            d2h_bytes_per_s=BLOCK * ROWS * _token_bytes(config) / self.store_s,
            disk_read_bytes_per_s=self.disk_s and _layer_bytes(config) / self.disk_s,
            flops_per_s=flops / self.compute_s,
        )


def settings(unit_s: float) -> tuple[Setting, ...]:
    half = unit_s / 2
    return (
        Setting(name="all equal", load_s=unit_s, compute_s=unit_s, store_s=unit_s),
        Setting(name="load dominates", load_s=unit_s, compute_s=half, store_s=half),
        Setting(name="compute dominates", load_s=half, compute_s=unit_s, store_s=half),
        Setting(name="store dominates", load_s=half, compute_s=half, store_s=unit_s),
        Setting(
            name="all equal, weights on disk",
            load_s=unit_s,
            compute_s=unit_s,
            store_s=unit_s,
            disk_s=unit_s,
        ),
    )


def _layer_bytes(config: ModelConfig) -> int:
    matrices = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_size
    return 4 * matrices


def _token_bytes(config: ModelConfig) -> int:
    return 2 * config.num_kv_heads * config.head_dim * 4


def measure(
    directory: Path, model: Path, setting: Setting, strategy: str, tokens: int, **how: Any
) -> Trial:
    on_disk = setting.disk_s is not None
    given = {
        "weights": Shares(disk=1.0) if on_disk else Shares(cpu=1.0),
        "kv_cache": Shares(cpu=1.0),
        "hidden": Shares(gpu=1.0),
        "micro_batch_size": ROWS,
        "num_micro_batches": BLOCK,
        "strategy": strategy,
    }
    config = read_config(json.loads((model / "config.json").read_text()))
    return run_trial(
        directory,
        model=model,
        prompts=uniform_prompts(ROWS * BLOCK, 1, VOCAB),
        max_tokens=tokens,
        given=given,
        emulation=setting.emulation(config),
        **how,
    )


def bounds(none: Trial, emulation: Emulation, num_steps: int) -> dict[str, float]:
    """Seconds that each resource needs at least: bytes over its rate, compute as under `none`.

    Weights that were loaded ahead for a step that never came are not needed.
    """
    needed = {"compute": none.recorder.busy_s[Kind.COMPUTE]}
    surplus = {"h2d": Kind.LOAD_WEIGHT, "disk_read": Kind.READ_WEIGHT}
    for link, num_bytes in none.link_bytes().items():
        rate = getattr(emulation, f"{link}_bytes_per_s")
        if rate is None:
            continue
        if link in surplus and none.recorder.num_ops[surplus[link]]:
            useful = num_steps * len(none.plan.streamed_layers)
            loads = none.recorder.num_ops[surplus[link]] - useful
            num_bytes -= loads * _layer_bytes(none.plan.config)
        needed[link] = num_bytes / rate
    return needed


def run_setting(
    directory: Path, model: Path, setting: Setting, tokens: int, n: int
) -> dict[str, Any]:
    """All strategies in turn, `n` times; the bound comes from the same round's `none`."""
    config = read_config(json.loads((model / "config.json").read_text()))
    walls: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    ratios: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    needed: list[dict[str, float]] = []
    for _ in range(n):
        trials: dict[str, Trial] = {
            name: measure(directory, model, setting, name, tokens) for name in STRATEGIES
        }
        needed.append(bounds(trials["none"], setting.emulation(config), tokens))
        assert len({json.dumps(sorted(trial.tokens.items())) for trial in trials.values()}) == 1
        for name, trial in trials.items():
            walls[name].append(trial.wall_s)
            ratios[name].append(trial.wall_s / max(needed[-1].values()))
    return {
        "setting": setting.name,
        "bounds_s": {
            name: Sample(tuple(each[name] for each in needed)).to_dict() for name in needed[0]
        },
        "wall_s": {name: Sample(tuple(values)).to_dict() for name, values in walls.items()},
        "ratio": {name: Sample(tuple(values)).to_dict() for name, values in ratios.items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        bound_name, bound = max(
            ((name, sample["median"]) for name, sample in result["bounds_s"].items()),
            key=lambda item: item[1],
        )
        needed = ", ".join(f"{k} {v['median']:.2f}" for k, v in result["bounds_s"].items())
        ratios = [
            f"{result['ratio'][name]['median']:.2f} "
            f"({result['ratio'][name]['min']:.2f}-{result['ratio'][name]['max']:.2f})"
            for name in STRATEGIES
        ]
        rows.append([result["setting"], needed, f"{bound:.2f} ({bound_name})", *ratios])
    return markdown(("setting", "each alone, s", "bound, s", *STRATEGIES), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--quick", action="store_true", help="one short round of each setting")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="only settings whose name contains this")
    parser.add_argument("--trace", type=Path, help="draw `event` in the first setting, and stop")
    args = parser.parse_args()
    tokens, rounds = (2, 1) if args.quick else (5, args.rounds)
    chosen = [s for s in settings(0.024) if (args.only or "") in s.name]
    facts = machine()
    torch.set_num_threads(1)  # compute sleeps; a second thread would only fight others for cores
    with scratch() as directory:
        model = llama_shape(
            directory / "model", layers=LAYERS, hidden=HIDDEN, ffn=FFN, heads=HEADS, vocab=VOCAB
        )
        if args.trace is not None:
            measure(directory, model, chosen[0], "event", tokens, trace=args.trace)
            return 0
        measure(directory, model, chosen[0], "event", 2)  # imports, dummy weights, page cache
        results = [run_setting(directory, model, each, tokens, rounds) for each in chosen]
    print(table(results))
    missed = [r["setting"] for r in results if r["ratio"]["event"]["median"] > AIM]
    print(f"\nevent is within {AIM:.2f} of the bound" + (f" except: {missed}" if missed else ""))
    if args.json is not None:
        text = json.dumps({"machine": facts, "rounds": rounds, "results": results}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
