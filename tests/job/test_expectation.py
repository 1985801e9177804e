"""A job is predicted before anything is loaded, and told how near the prediction came."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexpipe.errors import RunError
from flexpipe.job import expectation
from flexpipe.job.expectation import eta
from flexpipe.job.probes import Probes
from flexpipe.job.report import Report
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.plan.block import Need
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import percent_shares
from flexpipe.policy.predict import Prediction
from flexpipe.schedule.op import Kind, Op
from tests.conftest import REPO
from tests.hf import ragged_prompts

PROFILE = yaml.safe_load((REPO / "tests" / "profile.yaml").read_text())
LENGTHS = (12, 5, 30, 9, 21)
MOVING = {**percent_shares([0, 60, 0, 100, 0, 100]), "micro_batch_size": 2}


@pytest.fixture
def spec(hf_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., JobSpec]:
    lines = [json.dumps({"prompt_token_ids": prompt}) for prompt in ragged_prompts(LENGTHS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))

    def make(**changes: Any) -> JobSpec:
        return JobSpec(
            **{
                "model": str(hf_checkpoint("llama2")),
                "input_path": tmp_path / "in.jsonl",
                "output_path": tmp_path / "out.jsonl",
                "max_tokens": 6,
                "ignore_eos": True,
                "device": "emulated",
                "emulation": Emulation(h2d_bytes_per_s=1e9, d2h_bytes_per_s=1e9),
                "given": MOVING,
                "offload_dir": tmp_path / "offload",
                "progress": False,
                **changes,
            }
        )

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Need]]:
    """The needs of every prediction that is made."""
    real, seen = expectation.predict_stages, list[list[Need]]()

    def predict(stages: Any, needs: Sequence[Need], **how: Any) -> Prediction:
        seen.append(list(needs))
        return real(stages, needs, **how)

    monkeypatch.setattr(expectation, "predict_stages", predict)
    return seen


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_speed_time_and_bottleneck_are_told_before_anything_is_loaded(spec, caplog) -> None:
    caplog.set_level(logging.INFO, "flexpipe")
    lines: list[str] = []
    run_job(spec(), Probes(on_recorder=lambda recorder: lines.extend(told(caplog))))
    (line,) = (line for line in lines if line.startswith("predicted"))
    assert "tokens/s" in line and "bottleneck" in line and "of its bound" in line


def test_the_report_compares_times_links_and_tiers(spec) -> None:
    report: Report = run_job(spec())
    assert report.prediction is not None and not report.prediction.lengths_came
    figures = {figure.name: figure for figure in report.prediction.figures}
    assert {"total_s", "load_s", "prefill_s", "decode_s", "latency_s"} <= set(figures)
    for use in report.tiers:
        assert figures[f"peak_{use.tier}_bytes"].predicted == use.planned_bytes
        assert figures[f"peak_{use.tier}_bytes"].measured == use.measured_bytes
    for link in report.links:
        assert figures[f"{link.name}_bytes"].measured == link.bytes
    # what nobody waits for at the end is a matter of luck: at most two loads of a layer here
    assert figures["h2d_bytes"].error == pytest.approx(0, abs=0.1)
    assert figures["d2h_bytes"].error == pytest.approx(0, abs=0.1)
    assert 0 < figures["latency_s"].measured <= report.prefill_s + report.decode_s


def test_data_and_table_of_the_report_hold_the_comparison(spec) -> None:
    report: Report = run_job(spec())
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["prediction"]["profile"] == PROFILE["name"]
    assert {"name", "predicted", "measured", "error"} == set(data["prediction"]["figures"][0])
    assert data["latency_s"] == report.latency_s
    lines = [line.split() for line in report.render().splitlines()]
    start = lines.index(["figure", "predicted", "measured", "error"])
    assert [line[0] for line in lines[start + 1 : start + 6]] == [
        *("total", "load", "prefill", "decode", "latency")
    ]


def test_answers_that_end_early_are_predicted_again_with_the_lengths_that_came(
    spec, asked, tmp_path
) -> None:
    run_job(spec())
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    model = with_eos(Path(spec().model), tmp_path / "model", first["token_ids"][1])
    report: Report = run_job(spec(model=str(model), ignore_eos=False, overwrite=True))
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by_line = sorted(records, key=lambda record: int(record["id"]))
    came = [
        Need(length, len(record["token_ids"]))
        for length, record in zip(LENGTHS, by_line, strict=True)
    ]
    assert min(need.output for need in came) < 6
    assert asked[-1] == came and asked[-2] == [Need(length, 6) for length in LENGTHS]
    assert report.prediction is not None and report.prediction.lengths_came
    early = sum(need.output < 6 for need in came)
    assert any(f"{early} answers ended before their limits" in note for note in report.notes)


def with_eos(source: Path, target: Path, token: int) -> Path:
    """The same checkpoint, whose answers end at `token`."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    for name in ("config.json", "generation_config.json"):
        path = target / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps({**values, "eos_token_id": token}))
    return target


def test_a_resumed_job_predicts_what_is_left(spec, asked) -> None:
    seen = 0

    def fail(op: Op) -> None:
        nonlocal seen
        seen += op.kind == Kind.COMMIT
        if seen == 5:
            raise RuntimeError("stopped")

    with pytest.raises(RunError, match="stopped"):
        run_job(spec(), Probes(before_op=fail))
    report: Report = run_job(spec())
    whole, left = (sum(need.output for need in needs) for needs in (asked[0], asked[-1]))
    assert whole == 6 * len(LENGTHS)
    assert 0 < left == report.generated_tokens < whole
    assert report.prediction is not None and not report.prediction.lengths_came


def test_a_job_that_cannot_be_predicted_runs_and_says_why(
    spec, caplog, monkeypatch, tmp_path
) -> None:
    caplog.set_level(logging.INFO, "flexpipe")
    compute = {key: rates for key, rates in PROFILE["compute"].items() if key != "sample"}
    lacking = yaml.safe_dump({**PROFILE, "compute": compute})
    (tmp_path / "profile.yaml").write_text(lacking)
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(tmp_path / "profile.yaml"))
    report: Report = run_job(spec())
    assert report.num_finished == len(LENGTHS) and report.prediction is None
    assert "predicted" not in report.render()
    (line,) = (line for line in told(caplog) if line.startswith("nothing is predicted"))
    assert "sample" in line


def test_the_eta_speaks_of_time_in_words() -> None:
    made = Prediction(
        load_s=30.0,
        prefill_s=1000.0,
        decode_s=3000.0,
        latency_s=100.0,
        prompt_tokens=1000,
        generated_tokens=8000,
        num_steps=10,
        bound_s=3600.0,
        bottleneck="h2d",
        busy_s={},
        link_bytes={},
        tier_bytes={},
        num_simulated=1,
        stages=(),
    )
    assert eta(made) == (
        "predicted 2.0 tokens/s, 1 h 7 min in all, 30 s of it to load; bottleneck h2d, 90% of its "
        "bound"
    )
