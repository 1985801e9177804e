"""A tiny model run for real, in this process, by the job itself.

`Runner` runs one set of prompts under any policy, device and probes, and gives the tokens of each
prompt. Output, offload directory and results live in a folder of the test.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from flexpipe.job.probes import Probes
from flexpipe.job.report import Report
from flexpipe.job.run import run_job
from flexpipe.job.spec import JobSpec
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import percent_shares
from tests.hf import ragged_prompts

FAST = Emulation(h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12)  # links that never hold an op back
MIB = 2**20

# all kinds of tensors on all tiers, for three micro-batches; embedding and head are streamed, rows
# whose KV cache is in host memory attend there
EVERYWHERE: Mapping[str, Any] = {
    **percent_shares([0, 50, 34, 33, 34, 33]),
    "micro_batch_size": 3,
    "num_micro_batches": 3,
    "strategy": "event",
    "cpu_attention": True,
}
EVERYWHERE_ON_CPU: Mapping[str, Any] = {
    **percent_shares([0, 40, 0, 50, 0, 50]),
    "micro_batch_size": 3,
    "num_micro_batches": 2,
    "strategy": "event",
}
Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: the tokens of each prompt, and why they are fewer where they are."""

    tokens: Tokens
    errors: tuple[str | None, ...]
    report: Report


@dataclass
class Runner:
    """Runs the same prompts again and again."""

    model: Path
    folder: Path
    prompts: Sequence[Sequence[int]] = field(default_factory=lambda: ragged_prompts([5, 9, 30, 70]))
    max_tokens: int | Sequence[int] = 4
    _runs: Iterable[int] = field(default_factory=count)

    def __call__(
        self,
        given: Mapping[str, Any],
        *,
        device: str = "emulated",
        emulation: Emulation = FAST,
        probes: Probes | None = None,
        trace: Path | None = None,
    ) -> Outcome:
        """One run; raises what the job raises."""
        name = f"run-{next(iter(self._runs))}"
        spec = JobSpec(
            model=str(self.model),
            input_path=self._input(),
            output_path=self.folder / f"{name}.jsonl",
            device=device,
            emulation=emulation if device == "emulated" else None,
            given=given,
            offload_dir=self.folder / "offload",
            trace_path=trace,
            progress=False,
        )
        report = run_job(spec, probes)
        lines = [json.loads(line) for line in spec.output_path.read_text().splitlines()]
        spec.output_path.unlink()
        by_id = {line["id"]: line for line in lines}
        assert len(lines) == len(by_id) == len(self.prompts)
        results = [by_id[index] for index in range(len(self.prompts))]
        return Outcome(
            tokens=tuple(tuple(line.get("token_ids", ())) for line in results),
            errors=tuple(line.get("error") for line in results),
            report=report,
        )

    def _input(self) -> Path:
        path = self.folder / "prompts.jsonl"
        if not path.exists():
            limits = self.max_tokens
            if isinstance(limits, int):
                limits = [limits] * len(self.prompts)
            path.write_text(
                "".join(
                    json.dumps({"id": i, "prompt_token_ids": list(prompt), "max_tokens": limit})
                    + "\n"
                    for i, (prompt, limit) in enumerate(zip(self.prompts, limits, strict=True))
                )
            )
        return path
