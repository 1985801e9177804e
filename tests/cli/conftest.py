"""A job that does not run: it keeps what it was asked and answers with a fixed report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import pytest

from flexpipe.job.report import Report
from flexpipe.job.spec import JobSpec
from flexpipe.runtime.ranks import Ranks

REPORT = Report(
    model="m",
    device="cpu",
    compute_dtype="float32",
    strategy="event",
    num_requests=2,
    num_finished=2,
    num_failed=0,
    load_s=0.1,
    prefill_s=1.0,
    decode_s=2.0,
    total_s=3.5,
    prompt_tokens=10,
    generated_tokens=8,
    decode_step_tokens=6,
)


@dataclass
class FakeJob:
    """Stands where `flexpipe.job.run` would; `act` may write results or raise."""

    specs: list[JobSpec] = field(default_factory=list)
    act: Callable[[JobSpec], None] = lambda spec: None
    report: Report = REPORT

    def run_job(self, spec: JobSpec) -> Report:
        self.specs.append(spec)
        self.act(spec)
        return self.report

    def run_shared(self, spec: JobSpec, ranks: Ranks) -> Report:
        return self.run_job(spec)

    @property
    def spec(self) -> JobSpec:
        (spec,) = self.specs
        return spec


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    fake = FakeJob()
    module = ModuleType("flexpipe.job.run")
    module.run_job = fake.run_job  # type: ignore[attr-defined]
    module.run_shared = fake.run_shared  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flexpipe.job.run", module)
    return fake


@pytest.fixture
def flexpipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`flexpipe("run", "--model", …)` in this process; returns the exit code."""
    from flexpipe.cli.main import main

    monkeypatch.delenv("FLEXPIPE_DEBUG", raising=False)

    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        assert isinstance(exit.value.code, int)
        return exit.value.code

    return call
