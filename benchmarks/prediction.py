"""How well does the policy engine know what a job will take, before it runs?

Jobs under unlike policies (`unlike_policies.py`), each predicted from this machine's profile and
then run, in rounds. The order within a round keeps it honest, and the files in the directory given
show it: the profile is measured first, all predictions are written next, only then does every job
run once, in a process of its own. A machine that others share changes its pace within the hour, so
each round begins with a profile of its own; told and measured are medians over the rounds. Run
again, it goes on where it ended.

A third of the jobs, whose policies a seed draws, is held out: without --final they are neither run
nor shown, so that what the others teach (--predict-again) is judged by jobs that taught nothing.

The table ends with a yardstick: how wrong a job's run in one round would have been about another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from benchmarks.quiet import QUIET_CORES, quietly
from benchmarks.trial import REPO, machine, markdown
from benchmarks.unlike_policies import CASES, HELD_OUT, HELD_OUT_SEED, SHAPES, Case
from flexpipe.job.batcher import Entry
from flexpipe.job.prepare import Model, plan_job, site_here
from flexpipe.job.report import Report
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.policy.predict import Prediction, predict
from flexpipe.policy.profile import PROFILE_VARIABLE, Profile, read_profile, render_profile
from flexpipe.profiling.machine import measure_profile

PROFILE, PREDICTIONS = "profile.yaml", "predictions.json"
TIMES = ("total", "load", "prefill", "decode")


def job_spec(case: Case, directory: Path, scratch: Path) -> JobSpec:
    """The case as a job; models and their compressed forms are kept in `directory`."""
    return JobSpec(
        model=str(_model(case, directory)),
        input_path=_prompts(case, scratch / "prompts.jsonl"),
        output_path=scratch / "results.jsonl",
        ignore_eos=True,
        device=case.device,
        emulation=case.emulation,
        given=case.given,
        load_format="dummy",
        offload_dir=directory / "offload",
        overwrite=True,
        progress=False,
    )


def _model(case: Case, directory: Path) -> Path:
    path = directory / "models" / case.shape.replace(" ", "-").replace(",", "")
    path.mkdir(parents=True, exist_ok=True)
    _write(path / "config.json", SHAPES[case.shape].config())
    return path


def _prompts(case: Case, path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for index, need in enumerate(case.requests):
            tokens = [4 + (7 * index + 13 * place) % 30000 for place in range(need.prompt)]
            line = {"id": index, "prompt_token_ids": tokens, "max_tokens": need.output}
            print(json.dumps(line), file=file)
    return path


def predicted(case: Case, directory: Path, profile: Profile) -> Prediction:
    """What the engine would say of the case: its own plan, and the job played on the profile."""
    with tempfile.TemporaryDirectory() as scratch:
        spec = job_spec(case, directory, Path(scratch))
        entries = [
            Entry(index, index, 0, need.prompt, need.output)
            for index, need in enumerate(case.requests)
        ]
        with OffloadDirectory(directory / "offload") as offload:
            model = Model.open(spec, offload, needs_text=False)
            sites = [site_here(spec, model, offload)]
            (plan,), _, _ = plan_job(spec, model, entries, offload, sites)
        return predict(plan, case.requests, profile, case.emulation)


def run_once(case: Case, directory: Path) -> dict[str, Any]:
    """The figures of one run, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        spec = job_spec(case, directory, Path(scratch))
        before = pace()
        figures = _figures(run_job(spec))
        after = pace()
    return {**figures, "pace": {name: (before[name] + after[name]) / 2 for name in before}}


def pace() -> dict[str, float]:
    """How fast the machine is just now, to tell its own changes from wrong predictions: FLOPs of a
    product and bytes of a copy, per second. No prediction reads it."""

    def run() -> dict[str, float]:
        size = 1024
        a, b = torch.ones(size, size), torch.empty(size, size)
        big = torch.ones(2, 1 << 24)
        return {
            "product": 2 * size**3 * _per_second(lambda: torch.mm(a, a, out=b)),
            "copy": big[0].nbytes * _per_second(lambda: big[0].copy_(big[1])),
        }

    with ThreadPoolExecutor(1) as thread:  # its team of workers ends with it
        return thread.submit(run).result()


def _per_second(work: Callable[[], object], seconds: float = 0.2) -> float:
    work()
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        work()
        count += 1
    return count / (time.perf_counter() - start)


def _figures(report: Report) -> dict[str, Any]:
    return {
        "total_s": report.load_s + report.prefill_s + report.decode_s,
        "load_s": report.load_s,
        "prefill_s": report.prefill_s,
        "decode_s": report.decode_s,
        "link_bytes": {link.name: link.bytes for link in report.links},
        "tier_bytes": {tier.tier: tier.measured_bytes for tier in report.tiers},
        "lane_busy_s": {lane.name: lane.busy_s for lane in report.lanes},
    }


def write_profile(folder: Path, rounds: int | None, cores: float) -> None:
    """The machine's, as `flexpipe profile --rounds` measures it."""
    how = [] if rounds is None else ["--profile-rounds", str(rounds)]
    taken = quietly(partial(_apart, folder, "--profile", *how), cores=cores)
    _write(folder / "pace.json", {"others_cores": taken.others, **pace()})
    (folder / PROFILE).write_text(taken.value["profile"], encoding="utf-8")


def write_predictions(folder: Path) -> None:
    """All of a round, safe on the disk before anything of it runs."""
    rows = {case.name: _apart(folder, "--predict", case.name) for case in CASES}
    _write(folder / PREDICTIONS, {"made_at": time.time(), "machine": machine(), "rows": rows})


def predict_once(case: Case, folder: Path) -> dict[str, Any]:
    """What is kept of a prediction, and how long it took."""
    profile = read_profile(folder / PROFILE)
    start = time.perf_counter()
    made = predicted(case, folder.parent, profile)
    times = {f"{name}_s": getattr(made, f"{name}_s") for name in TIMES}
    num_bytes = {"link_bytes": dict(made.link_bytes), "tier_bytes": dict(made.tier_bytes)}
    return {**times, **num_bytes, "took_s": time.perf_counter() - start}


def run_jobs(folder: Path, cases: Sequence[Case], cores: float, *, first: bool) -> None:
    """Those of a round that have not run yet; in the first one, others make compressed files."""
    for case in cases:
        path = _result(folder, case)
        if path.exists():
            continue
        print(f"{time.strftime('%H:%M:%S')} {folder.name} {case.name}", file=sys.stderr)
        started_at = time.time()
        if first and case.compresses:
            _apart(folder, "--run", case.name)
        taken = quietly(partial(_apart, folder, "--run", case.name), cores=cores)
        path.parent.mkdir(exist_ok=True)
        kept = {"started_at": started_at, "machine": machine(), "others_cores": taken.others}
        _write(path, {**kept, "run": taken.value})


def _apart(folder: Path, *what: str) -> dict[str, Any]:
    """In a process of its own, so that nothing is left in memory from another."""
    command = [sys.executable, "-m", "benchmarks.prediction", str(folder), *what]
    ran = subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _result(folder: Path, case: Case) -> Path:
    return folder / "runs" / f"{CASES.index(case):02}.json"


def compare(folders: Sequence[Path], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Predicted beside measured, each the median of the rounds, and the error of the former."""
    predictions = [_read(folder / PREDICTIONS) for folder in folders]
    found = []
    for case in cases:
        told = [one["rows"][case.name] for one in predictions]
        results = [_read(_result(folder, case)) for folder in folders]
        runs = [result["run"] for result in results]
        totals = [run["total_s"] for run in runs]
        row = {
            "case": case.name,
            "held_out": case.name in HELD_OUT,
            "predicted_first": all(
                one["made_at"] < result["started_at"]
                for one, result in zip(predictions, results, strict=True)
            ),
            "predicted": _median(told),
            "measured": _median(runs),
            "told": [one["total_s"] for one in told],
            "totals": totals,
            "spread": max(totals) / min(totals) - 1,
        }
        found.append({**row, "error": _errors(row["predicted"], row["measured"])})
    return found


def _median(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every figure; byte counts and busy times stay by name, where none is told it is 0."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return {
        key: _median([run[key] for run in runs])
        if isinstance(runs[0].get(key), dict)
        else statistics.median(run.get(key, 0) for run in runs)
        for key in keys
    }


def _errors(told: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, float]:
    """(predicted - measured) / measured, of times, bytes over each link and each tier's memory."""
    errors = {name: told[f"{name}_s"] / found[f"{name}_s"] - 1 for name in TIMES
              if found[f"{name}_s"]}  # fmt: skip
    for kind in ("link_bytes", "tier_bytes"):
        for name, num_bytes in found[kind].items():
            errors[name] = told[kind].get(name, 0) / num_bytes - 1
    return errors


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join([_times(rows), _bytes(rows), _summary(rows)])


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        told, found = row["predicted"], row["measured"]
        yield row["case"] + (" †" if row["held_out"] else "")
        for name in TIMES:
            yield f"{told[f'{name}_s']:.2f} / {found[f'{name}_s']:.2f}"
        yield f"{row['error']['total']:+.0%}"
        yield f"{row['spread']:.0%}"

    head = ("job (predicted / measured, s)", *TIMES, "error", "spread")
    return markdown(head, [list(cells(row)) for row in rows])


def _bytes(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("h2d", "d2h", "disk_read", "disk_write", "gpu", "cpu", "disk")

    def cells(row: Mapping[str, Any]) -> Iterator[str]:
        yield row["case"]
        kinds = ["link_bytes"] * 4 + ["tier_bytes"] * 3
        for kind, name in zip(kinds, names, strict=True):
            found = row["measured"][kind].get(name)
            if not found:
                yield ""
            else:
                error = row["error"][name]
                yield f"{found / 1e9:.2f} {'' if abs(error) < 5e-4 else f'({error:+.1%})'}".strip()

    head = ("job (measured GB, and the prediction's error)", *names)
    return markdown(head, [list(cells(row)) for row in rows])


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    def line(name: str, some: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
        return told(
            name, [row["error"][key] for row in some for key in keys if key in row["error"]]
        )

    def told(name: str, errors: Sequence[float]) -> list[str]:
        sizes = [abs(error) for error in errors]
        if not sizes:
            return [name, "0", "", ""]
        return [name, str(len(sizes)), f"{statistics.median(sizes):.1%}", f"{max(sizes):.1%}"]

    lines = [
        line("total", rows, ("total",)),
        line("total, held out", [row for row in rows if row["held_out"]], ("total",)),
        *(
            told(
                f"total, round {index + 1} alone",
                [row["told"][index] / row["totals"][index] - 1 for row in rows],
            )
            for index in range(len(rows[0]["totals"]))
        ),
        line("load", rows, ("load",)),
        line("prefill", rows, ("prefill",)),
        line("decode", rows, ("decode",)),
        line("bytes over links", rows, ("h2d", "d2h", "disk_read", "disk_write")),
        line("memory of tiers", rows, ("gpu", "cpu", "disk")),
    ]
    pairs = [pair for row in rows for pair in permutations(row["totals"], 2)]
    lines.append(told("total, had a run foretold another", [a / b - 1 for a, b in pairs]))
    return markdown(("error of", "figures", "median", "worst"), lines)


def _write(path: Path, value: Any) -> None:
    """Whole, and on the disk when this returns."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="keeps profile, predictions, runs, models")
    parser.add_argument("--final", action="store_true", help="run and show the held-out jobs too")
    parser.add_argument("--predict-again", action="store_true", help="with the code as it is now")
    parser.add_argument("--profile-rounds", type=int, help="those of flexpipe profile --rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--others",
        type=float,
        default=QUIET_CORES,
        help="cores that others may keep busy",
    )
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    # what a round has done in processes of their own
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--predict", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory: Path = args.directory.absolute()
    if args.profile:
        offload_dir = directory.parent / "offload"
        made = measure_profile("cpu", offload_dir, quick=False, rounds=args.profile_rounds)
        print(json.dumps({"profile": render_profile(made)}))
        return 0
    if args.predict or args.run:
        os.environ[PROFILE_VARIABLE] = str(directory / PROFILE)  # also for what runs predict
        case = next(case for case in CASES if case.name == (args.predict or args.run))
        told = predict_once(case, directory) if args.predict else run_once(case, directory.parent)
        print(json.dumps(told))
        return 0
    cases = [case for case in CASES if args.final or case.name not in HELD_OUT]
    folders = [directory / f"round-{index + 1}" for index in range(args.rounds)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PROFILE).exists():
            write_profile(folder, args.profile_rounds, args.others)
        if args.predict_again or not (folder / PREDICTIONS).exists():
            write_predictions(folder)
        run_jobs(folder, cases, args.others, first=folder is folders[0])
    rows = compare(folders, cases)
    if args.final and not all(row["predicted_first"] for row in rows):
        raise SystemExit("a job ran before its prediction was made; start in a new directory")
    print(tables(rows))
    if args.json is not None:
        facts = {"machine": machine(), "held_out_seed": HELD_OUT_SEED, "rows": rows}
        _write(args.json, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
