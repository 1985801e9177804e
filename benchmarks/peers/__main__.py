"""Is flexpipe as fast as the machine allows, and faster than its peers, on one checkpoint?

    PYTHONPATH=. python -m benchmarks.peers sweep   ...   # each peer over batch sizes, once
    PYTHONPATH=. python -m benchmarks.peers compare ...   # best points and flexpipe interleaved
    PYTHONPATH=. python -m benchmarks.peers blocks  ...   # flexpipe over block sizes under the cap
    PYTHONPATH=. python -m benchmarks.peers big     ...   # one model against its bounds alone
    PYTHONPATH=. python -m benchmarks.peers demo    ...   # the demo job against transformers

Every command goes on where an earlier run of it stopped. Figures are generated tokens per second
of prefill and decoding; loading is left out for all. benchmarks/peers/README.md tells how to set
the peers up.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.points import PEERS, Point, Site, Store, best, tokens_per_s
from benchmarks.peers.workload import Workload
from benchmarks.trial import REPO, Sample, machine, markdown

WORKLOADS = (Workload(128, 32), Workload(32, 96))


def site_of(args: argparse.Namespace) -> Site:
    args.scratch.mkdir(parents=True, exist_ok=True)
    return Site(
        model=args.model.resolve(),
        python=args.python,
        peers_python=args.peers_python,
        airllm_python=args.airllm_python or args.peers_python,
        airllm_shards=(args.airllm_shards or args.model / "airllm").resolve(),
        scratch=args.scratch.resolve(),
        threads=args.threads,
        lock=args.lock,
        timeout_s=args.timeout_s,
        retry=args.retry,
    )


def sweep(args: argparse.Namespace) -> None:
    """Each peer over batch sizes, once."""
    site, store = site_of(args), Store(args.json)
    store.facts.setdefault("machine", machine())
    for name in args.peer or default_peers(args.cap_bytes):
        for workload in args.workload or WORKLOADS:
            for batch in args.batches:
                store.measure(
                    Point(
                        peer=name,
                        workload=workload,
                        batch=batch,
                        cap_bytes=args.cap_bytes,
                        budget_s=args.budget_s,
                        options=args.options,
                    ),
                    site,
                )
    print(sweep_table(store))


def default_peers(cap_bytes: int | None) -> list[str]:
    capped = cap_bytes is not None
    return [name for name, peer in PEERS.items() if peer.capped == capped and name != "flexpipe"]


def sweep_table(store: Store) -> str:
    """Token/s by peer and batch size, the best of several options each."""
    batches = sorted({point["batch"] for point in store.points.values()})
    lines: dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]] = {}
    for point in store.points.values():
        line = lines.setdefault((point["workload"], _cap(point["cap_bytes"]), point["peer"]), {})
        line.setdefault(point["batch"], []).append(point)
    rows = [
        (*names, *(_cell(line.get(batch)) for batch in batches)) for names, line in lines.items()
    ]
    head = ("workload", "memory", "peer", *(f"batch {batch}" for batch in batches))
    return markdown(head, sorted(rows))


def _cap(cap_bytes: int | None) -> str:
    return "in RAM" if cap_bytes is None else f"{cap_bytes / 1e9:g} GB"


def _cell(points: list[dict[str, Any]] | None) -> str:
    if not points:
        return ""
    point = best(points)
    if "error" in point:
        return str(point["error"])
    mark = "*" if point["result"]["projected"] else ""
    return f"{tokens_per_s(point):.2f}{mark}"


# -- compare --------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    """Each peer's best point of the sweep and flexpipe, interleaved; bounds in the same run."""
    site, store, swept = site_of(args), Store(args.json), Store(args.sweep)
    store.facts |= {"machine": machine(), "flexpipe": args.flexpipe}
    store.facts.setdefault("bounds", _bounds(site, args.json.with_suffix(".bounds.json")))
    flexpipe = Point(
        peer="flexpipe",
        workload=args.workload[0],
        batch=args.batch,
        cap_bytes=args.cap_bytes,
        num_prompts=args.num_prompts,
        flexpipe=args.flexpipe,
    )
    points = [flexpipe, *_best_points(swept, args)]
    samples: dict[str, list[float]] = {point.peer: [] for point in points}
    for repetition in range(1, args.rounds + 1):
        for point in points:
            facts = store.measure(point, site, repetition=repetition)
            samples[point.peer].append(tokens_per_s(facts))
    block = args.block or args.batch
    text = _compared(store.facts, points, samples, site, block)
    store.facts["summary"] = {
        name: Sample(tuple(values)).to_dict() for name, values in samples.items()
    }
    store.save()
    args.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _best_points(swept: Store, args: argparse.Namespace) -> list[Point]:
    """Each peer's best batch size for the workload and cap, to be run whole unless it is slow."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in swept.points.values():
        same = point["cap_bytes"] == args.cap_bytes
        if same and point["workload"] == str(args.workload[0]) and "result" in point:
            groups.setdefault(point["peer"], []).append(point)
    points = []
    for name, group in groups.items():
        if args.peer and name not in args.peer:
            continue
        top = best(group)
        slow = top["result"]["seconds"] > args.whole_s
        points.append(
            Point(
                peer=name,
                workload=args.workload[0],
                batch=top["batch"],
                cap_bytes=args.cap_bytes,
                budget_s=args.budget_s if slow else None,
                options=_own_options(top),
            )
        )
    return points


def _own_options(point: dict[str, Any]) -> str:
    """The runner's options that the sweep's point was run with, from its key."""
    parts = point["key"].split(", ")[4:]
    return ", ".join(part for part in parts if part.startswith("--"))


def _bounds(site: Site, path: Path) -> dict[str, Any]:
    """Measured in a process of its own, as the peers are."""
    if not path.exists():
        words = [site.python, "-m", "benchmarks.peers.bounds", "--model", str(site.model)]
        words += ["--threads", str(site.threads), "--json", str(path)]
        if site.lock:
            words = ["flock", str(site.lock), *words]
        subprocess.run(words, check=True, cwd=REPO, env=_environment(site), stdout=sys.stderr)
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dict(facts["bounds"])


def _environment(site: Site) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": str(site.threads)}


def bound_rows(
    facts: dict[str, Any], site: Site, workload: Workload, *, block: int, cap_bytes: int | None
) -> dict[str, float]:
    """Name to token/s of every bound."""
    from benchmarks.peers.bounds import DTYPES, Bounds, read_model_config

    bounds, config = Bounds(**facts["bounds"]), read_model_config(site.model)
    rows = {}
    for beside in (False, True) if cap_bytes is not None else (False,):
        for dtype in DTYPES:
            name = f"compute bound, {dtype}{', beside a disk read' if beside else ''}"
            rows[name] = bounds.compute_tokens_per_s(
                config, workload, beside_disk=beside, kind=dtype
            )
    if cap_bytes is not None:
        rows[f"disk bound, blocks of {block}"] = bounds.disk_tokens_per_s(
            config, workload, block=block, cap_bytes=cap_bytes
        )
    return rows


def _compared(
    facts: dict[str, Any],
    points: Sequence[Point],
    samples: dict[str, list[float]],
    site: Site,
    block: int,
) -> str:
    first = points[0]
    bounds = bound_rows(facts, site, first.workload, block=block, cap_bytes=first.cap_bytes)
    ours = statistics.median(samples["flexpipe"])
    rows = []
    for point in points:
        sample = Sample(tuple(samples[point.peer]))
        ratio = f"{ours / sample.median:.2f}" if sample.median else ""
        rows.append((point.peer, point.batch, sample, ratio, _projected(facts, point)))
    lines = [f"# {first.workload}, {_cap(first.cap_bytes)}: flexpipe beside its peers", ""]
    lines += [f"`{first.flexpipe}`", ""] if first.flexpipe else []
    lines += [
        markdown(("engine", "batch", "token/s", "flexpipe is × it", "projected"), rows),
        "",
        markdown(
            ("bound", "token/s", "flexpipe reaches"),
            [(name, f"{value:.1f}", f"{ours / value:.0%}") for name, value in bounds.items()],
        ),
    ]
    return "\n".join(lines)


def _projected(facts: dict[str, Any], point: Point) -> str:
    stored = facts["points"].get(f"{point.key} #1", {})
    return str(stored.get("result", {}).get("projected") or "")


# -- blocks, big ----------------------------------------------------------------------------------


def blocks(args: argparse.Namespace) -> None:
    """flexpipe over block sizes; {rows} in --flexpipe becomes the rows of a block."""
    site, store = site_of(args), Store(args.json)
    store.facts |= {"machine": machine(), "flexpipe": args.flexpipe}
    store.facts.setdefault("bounds", _bounds(site, args.json.with_suffix(".bounds.json")))
    rows = []
    for workload in args.workload or WORKLOADS:
        for batch in args.batches:
            options = _formatted(args.flexpipe, batch, args.micro_batch)
            point = Point(
                peer="flexpipe",
                workload=workload,
                batch=batch,
                cap_bytes=args.cap_bytes,
                num_prompts=args.num_prompts,
                flexpipe=options,
            )
            facts = [store.measure(point, site, repetition=i) for i in range(1, args.rounds + 1)]
            sample = Sample(tuple(map(tokens_per_s, facts)))
            bounds = bound_rows(
                store.facts, site, workload, block=batch, cap_bytes=args.cap_bytes
            ).values()
            rows.append((workload, batch, sample, *(f"{value:.1f}" for value in bounds)))
    names = bound_rows(store.facts, site, WORKLOADS[0], block=1, cap_bytes=args.cap_bytes)
    heads = [name.split(", blocks")[0] for name in names]
    text = markdown(("workload", "block", "token/s", *heads), rows)
    args.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _formatted(options: str, rows: int, micro_batch: int | None) -> str:
    """`options` with {rows}, {micro} and {num} filled in: micro × num are the rows of a block."""
    micro = min(rows, micro_batch or rows)
    return options.format(rows=rows, micro=micro, num=-(-rows // micro))


def big(args: argparse.Namespace) -> None:
    """A model too big for every peer's patience: flexpipe against its bounds."""
    args.batches = [args.batch]
    blocks(args)


# -- demo -----------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    """The demo job against transformers' generate over batch sizes, interleaved."""
    site, store = site_of(args), Store(args.json)
    store.facts |= {"machine": machine(), "flexpipe": args.flexpipe}
    engines: list[tuple[str, int, str]] = [("flexpipe", 0, "flexpipe")]
    engines += [(f"transformers, {batch}", batch, "peers") for batch in args.batches]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in engines}
    for repetition in range(1, args.rounds + 1):
        for name, batch, environment in engines:
            key = f"{name} #{repetition}"
            if key not in store.points:
                store.points[key] = _demo_run(site, args, batch, environment)
                store.save()
            print(f"{key}: {store.points[key]['seconds']:.2f} s", file=sys.stderr, flush=True)
            samples[name].append(store.points[key])
    ours = statistics.median(point["seconds"] for point in samples["flexpipe"])
    rows = []
    for name, points in samples.items():
        seconds = Sample(tuple(point["seconds"] for point in points))
        rate = statistics.median(point["tokens_per_s"] for point in points)
        right = points[0]["num_right"]
        rows.append((name, seconds, f"{rate:.0f}", f"{seconds.median / ours:.2f}", right))
    head = ("engine", "seconds", "token/s", "time ÷ flexpipe's", f"right of {args.num}")
    text = markdown(head, rows)
    args.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _demo_run(site: Site, args: argparse.Namespace, batch: int, environment: str) -> dict[str, Any]:
    python = site.python if environment == "flexpipe" else site.peers_python
    words = [python, "-m", "benchmarks.peers.runner_demo", "--num", str(args.num)]
    words += ["--threads", str(site.threads), "--dtype", args.dtype]
    words += (
        [f"--options={args.flexpipe}"] if environment == "flexpipe" else ["--batch", str(batch)]
    )
    if site.lock:
        words = ["flock", str(site.lock), *words]
    ran = subprocess.run(
        words,
        check=True,
        cwd=site.scratch,
        env=_environment(site),
        stdout=subprocess.PIPE,
        text=True,
    )
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))


# -- options --------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    add = _adder(commands)
    swept = add(sweep, "each peer over batch sizes, once")
    swept.add_argument("--batches", type=_numbers, default=[8, 16, 32, 64, 128])
    swept.add_argument("--peer", action="append", choices=PEERS)
    swept.add_argument("--options", default="", help="more options of the runner")
    compared = add(compare, "best points and flexpipe interleaved")
    compared.add_argument("--sweep", type=Path, required=True, help="JSON of the sweep")
    compared.add_argument("--peer", action="append", choices=PEERS)
    compared.add_argument("--batch", type=int, required=True, help="prompts for flexpipe at a time")
    compared.add_argument("--block", type=int, help="rows of a block for the disk bound")
    compared.add_argument("--whole-s", type=float, default=240, help="slower runs are projected")
    over = add(blocks, "flexpipe over block sizes")
    over.add_argument("--batches", type=_numbers, default=[32, 64, 128, 256, 512])
    over.add_argument("--micro-batch", type=int, help="most rows of a micro-batch, for {micro}")
    large = add(big, "one model against its bounds")
    large.add_argument("--batch", type=int, required=True)
    large.add_argument("--micro-batch", type=int)
    ticketed = add(demo, "the demo job against transformers")
    ticketed.add_argument("--batches", type=_numbers, default=[16, 32, 64, 128, 256])
    ticketed.add_argument("--num", type=int, default=500)
    ticketed.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    args.json = args.json.resolve()
    # ended from outside, it ends what it runs and leaves no cgroup behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.run(args)


def _adder(commands: Any) -> Callable[[Callable[..., None], str], argparse.ArgumentParser]:
    def add(run: Callable[..., None], help: str) -> argparse.ArgumentParser:
        name = run.__name__
        parser: argparse.ArgumentParser = commands.add_parser(name, help=help)
        parser.set_defaults(run=run)
        parser.add_argument("--model", type=Path, required=name != "demo", default=Path("."))
        parser.add_argument("--json", type=Path, required=True, help="where figures are kept")
        parser.add_argument("--workload", type=Workload.parse, action="append", metavar="IN/OUT")
        parser.add_argument("--cap-bytes", type=lambda text: int(float(text)))
        parser.add_argument("--num-prompts", type=int)
        parser.add_argument("--flexpipe", default="", help="options of flexpipe run")
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--budget-s", type=float, help="stop decoding then, and project")
        parser.add_argument("--timeout-s", type=float, default=600)
        parser.add_argument("--retry", action="store_true", help="run again what failed before")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--python", default=sys.executable, help="has flexpipe")
        parser.add_argument("--peers-python", default=sys.executable, help="has the peers")
        parser.add_argument("--airllm-python", help="has airllm, if not --peers-python")
        parser.add_argument("--airllm-shards", type=Path)
        parser.add_argument("--scratch", type=Path, default=Path("."))
        parser.add_argument("--lock", type=Path, help="held during each measurement")
        return parser

    return add


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
