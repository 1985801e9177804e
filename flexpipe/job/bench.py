"""Throughput on synthetic prompts: the same job several times, and what it came to.

Prompts are random token ids of one length and end tokens are ignored, so nothing depends on what a
text happens to say. A benchmark runs as any job does, through `run_job`; here is only what goes in
and which figures come out. Invariant: all runs of one benchmark generated the same tokens, or there
are no figures.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

from flexpipe import __version__
from flexpipe.errors import InputError, RunError
from flexpipe.job.predicted import Predicted
from flexpipe.job.report import Report
from flexpipe.job.spec import DEFAULT_OFFLOAD_DIR, JobSpec
from flexpipe.job.table import markdown_table
from flexpipe.model.config import ModelConfig
from flexpipe.plan.block import Need
from flexpipe.plan.policy import Policy
from flexpipe.plan.spelling import as_options
from flexpipe.units import format_bytes

if TYPE_CHECKING:
    from flexpipe.memory.checkpoint import Checkpoint

Format = Literal["md", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """How many prompts of which length, how many tokens for each, and how often."""

    num_prompts: int
    prompt_len: int = 512
    gen_len: int = 32
    warmup: int = 1
    repetitions: int = 3

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name == "warmup" else 1
            if value < least:
                option = f"--{item.name.replace('_', '-')}"
                raise InputError(f"{option} must be at least {least}, got {value}")

    def needs(self, config: ModelConfig) -> list[Need]:
        """What each prompt comes to; an InputError where that exceeds the model's positions."""
        needed = self.prompt_len + self.gen_len
        if needed > config.max_positions:
            raise InputError(
                f"--prompt-len {self.prompt_len} and --gen-len {self.gen_len} make {needed}, more "
                f"than the model's {config.max_positions} positions; lower one of them"
            )
        return [Need(self.prompt_len, self.gen_len)] * self.num_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What one run came to, or the median or the spread of several; None where nothing was there.

    `decode_tokens_per_s` counts the steps that only decode, `generated_tokens_per_s` all generated
    tokens over prefill and decode, `latency_s` is the mean of all requests.
    """

    load_s: float | None
    prefill_s: float | None
    decode_s: float | None
    total_s: float | None
    latency_s: float | None
    prompt_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    generated_tokens_per_s: float | None
    peak_gpu_bytes: float | None
    peak_cpu_bytes: float | None
    peak_disk_bytes: float | None

    @classmethod
    def of(cls, report: Report) -> Figures:
        peaks = {use.tier: use.measured_bytes for use in report.tiers}
        return cls(
            load_s=report.load_s,
            prefill_s=report.prefill_s,
            decode_s=report.decode_s,
            total_s=report.total_s,
            latency_s=report.latency_s,
            prompt_tokens_per_s=report.prefill_tokens_per_s,
            decode_tokens_per_s=report.decode_tokens_per_s if report.decode_s else None,
            generated_tokens_per_s=report.generated_tokens_per_s,
            peak_gpu_bytes=peaks.get("gpu"),
            peak_cpu_bytes=peaks.get("cpu"),
            peak_disk_bytes=peaks.get("disk"),
        )

    @classmethod
    def over(cls, runs: Sequence[Figures], fold: Callable[[list[float]], float]) -> Figures:
        """Each figure of `runs` folded into one."""
        folded = {}
        for name in FIGURES:
            values = [value for run in runs if (value := getattr(run, name)) is not None]
            folded[name] = fold(values) if values else None
        return cls(**folded)


FIGURES = tuple(item.name for item in fields(Figures))


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """A finished benchmark: every repetition, not only the best."""

    model: str
    device: str
    compute_dtype: str
    seed: int
    workload: Workload
    policy: Mapping[str, Any]
    repetitions: Sequence[Figures]
    output_sha256: str
    prediction: Predicted | None = None
    notes: Sequence[str] = ()

    @property
    def median(self) -> Figures:
        return Figures.over(self.repetitions, median)

    @property
    def spread(self) -> Figures:
        """The largest less the smallest."""
        return Figures.over(self.repetitions, lambda values: max(values) - min(values))

    def render(self, format: Format) -> str:
        """The report as Markdown, as CSV or as one line of JSON."""
        return {"md": self._markdown, "csv": self._csv, "json": self._json}[format]()

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the same names."""
        workload = asdict(self.workload)
        del workload["repetitions"]  # as many as are listed
        return {
            "model": self.model,
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "version": __version__,
            "seed": self.seed,
            **workload,
            "ignore_eos": True,
            "output_sha256": self.output_sha256,
            "policy": dict(self.policy),
            "notes": list(self.notes),
            "repetitions": [asdict(run) for run in self.repetitions],
            "median": asdict(self.median),
            "spread": asdict(self.spread),
            "prediction": None if self.prediction is None else asdict(self.prediction),
        }

    def _rows(self) -> Iterator[tuple[str, Figures]]:
        for number, run in enumerate(self.repetitions, 1):
            yield str(number), run
        yield "median", self.median
        yield "spread", self.spread

    def _json(self) -> str:
        return json.dumps(self.to_dict())

    def _csv(self) -> str:
        """One line per repetition; what they share is on each, so that files can be joined."""
        values = self.to_dict()
        shared = {key: item for key, item in values.items() if not isinstance(item, dict | list)}
        text = io.StringIO()
        writer = csv.DictWriter(text, [*shared, "repetition", *FIGURES], lineterminator="\n")
        writer.writeheader()
        for name, run in self._rows():
            writer.writerow({**shared, "repetition": name, **asdict(run)})
        return text.getvalue().rstrip("\n")

    def _markdown(self) -> str:
        shown = [name for name in FIGURES if getattr(self.median, name) is not None]
        rows = [[name, *(_cell(key, run) for key in shown)] for name, run in self._rows()]
        load = self.workload
        parts = [
            f"**{self.model} on {self.device} in {self.compute_dtype}**: {load.num_prompts} "
            f"prompts of {load.prompt_len} random tokens (seed {self.seed}), {load.gen_len} tokens "
            f"generated for each, EOS ignored; {load.warmup} warm-up, "
            f"{load.repetitions} repetitions.",
            f"`{as_options(self.policy)}`",
            markdown_table(["repetition", *map(_head, shown)], rows),
            *([] if self.prediction is None else _beside(self.prediction)),
            f"Output tokens, the same in all runs: sha256 `{self.output_sha256}`",
            *(f"Note: {note}" for note in self.notes),
        ]
        return "\n\n".join(parts)


def measure(spec: JobSpec, workload: Workload) -> BenchReport:
    """Run `spec` on prompts written to its input, warm-up first.

    Its input and output are the benchmark's own and are replaced. A RunError if a request failed or
    the runs disagree about a token.
    """
    spec = replace(spec, max_tokens=workload.gen_len, ignore_eos=True, overwrite=True)
    _write_prompts(spec, workload)
    num_runs = workload.warmup + workload.repetitions
    reports: list[Report] = []
    digests: list[str] = []
    for number in range(1, num_runs + 1):
        log.info("bench: %s", _name(number, workload))
        is_last = number == num_runs  # keeping a trace costs a little: one run pays for it
        reports.append(_run(spec if is_last else replace(spec, trace_path=None)))
        digests.append(_digest(spec.output_path))
        _check_same(digests, workload)
    counted = reports[workload.warmup :]
    return BenchReport(
        model=spec.model,
        device=counted[-1].device,
        compute_dtype=counted[-1].compute_dtype,
        seed=spec.seed,
        workload=workload,
        policy=counted[-1].policy,
        repetitions=[Figures.of(report) for report in counted],
        output_sha256=digests[0],
        prediction=Predicted.over([one.prediction for one in counted if one.prediction]),
        notes=_notes(counted),
    )


def release_memory() -> None:
    """Give back what an earlier run in this process still holds, so the next can plan with it.

    torch keeps freed memory of an accelerator for itself, and a plan would count it as used.
    """
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _name(number: int, workload: Workload) -> str:
    """What the run `number`, from 1, is called."""
    if number <= workload.warmup:
        return f"warm-up {number} of {workload.warmup}"
    return f"repetition {number - workload.warmup} of {workload.repetitions}"


def _run(spec: JobSpec) -> Report:
    from flexpipe.job.run import run_job  # imports torch

    release_memory()
    report = run_job(spec)
    if report.num_failed:
        raise RunError(
            f"{report.num_failed} of {report.num_requests} requests failed, so there is nothing to "
            "measure; the warnings above say why"
        )
    return report


def _check_same(digests: Sequence[str], workload: Workload) -> None:
    """The last run's tokens are those of the first."""
    first, last = digests[0], digests[-1]
    if last != first:
        raise RunError(
            f"{_name(len(digests), workload)} generated other tokens than {_name(1, workload)} "
            f"(sha256 {last[:12]}… and {first[:12]}…), so their times do not compare. Give the "
            "batch shape and --percent, so that all runs have the same, or try another --dtype"
        )


def _write_prompts(spec: JobSpec, workload: Workload) -> None:
    """Random tokens of the model's vocabulary, none of them special."""
    from flexpipe.model.families import read_config

    checkpoint = _open(spec)
    config = read_config(checkpoint.config)
    special = _special_tokens(checkpoint)
    plain = [token for token in range(config.vocab_size) if token not in special]
    draw = random.Random(spec.seed)
    with spec.input_path.open("w", encoding="utf-8") as file:
        for index, need in enumerate(workload.needs(config)):
            tokens = draw.choices(plain, k=need.prompt)
            print(json.dumps({"id": index, "prompt_token_ids": tokens}), file=file)


def _open(spec: JobSpec) -> Checkpoint:
    from flexpipe.memory.offload import OffloadDirectory
    from flexpipe.memory.source import open_checkpoint

    with OffloadDirectory((spec.offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()) as offload:
        return open_checkpoint(
            spec.model,
            load_format=spec.load_format,
            seed=spec.seed,
            cache_dir=offload.cache,
            revision=spec.revision,
        )


def _special_tokens(checkpoint: Checkpoint) -> set[int]:
    """What the configuration names as a `…_token_id` and the tokenizer's file as special."""
    ids = set[int]()
    for config in (checkpoint.config, checkpoint.generation_config):
        for key, value in config.items():
            if key.endswith("_token_id"):
                some = value if isinstance(value, list) else [value]
                ids |= {id for id in some if isinstance(id, int)}
    path = None if checkpoint.directory is None else checkpoint.directory / "tokenizer.json"
    if path is not None and path.is_file():
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or ()
        ids |= {token["id"] for token in added if token.get("special")}
    return ids


def _digest(path: Path) -> str:
    """One number for all tokens: sha256 over a line per prompt, in order, of index and tokens."""
    with path.open(encoding="utf-8") as file:
        answers = {record["id"]: record["token_ids"] for record in map(json.loads, file)}
    digest = hashlib.sha256()
    for index in sorted(answers):
        digest.update(f"{index}: {' '.join(map(str, answers[index]))}\n".encode())
    return digest.hexdigest()


def _notes(reports: Sequence[Report]) -> list[str]:
    notes = list(reports[-1].notes)
    if any(report.policy != reports[0].policy for report in reports):
        notes.append(
            "the repetitions ran with different policies, because what was free changed between "
            "them; give the knobs to compare like with like"
        )
    return notes


def _beside(prediction: Predicted) -> list[str]:
    """The prediction for one repetition beside their median."""
    rows = [figure.row() for figure in prediction.figures]
    table = markdown_table(["figure", "predicted", "median", "error"], rows)
    return [f"{prediction.told()}:", table]


def block_rows(given: Mapping[str, Any]) -> int:
    """Rows of one block; what is not given counts as the policy's default."""
    shape = {key: given[key] for key in ("micro_batch_size", "num_micro_batches") if key in given}
    policy = Policy(**shape)
    return policy.micro_batch_size * policy.num_micro_batches


def _head(name: str) -> str:
    """`prompt_tokens_per_s` as "prompt tokens/s", `load_s` as "load s", `peak_gpu_bytes` as is."""
    words = name.removesuffix("_bytes").replace("_per_s", "/s")
    return words.replace("_", " ")


def _cell(name: str, run: Figures) -> str:
    value: float | None = getattr(run, name)
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.1f}" if name.endswith("_per_s") else f"{value:.2f}"
