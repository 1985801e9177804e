"""Does the planned peak of each tier equal the measured one?

Runs unlike policies on models with random weights, each in a process of its own, and prints what
the plan said, what the kernel measured, and what the budget was. `python benchmarks/memory.py`
runs all cases or those named behind it; `--work DIR` says where models and offloaded bytes go.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 10**6
TOLERANCE = 0.10  # of the plan, or TOLERANCE_BYTES, whichever is more
TOLERANCE_BYTES = 100 * MB
ON_DISK = (0, 0, 0, 100, 0, 100)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One policy on one shape; prompts are of `prompt` tokens, the last of a tenth of that."""

    hidden: int = 1024
    ffn: int = 2816
    layers: int = 16
    heads: int = 16
    kv_heads: int = 8
    vocab: int = 32_000
    num_prompts: int = 8
    prompt: int = 64
    output: int = 12
    device: str = "cpu"
    percent: Sequence[float] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


CASES: Mapping[str, Case] = {
    "cpu, resident in fp32": Case(percent=(0, 100, 0, 100, 0, 100)),
    "cpu, resident as in the checkpoint": Case(
        percent=(0, 100, 0, 100, 0, 100), given={"resident_dtype": "checkpoint"}
    ),
    "cpu, weights on disk": Case(hidden=2048, ffn=5632, layers=12, percent=ON_DISK),
    "cpu, a third of the weights on disk": Case(percent=(0, 67, 0, 100, 0, 100)),
    "cpu, KV cache on disk": Case(
        layers=8, num_prompts=64, prompt=256, percent=(0, 100, 0, 0, 0, 100)
    ),
    "cpu, everything on disk": Case(
        layers=8, num_prompts=32, prompt=128, percent=(0, 0, 0, 0, 0, 0),
        given={"micro_batch_size": 16, "num_micro_batches": 2},
    ),
    "cpu, 1900-token prompts in chunks": Case(
        num_prompts=8, prompt=1900, percent=(0, 100, 0, 100, 0, 100),
        given={"max_batch_tokens": 512},
    ),
    "cpu, 1900-token prompts whole": Case(
        layers=8, num_prompts=2, prompt=1900, percent=(0, 100, 0, 100, 0, 100)
    ),
    "cpu, vocabulary of 152k": Case(
        vocab=152_000, layers=4, num_prompts=64, prompt=16, percent=(0, 100, 0, 100, 0, 100)
    ),
    "cpu, vocabulary of 152k on disk": Case(
        vocab=152_000, layers=4, num_prompts=64, prompt=16, percent=ON_DISK
    ),
    "cpu, 512 short rows": Case(
        layers=8, num_prompts=512, prompt=8, output=4,
        given={"micro_batch_size": 128, "num_micro_batches": 4},
    ),
    "cpu, 400 steps": Case(layers=4, num_prompts=4, output=400),
    "cpu, no policy": Case(),
    "cpu, no policy, --cpu-mem 700MB": Case(given={"cpu_mem": 700 * MB}),
    "cpu, bf16 compute": Case(
        layers=8, percent=(0, 100, 0, 100, 0, 100), given={"compute_dtype": "bfloat16"}
    ),
    "emulated, small gpu, rest on cpu": Case(
        device="emulated", percent=(20, 80, 50, 50, 0, 100), given={"gpu_mem": 700 * MB}
    ),
    "emulated, all three tiers": Case(
        device="emulated", num_prompts=24, prompt=128, percent=(20, 50, 30, 40, 30, 40),
        given={"micro_batch_size": 8, "num_micro_batches": 3, "gpu_mem": 900 * MB},
    ),
    "emulated, no policy": Case(device="emulated", given={"gpu_mem": 500 * MB}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases; all without one")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "flexpipe-memory"
    )
    parser.add_argument("--json", type=Path, help="also write the raw figures there")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.run:
        print(json.dumps(run(CASES[arguments.run], arguments.work)))
        return
    rows = []
    for name in arguments.cases or CASES:
        command = [sys.executable, __file__, "--work", str(arguments.work), "--run", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode}")  # what failed is on stderr
        rows.append({"case": name, **json.loads(done.stdout.splitlines()[-1])})
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def run(case: Case, work: Path) -> dict[str, Any]:
    """One job in this process: seconds, and per tier what was planned, measured and granted."""
    from flexpipe.job.probes import Probes
    from flexpipe.job.run import run_job
    from flexpipe.job.spec import JobSpec
    from flexpipe.plan.policy import percent_shares
    from flexpipe.plan.tier import Tier

    given = dict(case.given)
    if case.percent is not None:
        given |= percent_shares(case.percent)
    plans: list[Any] = []
    with tempfile.TemporaryDirectory(dir=work) as directory:
        folder = Path(directory)
        (folder / "config.json").write_text(json.dumps(shape(case)))
        (folder / "prompts.jsonl").write_text("".join(prompts(case)))
        spec = JobSpec(
            model=str(folder / "config.json"),
            input_path=folder / "prompts.jsonl",
            output_path=folder / "results.jsonl",
            max_tokens=case.output,
            device=case.device,
            given=given,
            load_format="dummy",
            offload_dir=work / "offload",
            progress=False,
        )
        start = time.perf_counter()
        report = run_job(spec, Probes(on_stage=lambda stage: plans.append(stage.plan)))
        seconds = time.perf_counter() - start
    (plan,) = plans
    tiers = {
        use.tier: {
            "planned": use.planned_bytes,
            "measured": use.measured_bytes,
            "budget": plan.budgets.of(Tier(use.tier)),
            "held_before": plan.budgets.overhead if use.tier == "cpu" else 0,
        }
        for use in report.tiers
    }
    return {"seconds": seconds, "tiers": tiers, "notes": list(report.notes)}


def shape(case: Case) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "vocab_size": case.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": None,
    }


def prompts(case: Case) -> list[str]:
    rng = random.Random(0)
    lines = []
    for index in range(case.num_prompts):
        length = case.prompt - case.prompt * index * 9 // (10 * case.num_prompts)
        ids = [rng.randrange(3, case.vocab) for _ in range(max(1, length))]
        lines.append(json.dumps({"id": index, "prompt_token_ids": ids}) + "\n")
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| case | tier | planned MB | measured MB | difference | budget MB | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        for tier, use in row["tiers"].items():
            off = use["measured"] - use["planned"]
            inside = abs(off) <= max(TOLERANCE * use["planned"], TOLERANCE_BYTES)
            verdict = "ok" if inside and use["measured"] <= use["budget"] else "**off**"
            lines.append(
                f"| {row['case']} | {tier} | {use['planned'] / MB:.0f} | "
                f"{use['measured'] / MB:.0f} | {off / MB:+.0f} ({off / use['planned']:+.1%}) | "
                f"{use['budget'] / MB:.0f} | {verdict} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
