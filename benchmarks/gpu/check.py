"""One command for a machine with a GPU: what only such a machine can show.

Each part runs in a process of its own, with a budget of seconds, so that neither a failure nor a
lost device hides what the others say. The summary is a table and a JSON file in --out; the exit
code is 0 if every part passed. Without a CUDA device the parts run on the emulated one with small
shapes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Bench
from benchmarks.trial import machine, markdown

# part -> seconds it may take; together less than ten minutes
BUDGETS_S: Mapping[str, float] = {
    "suite": 90,
    "parity": 80,
    "mutation": 100,
    "event_times": 40,
    "link_bound": 50,
    "big_model": 235,
}
# what a busy machine may fail; where the accelerator is only emulated, they get a second try
TIMED = ("event_times", "link_bound")
_PRELOADED = ["torch", "transformers", "flexpipe.job.run"]


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)  # none of which touches the device
    results: dict[str, Any] = {}
    for name in args.only or BUDGETS_S:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = _run_part(context, name, args)
        if results[name]["passed"] is False and name in TIMED and args.device == "emulated":
            results[name] = _run_part(context, name, args)
        print(f"{name}: {results[name]['summary']}", file=sys.stderr, flush=True)
    facts = {"device": args.device, "small": args.small, **machine()}
    content = {"machine": facts, "parts": results}
    (args.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    text = _summary(facts, results)
    (args.out / "summary.md").write_text(text, "utf-8")
    print(text)
    return 1 if any(result["passed"] is False for result in results.values()) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description=__doc__)
    parser.add_argument("--device", help="cuda[:N] or emulated (default: cuda if there is one)")
    parser.add_argument("--small", action="store_true", help="small shapes, for a dry run")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the summary")
    parser.add_argument("--only", action="append", choices=list(BUDGETS_S), help="just this part")
    args = parser.parse_args(arguments)
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "emulated"
        args.small = args.small or args.device == "emulated"
    return args


def _run_part(context: Any, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The part's finding; a crash, an error or a budget overrun is a failed one."""
    start = time.perf_counter()
    result, log = args.out / f"{name}.json", args.out / f"{name}.log"
    result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="flexpipe-gpu-") as directory:
        bench = Bench(device=args.device, small=args.small, directory=Path(directory))
        process = context.Process(target=_part, args=(name, bench, result, log))
        process.start()
        process.join(BUDGETS_S[name])
        overran = process.is_alive()
        if overran:
            process.kill()
            process.join()
    if result.exists():
        finding = json.loads(result.read_text("utf-8"))
    else:
        why = f"took more than {BUDGETS_S[name]:g} s" if overran else f"died: {process.exitcode}"
        finding = {"passed": False, "summary": f"{why}; see {log.name}", "details": []}
    return {**finding, "seconds": round(time.perf_counter() - start, 1)}


def _part(name: str, bench: Bench, result: Path, log: Path) -> None:
    """In the part's own process: its finding goes to `result`, what it prints to `log`."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if bench.is_emulated:  # small shapes: a second thread would only fight others for the cores
        import torch

        torch.set_num_threads(1)
    try:
        check = importlib.import_module(f"benchmarks.gpu.{name}").check
        finding = asdict(check(bench))
    except BaseException as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        finding = {"passed": False, "summary": text[:300], "figures": {}, "details": []}
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(finding, default=str), "utf-8")
    partial.rename(result)


def _summary(facts: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    words = {True: "passed", False: "FAILED", None: "not here"}
    rows = [
        [name, words[result["passed"]], f"{result['seconds']:.1f}", result["summary"]]
        for name, result in results.items()
    ]
    failed = [name for name, result in results.items() if result["passed"] is False]
    verdict = f"failed: {', '.join(failed)}" if failed else "all parts passed"
    known = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = markdown(("part", "verdict", "seconds", "finding"), rows)
    return f"# GPU check: {verdict}\n\n{known}\n\n{table}\n"


if __name__ == "__main__":
    raise SystemExit(main())
