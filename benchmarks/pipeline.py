"""What does a pipeline lose to bubbles, and what does it gain?

Bubbles: four equal emulated stages whose compute has a given rate, so that they sleep where a real
device would compute, with one, two and four blocks in flight per stage. Draining rounds should lose
(N-1)/(N-1+M); without draining a stage should wait only to fill and to drain; virtual stages should
shorten both. What a stage computes is read from the traces of all ranks.

Gain: two ranks of one core each against one rank of one core, and four emulated stages with links
and disks of their own against one, with as many rows in flight on both sides, in turns.

    PYTHONPATH=. python benchmarks/pipeline.py bubble|gain [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import Shape
from benchmarks.trial import machine, markdown, scratch
from flexpipe.sweep.child import run_flexpipe

NUM_STAGES = 4
ROUNDS = 3
# eight equal layers; embedding and head weigh next to nothing
EQUAL = Shape(hidden=256, layers=8, heads=8, kv_heads=8, ffn=768, vocab=64)
BUSY = Shape(hidden=1024, layers=8, heads=16, kv_heads=16, ffn=4096, vocab=256)
RATE = "compute=0.2GFLOP/s"  # a step of eight rows then takes a stage some 140 ms
_STREAMED = ["0", "80", "100", "0", "100", "0"]
RESIDENT = ("--percent", *["100", "0", "100", "0", "100", "0"])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline to run: its options, the rows of a block, and what is expected of it."""

    name: str
    num_blocks: int
    options: Sequence[str] = ()
    drains: bool = False

    @property
    def bound(self) -> float | None:
        """The share of its time that a stage must lose to draining rounds."""
        if not self.drains:
            return None
        return (NUM_STAGES - 1) / (NUM_STAGES - 1 + self.num_blocks)


def cases() -> Iterator[Case]:
    for per_stage in (1, 2, 4):
        num_blocks = NUM_STAGES * per_stage
        for strategy in ("multi", "event"):
            options = ("--overlap", strategy)
            yield Case(
                name=f"{strategy}, M = {num_blocks}",
                num_blocks=num_blocks,
                options=options,
                drains=strategy == "multi",
            )
    for strategy in ("multi", "event"):
        options = ("--overlap", strategy, "--virtual-stages", "2")
        yield Case(name=f"{strategy}, M = 4, 2 virtual stages", num_blocks=4, options=options)


# -- running ---------------------------------------------------------------------------------------


def run(folder: Path, shape: Shape, words: Sequence[str], prompts: Sequence[int], gen: int) -> Any:
    """The report of `flexpipe run` over prompts of these lengths, as plain values."""
    model = folder / f"model-{shape.hidden}"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    lines = [{"id": i, "prompt_token_ids": [7 + i % 50] * n} for i, n in enumerate(prompts)]
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    ended = run_flexpipe(
        [
            *("run", "--model", str(model), "--load-format", "dummy", "--dtype", "float32"),
            *("-i", str(source), "-o", str(folder / "results.jsonl"), "--overwrite"),
            *("--max-tokens", str(gen), "--ignore-eos", "--offload-dir", str(folder / "offload")),
            *("--json", *words),
        ]
    )
    if ended.exit_code:
        raise SystemExit(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def piped(num_stages: int, *words: str) -> list[str]:
    shared = ["--pipeline-parallel-size", str(num_stages), "--partition", "even"]
    return [*(shared if num_stages > 1 else ()), *words]


# -- bubbles ---------------------------------------------------------------------------------------


def bubbles(folder: Path) -> list[Mapping[str, Any]]:
    rows, gen, prompt = 8, 16, 1
    found = []
    for case in cases():
        trace = folder / "trace.json"
        report = run(
            folder,
            EQUAL,
            piped(
                NUM_STAGES,
                *("--device", "emulated", "--emulate", RATE, *RESIDENT),
                *("--gpu-batch-size", str(rows), "--num-gpu-batches", "1"),
                *("--num-inner-iterations", str(case.num_blocks), "--trace", str(trace)),
                *case.options,
            ),
            [prompt] * (rows * case.num_blocks),
            gen,
        )
        predicted = {
            figure["name"]: figure["predicted"] for figure in report["prediction"]["figures"]
        }
        decode = decode_bubbles(trace, case.num_blocks)
        found.append(
            {
                "case": case.name,
                "bound": case.bound,
                "measured": [stage["bubble"] for stage in report["stages"]],
                "predicted": [predicted[f"stage_{i}_bubble"] for i in range(NUM_STAGES)],
                "decode": decode,
                "cpu": [stage["cpu_share"] for stage in report["stages"]],
            }
        )
        print(f"{case.name}: {found[-1]}", file=sys.stderr)
    return found


def decode_bubbles(trace: Path, num_blocks: int) -> list[float]:
    """What each stage waits from the begin of its first decoding op to the end of its last one:
    the time without its fill and its drain. The first step of every block is the prompts'."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    spans: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        computes = event.get("cat") in ("compute", "sample", "fetch_tokens")
        if computes and event["args"]["step"] >= num_blocks:
            spans.setdefault(event["pid"], []).append((event["ts"], event["dur"]))
    return [
        1 - sum(took for _, took in mine) / (max(at + took for at, took in mine) - min(mine)[0])
        for _, mine in sorted(spans.items())
    ]


def bubble_table(found: Sequence[Mapping[str, Any]]) -> str:
    head = ("blocks in flight", "must lose", "allowed", "measured, worst stage", "predicted, worst",
            "decoding alone, worst", "real CPU per rank, most")  # fmt: skip
    lines = []
    for one in found:
        bound = one["bound"]
        lines.append(
            (
                one["case"],
                "" if bound is None else f"{bound:.1%}",
                "" if bound is None else f"{1.15 * bound + 0.02:.1%}",
                f"{max(one['measured']):.1%}",
                f"{max(one['predicted']):.1%}",
                f"{max(one['decode']):.1%}",
                f"{max(one['cpu']):.0%}",
            )
        )
    return markdown(head, lines)


# -- gain ------------------------------------------------------------------------------------------


def gains(folder: Path) -> Mapping[str, Any]:
    """Generated tokens per second of one rank and of several, in turns."""
    rates: dict[str, list[float]] = {}
    cpu: list[float] = []

    def note(name: str, report: Mapping[str, Any]) -> None:
        rates.setdefault(name, []).append(report["generated_tokens_per_s"])
        print(f"{name}: {rates[name]}", file=sys.stderr)

    for _ in range(ROUNDS):
        for count in (1, 2):
            note(f"cpu, {count} of one core", _busy(folder, count))
        for count in (1, NUM_STAGES):
            report = _emulated(folder, count)
            note(f"emulated, {count}", report)
            cpu += [stage["cpu_share"] for stage in report["stages"]]
    return {"rates": rates, "cpu_share": cpu}


def _busy(folder: Path, count: int) -> Any:
    """Compute-bound: 512 rows in flight, in one block or in two for each rank."""
    os.environ["OMP_NUM_THREADS"] = "1"
    num_blocks = 1 if count == 1 else 2 * count
    shape = (
        "--device",
        "cpu",
        "--gpu-batch-size",
        str(512 // num_blocks),
        "--num-gpu-batches",
        "1",
    )
    blocks = ("--num-inner-iterations", str(num_blocks))
    return run(folder, BUSY, piped(count, *shape, *blocks), [1] * 512, 16)


def _emulated(folder: Path, count: int) -> Any:
    """64 rows in flight, eight at a time; weights travel over each rank's own link, and a part of
    them comes from its own disk."""
    os.environ["OMP_NUM_THREADS"] = "1"
    links = "compute=0.4GFLOP/s,h2d=200MB/s,d2h=200MB/s,disk_read=100MB/s"
    num_blocks = 1 if count == 1 else 2 * count
    words = piped(
        count,
        *("--device", "emulated", "--emulate", links, "--percent", *_STREAMED),
        *("--gpu-batch-size", "8", "--num-gpu-batches", str(8 // num_blocks)),
        *("--num-inner-iterations", str(num_blocks)),
    )
    return run(folder, EQUAL, words, [1] * 64, 48)


def gain_table(found: Mapping[str, Any]) -> str:
    rates = {name: statistics.median(some) for name, some in found["rates"].items()}
    lines = []
    for one, more, aim in (
        ("cpu, 1 of one core", "cpu, 2 of one core", 1.8),
        ("emulated, 1", f"emulated, {NUM_STAGES}", 3.4),
    ):
        ratio = rates[more] / rates[one]
        lines.append((more, f"{rates[one]:.1f}", f"{rates[more]:.1f}", f"{ratio:.2f}", aim))
    head = ("ranks", "one, tokens/s", "several, tokens/s", "times", "wanted")
    most = max(found["cpu_share"])
    return f"{markdown(head, lines)}\n\nReal CPU use of an emulated rank: at most {most:.0%}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=("bubble", "gain"))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with scratch() as folder:
        found: Any = bubbles(folder) if asked.question == "bubble" else gains(folder)
    print(bubble_table(found) if asked.question == "bubble" else gain_table(found))
    if asked.json is not None:
        content = {"machine": machine(), asked.question: found}
        asked.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
