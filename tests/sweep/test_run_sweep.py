"""Every point ends as a row, no finished point is done twice, and the best row comes first."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from flexpipe.errors import ModelError, PlanError, RunError
from flexpipe.job.bench import FIGURES, Workload
from flexpipe.job.spec import JobSpec
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.policy_file import PolicyFile
from flexpipe.sweep.child import Ended
from flexpipe.sweep.grid import parse_vary
from flexpipe.sweep.ledger import Ledger, read_ledger
from flexpipe.sweep.pareto import Spot, draw_pareto, frontier
from flexpipe.sweep.point import Point, make_points
from flexpipe.sweep.ranking import Row, best_first, render
from flexpipe.sweep.run import BenchCommand, run_sweep

SPEC = JobSpec(model="m", input_path=Path("in"), output_path=Path("out"), device="emulated")
LOAD = {"prompt_len": 16, "gen_len": 4, "warmup": 1, "repetitions": 3}


def points(*texts: str, spec: JobSpec = SPEC, load: Mapping[str, int] = LOAD) -> list[Point]:
    return make_points(parse_vary(texts).points(), spec, load)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "rows.jsonl") as ledger:
        yield ledger


def report(point: Point) -> dict[str, Any]:
    """What bench might say: more rows, more tokens per second."""
    rows = point.knobs["micro_batch_size"]
    figures = dict.fromkeys(FIGURES, 1.0) | {"generated_tokens_per_s": 10.0 * rows}
    return {
        "device": "emulated",
        "compute_dtype": "float32",
        "policy": Policy(**point.knobs).to_dict(),
        "median": {**figures, "latency_s": 0.5 * rows},
        "spread": {**figures, "generated_tokens_per_s": 0.25},
    }


@dataclass
class FakeBench:
    """Answers for each micro_batch_size with what is put in its place, else with a report."""

    ends: dict[int, Ended] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def __call__(self, point: Point) -> Ended:
        rows = point.knobs["micro_batch_size"]
        self.asked.append(rows)
        return self.ends.get(rows, Ended(exit_code=0, stdout=json.dumps(report(point)), stderr=""))


def forecast(knobs: Mapping[str, Any], workload: Workload) -> dict[str, Any]:
    rows = knobs["micro_batch_size"]
    if rows > 32:
        raise PlanError("the plan does not fit: gpu needs more")
    return {
        "generated_tokens_per_s": 11.0 * rows,
        "latency_s": 0.4 * rows,
        "total_s": float(workload.num_prompts),
        "policy": Policy(**knobs).to_dict(),
    }


def failed(stderr: str, exit_code: int = 1, **more: Any) -> Ended:
    return Ended(exit_code=exit_code, stdout="", stderr=stderr, **more)


# -- points ---------------------------------------------------------------------------------------


def test_a_point_runs_one_block_unless_the_number_of_prompts_is_given() -> None:
    def prompts(*texts: str, **load: int) -> list[int]:
        made = points("micro_batch_size=2,4", *texts, load={**LOAD, **load})
        return [point.workload.num_prompts for point in made if point.workload is not None]

    assert prompts("num_micro_batches=3") == [6, 12]
    assert prompts(num_prompts=7) == [7, 7]
    assert prompts("num_prompts=5", num_prompts=7) == [5, 5]


def test_the_same_run_is_one_point_however_it_was_written() -> None:
    whole = points("weights=gpu:0.5/cpu:0.5", "micro_batch_size=4,4:8:*2")
    parts = points("gpu-batch-size=8,4", "weights.gpu=0.5")
    assert len(whole) == 2
    assert {point.key for point in whole} == {point.key for point in parts}


def test_all_that_figures_depend_on_is_in_the_key() -> None:
    specs = [
        SPEC,
        replace(SPEC, model="other"),
        replace(SPEC, revision="v2"),
        replace(SPEC, seed=1),
        replace(SPEC, load_format="dummy"),
        replace(SPEC, device="cpu", emulation=None),
        replace(SPEC, emulation=Emulation(h2d_bytes_per_s=1e9)),
        replace(SPEC, offload_dir=Path("/elsewhere")),
        replace(SPEC, given={"prefetch_depth": 2}),
    ]
    loads = [{**LOAD, name: 9} for name in LOAD]
    made = [point for spec in specs for point in points("micro_batch_size=4", spec=spec)]
    made += [point for load in loads for point in points("micro_batch_size=4", load=load)]
    made += points("micro_batch_size=5")
    assert len({point.key for point in made}) == len(made)


def test_a_share_that_the_device_cannot_hold_is_a_refusal_and_no_error() -> None:
    on_cpu = replace(SPEC, device="cpu", emulation=None)
    refused, fine = points("weights.gpu=0.5,0", spec=on_cpu)
    assert refused.refusal is not None and "no gpu tier" in refused.refusal
    assert fine.refusal is None


def test_bench_gets_the_point_and_nothing_else(tmp_path: Path) -> None:
    emulation = Emulation(disk_read_bytes_per_s=1.5e9, flops_per_s=1e12, memory_bytes=2**30)
    spec = replace(SPEC, emulation=emulation, offload_dir=tmp_path, revision="v1")
    (point,) = points("micro_batch_size=4", "cpu_mem=none", "kv_cache.gpu=0.5", spec=spec)
    words = BenchCommand(spec=spec).arguments(point)
    assert (words[0], words[-1]) == ("bench", "--json")
    given = dict(zip(words[1:-1:2], words[2:-1:2], strict=True))
    assert Emulation.parse(given.pop("--emulate")) == emulation
    assert given == {
        "--model": "m",
        "--revision": "v1",
        "--load-format": "auto",
        "--seed": "0",
        "--device": "emulated",
        "--offload-dir": str(tmp_path),
        "--policy": "/dev/stdin",
        "--num-prompts": "4",
        "--prompt-len": "16",
        "--gen-len": "4",
        "--warmup": "1",
        "--repetitions": "3",
    }
    file = tmp_path / "policy.yaml"
    file.write_text(json.dumps(point.asked["knobs"]))
    assert PolicyFile.read(file).knobs == point.knobs
    assert point.knobs["kv_cache"] == Shares(gpu=0.5, cpu=0.5) and point.knobs["cpu_mem"] is None


# -- running --------------------------------------------------------------------------------------


def test_a_contradiction_and_a_failure_are_rows_beside_the_others(ledger: Ledger) -> None:
    bench = FakeBench({4: failed("loading\nflexpipe: error: the plan does not\n  fit: cpu\n", 4)})
    made = points("micro_batch_size=2,4,8", "max_batch_tokens=6")
    rows = run_sweep(made, ledger, forecast=None, measure=bench)
    assert [row.measured_tokens_per_s for row in rows] == [20, None, None]
    assert rows[1].reason == "the plan does not fit: cpu"
    assert rows[2].reason is not None and "--max-batch-tokens is 6" in rows[2].reason
    assert bench.asked == [2, 4]
    assert list(read_ledger(ledger.path)[0]) == [made[2].key, made[0].key, made[1].key]


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (failed("\rbar 1\rbar 2", -9), r"signal 9 \(Killed\), as the kernel does when memory runs"),
        (failed("", -11), r"signal 11 \(Segmentation fault\); it last said: nothing"),
        (failed("a\nb\n", 130, timed_out=True), "longer than --timeout allows; it last said: b"),
        (failed("Traceback\nAssertionError: 3\n"), "exit code 1: AssertionError: 3"),
        (failed("", 0), "ended without its report"),
    ],
)
def test_however_bench_ends_the_row_says_why(ledger: Ledger, ended: Ended, reason: str) -> None:
    made = points("micro_batch_size=2,4")
    rows = run_sweep(made, ledger, forecast=None, measure=FakeBench({4: ended}))
    assert re.search(reason, str(rows[1].reason))


def test_what_is_finished_is_not_done_again(ledger: Ledger) -> None:
    made = points("micro_batch_size=2,4,8")
    first = FakeBench({4: failed("flexpipe: error: disk full")})
    rows = run_sweep(made[:2], ledger, forecast=None, measure=first)
    again = FakeBench()
    assert run_sweep(made, ledger, forecast=None, measure=again)[:2] == rows
    assert again.asked == [8]


def test_failures_are_tried_again_only_when_asked(ledger: Ledger) -> None:
    made = points("micro_batch_size=2,4")
    first = FakeBench({4: failed("flexpipe: error: disk full")})
    run_sweep(made, ledger, forecast=None, measure=first)
    again = FakeBench()
    rows = run_sweep(made, ledger, forecast=None, measure=again, retry=True)
    assert again.asked == [4]
    assert rows[1].measured_tokens_per_s == 40 and rows[1].reason is None


def test_what_was_measured_before_an_interruption_is_kept(ledger: Ledger) -> None:
    def interrupted(point: Point) -> Ended:
        if point.knobs["micro_batch_size"] == 4:
            raise KeyboardInterrupt
        return FakeBench()(point)

    made = points("micro_batch_size=2,4,8")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(made, ledger, forecast=None, measure=interrupted)
    assert list(read_ledger(ledger.path)[0]) == [made[0].key]


def test_predictions_alone_run_nothing_and_say_what_does_not_fit(ledger: Ledger) -> None:
    rows = run_sweep(points("micro_batch_size=8,64"), ledger, forecast=forecast, measure=None)
    assert rows[0].predicted_tokens_per_s == 88 and rows[0].measured is None
    assert rows[1].reason == "the plan does not fit: gpu needs more"


def test_a_prediction_is_on_disk_before_its_point_is_measured_and_stays(ledger: Ledger) -> None:
    made = points("micro_batch_size=2,4")
    seen: list[dict[str, Any]] = []

    def measure(point: Point) -> Ended:
        seen.append(read_ledger(ledger.path)[0][point.key])
        return FakeBench()(point)

    rows = run_sweep(made, ledger, forecast=forecast, measure=measure)
    assert [line["predicted"]["generated_tokens_per_s"] for line in seen] == [22, 44]
    assert [line["measured"] for line in seen] == [None, None]
    assert [row.error for row in rows] == [pytest.approx(0.1)] * 2


def test_a_model_that_cannot_be_read_ends_the_sweep_and_leaves_no_row(ledger: Ledger) -> None:
    bench = FakeBench({2: failed("flexpipe: error: no such model", ModelError.exit_code)})
    with pytest.raises(ModelError, match="no such model"):
        run_sweep(points("micro_batch_size=2,4"), ledger, forecast=None, measure=bench)
    assert ledger.lines == {} and bench.asked == [2]


def test_a_sweep_without_any_figures_names_the_commonest_reason(ledger: Ledger) -> None:
    ends = {rows: failed(f"flexpipe: error: gpu needs {rows}.5 GiB more", 4) for rows in (2, 4, 8)}
    made = points("micro_batch_size=64,1,2,4,8", "max_batch_tokens=32")
    ends[1] = failed("flexpipe: error: disk full", 5)
    with pytest.raises(RunError) as error:
        run_sweep(made, ledger, forecast=None, measure=FakeBench(ends))
    assert str(error.value) == (
        "none of the sweep's 5 points could run; the reason of 3, such as micro_batch_size=2 "
        "max_batch_tokens=32: gpu needs 2.5 GiB more"
    )
    assert len(ledger.lines) == 5


# -- rows -----------------------------------------------------------------------------------------


@pytest.fixture
def rows(ledger: Ledger) -> list[Row]:
    """Predicted and measured, predicted alone, and two that could not be, best first."""
    ends = {2: failed("flexpipe: error: | disk full", 5), 64: failed("", -9)}
    made = points("micro_batch_size=2,64,4,8")
    some = run_sweep(made, ledger, forecast=forecast, measure=FakeBench(ends))
    return best_first(some)


def test_rows_come_best_first_and_those_without_figures_last(rows: list[Row]) -> None:
    assert [row.point.settings["micro_batch_size"] for row in rows] == [8, 4, 2, 64]


def test_markdown_keeps_measured_and_predicted_apart(rows: list[Row]) -> None:
    text = render(rows, "md")
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert table[0][2:] == [
        "measured tokens/s",
        "spread",
        "predicted tokens/s",
        "error",
        "measured latency s",
        "predicted latency s",
    ]
    assert table[2] == ["1", "8", "80.00", "0.25", "88.00", "+10.0%", "4.00", "3.20"]
    assert table[4] == ["3", "2", "", "", "22.00", "", "", "0.80"]
    assert "Best: `--percent 0 100 0 100 0 100 --gpu-batch-size 8" in text
    assert "- micro_batch_size=2: | disk full" in text
    assert "- micro_batch_size=64: ended by signal 9" in text


def test_csv_has_every_row_with_the_policy_that_ran(rows: list[Row]) -> None:
    read = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [row["micro_batch_size"] for row in read] == ["8", "4", "2", "64"]
    assert json.loads(read[0]["policy"])["micro_batch_size"] == 8
    assert float(read[0]["measured_generated_tokens_per_s"]) == 80
    assert read[2]["measured_generated_tokens_per_s"] == "" and read[2]["reason"] == "| disk full"
    assert float(read[2]["predicted_total_s"]) == 2


def test_json_is_one_line_with_all_that_is_known(rows: list[Row]) -> None:
    text = render(rows, "json")
    assert "\n" not in text
    read = json.loads(text)["rows"]
    assert read[0]["measured"]["policy"]["micro_batch_size"] == 8
    assert read[0]["predicted"]["latency_s"] == 3.2 and read[0]["error"] == pytest.approx(0.1)
    assert read[3]["reason"].startswith("ended by signal 9")


def test_without_a_latency_the_total_time_stands_for_it(rows: list[Row]) -> None:
    told = report(rows[0].point)
    del told["median"]["latency_s"]
    assert replace(rows[0], measured=told).measured_latency_s == told["median"]["total_s"]


# -- picture --------------------------------------------------------------------------------------


def test_the_frontier_is_what_nothing_beats_at_both() -> None:
    spots = [
        Spot(name=name, tokens_per_s=rate, latency_s=seconds)
        for name, rate, seconds in (
            ("slow and late", 10, 9),
            ("fast", 50, 8),
            ("soon", 20, 1),
            ("as soon but slower", 19, 1),
            ("between", 30, 4),
            ("beaten by between", 30, 5),
        )
    ]
    assert [spot.name for spot in frontier(spots)] == ["soon", "between", "fast"]
    assert frontier([]) == []


def test_the_picture_names_both_kinds_their_units_and_the_frontier(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # texts as texts
    draw_pareto(tmp_path / "pareto.svg", rows, "opt on emulated")
    text = (tmp_path / "pareto.svg").read_text()
    for said in ("opt on emulated", "throughput (generated tokens/s)", "latency (s)"):
        assert said in text
    for said in (">measured<", ">predicted<", "measured frontier", "predicted frontier"):
        assert said in text
    assert "micro_batch_size=8" in text and "micro_batch_size=64" not in text


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_sweep_of_one_kind_is_drawn_too(rows: list[Row], tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"pareto{suffix}"
    draw_pareto(path, [replace(rows[0], predicted=None)], "m")
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
