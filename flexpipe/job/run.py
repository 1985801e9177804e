"""One batch job from its spec to its report: the way of a request through the rooms.

Input and model are read and the plan is made and checked before anything is loaded. A line that
cannot be run costs itself. Whatever stops a run, its results and the tokens of unfinished rows are
kept: the same command goes on where it ended. Its own folder in the offload directory is cleared
and no thread is left.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flexpipe.errors import InputError
from flexpipe.job.batcher import Admitted, Batcher, Entry, Finished
from flexpipe.job.compute import Events, Work, compute
from flexpipe.job.crew import Crew, Orders
from flexpipe.job.expectation import Expectation, eta
from flexpipe.job.follow import follow_job
from flexpipe.job.intake import Intake
from flexpipe.job.journal import Journal, digest_input, path_for
from flexpipe.job.measure import Tally, report
from flexpipe.job.prepare import Model, plan_job, site_here
from flexpipe.job.probes import Probes
from flexpipe.job.progress import Progress
from flexpipe.job.report import Report, StageUse
from flexpipe.job.request import BadLine, Request, RequestFile, is_stream, spool
from flexpipe.job.result import Done, Rejection, Result, ResultWriter, check_output, read_done
from flexpipe.job.spec import DEFAULT_OFFLOAD_DIR, JobSpec
from flexpipe.job.stop import cut_at_stop
from flexpipe.job.tokenizer import Tokenizer
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.codec import FORMAT_VERSION
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Policy
from flexpipe.policy.predict import Assignment
from flexpipe.policy.site import Site
from flexpipe.runtime.device import device_of_rank
from flexpipe.runtime.gang import Gang, joined
from flexpipe.runtime.ranks import Ranks
from flexpipe.schedule.trace import write_trace
from flexpipe.units import format_seconds

log = logging.getLogger("flexpipe")


def run_shared(spec: JobSpec, ranks: Ranks) -> Report | None:
    """This process's part of a job that several ranks share; the report is rank 0's alone.

    Whatever ends one rank ends all, with the first failure's reason.
    """
    local = device_of_rank(spec.device, ranks.local_rank)
    spec = spec if local == spec.device else replace(spec, device=local)
    with joined(ranks, spec.network) as gang:
        if ranks.rank:
            follow_job(spec, gang)
            return None
        return run_job(spec, gang=gang)


def run_job(spec: JobSpec, probes: Probes | None = None, gang: Gang | None = None) -> Report:
    """Run the job `spec`, or what an earlier run of it left; results are on disk at return. The
    other ranks of a `gang` follow.

    Raises a FlexpipeError that names what to change for whatever a user can cause.
    """
    probes = probes or Probes()
    check_output(spec.output_path, spec.overwrite, "append")
    with ExitStack() as stack:
        offload_dir = (spec.offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()
        offload = stack.enter_context(OffloadDirectory(offload_dir))
        path = spec.input_path
        if is_stream(path):
            path = spool(sys.stdin.buffer if str(path) == "-" else path.open("rb"), offload.job)
        file = RequestFile(path, spec.params)
        model = Model.open(spec, offload, needs_text=file.has_text)
        crew = None
        if gang is not None:
            gang.watch.clean_up(offload.close)
            model = model.of_shard(gang.shard)
            crew = stack.enter_context(Crew(gang, spec, model, offload))
        journal = _open_journal(spec, model, path, probes)
        if journal is not None:
            stack.enter_context(journal)
        done = read_done(spec.output_path) if journal and not journal.is_new else Done()
        job = _Job(spec, model, file, journal, done)
        made = _run(job, offload, probes, crew)
        if journal is not None:
            journal.close(complete=True)
    return made


def _open_journal(spec: JobSpec, model: Model, path: Path, probes: Probes) -> Journal | None:
    """The job's memory beside its output; None where the output is no file to come back to."""

    def start_output() -> None:
        check_output(spec.output_path, spec.overwrite)
        ResultWriter(spec.output_path, spec.overwrite).close()

    if is_stream(spec.output_path):
        return None
    return Journal.open(
        path_for(spec.output_path),
        _fingerprint(spec, model),
        partial(digest_input, path),
        path.stat().st_size,
        spec.overwrite,
        on_new=start_output,
        system=probes.journal_calls,
    )


def _fingerprint(spec: JobSpec, model: Model) -> dict[str, str]:
    """Everything that changes tokens, and nothing that only changes where they are computed."""

    def digest(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    params = {name: str(value) for name, value in asdict(spec.params).items()}
    return {
        "model": model.identity,
        "end tokens": digest(sorted(model.eos_token_ids)),
        "compute dtype": model.compute_dtype,
        **_compression(spec.given),
        **{f"default {name}": value for name, value in params.items()},
    }


def _compression(given: Mapping[str, Any]) -> dict[str, str]:
    """What is compressed and how; nothing is unless it was asked for."""
    asked = Policy(**{name: knob for name, knob in given.items() if name.startswith("compress_")})
    codecs = {
        "compressed weights": asked.weight_codec,
        "compressed vocabulary": asked.vocabulary_codec,
        "compressed KV cache": asked.cache_codec,
    }
    return {name: f"{codec}, format {FORMAT_VERSION}" for name, codec in codecs.items() if codec}


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to do, and what an earlier run did."""

    spec: JobSpec
    model: Model
    file: RequestFile
    journal: Journal | None
    done: Done


def _run(job: _Job, offload: OffloadDirectory, probes: Probes, crew: Crew | None) -> Report:
    """Take in the input, plan, and compute what is left to do."""
    spec, model = job.spec, job.model
    intake = Intake(
        file=job.file,
        tokenizer=model.tokenizer,
        config=model.config,
        eos_token_ids=model.eos_token_ids,
    )
    with ExitStack() as stack:
        writer = stack.enter_context(_writer(job))
        outcome = _Outcome(model.tokenizer, writer, job.journal)
        outcome.tally.num_failed = job.done.num_failed + len(job.done.lines)
        entries = _take_in(job, intake, outcome)
        if not entries:
            if crew is not None:
                crew.give(None)
            return _nothing_to_do(job, outcome)
        sites = [site_here(spec, model, offload)] if crew is None else crew.sites
        plans, entries, refused = plan_job(spec, model, entries, offload, sites)
        if crew is not None:
            crew.give(Orders.of_plans(plans, [entry.need for entry in entries]))
            crew.introduce(plans[0], model.device)
        for line in refused:
            outcome.reject(line, spec.fail_fast)
        total = outcome.tally.num_requests
        outcome.progress = stack.enter_context(
            Progress(total, total - len(entries), enabled=spec.progress)
        )
        unfinished = job.journal.unfinished if job.journal is not None else {}
        expected = _expect(plans, sites, entries, unfinished)

        def admit(entry: Entry) -> Admitted:
            return probes.on_admit(intake.admit(entry, unfinished.get(entry.index, ())))

        batcher = Batcher(plans[0], entries, admit, outcome.finish, outcome.go_on)
        made = _compute(job, plans[0], batcher, outcome, offload, probes, crew)
        return made if expected is None else _beside(expected, made, entries, outcome.tally)


def _expect(
    plans: Sequence[Plan],
    sites: Sequence[Site],
    entries: Sequence[Entry],
    unfinished: Mapping[int, Sequence[int]],
) -> Expectation | None:
    """What is left of the job, predicted and told."""
    stages = [
        Assignment(plan=plan, profile=site.machine.profile, emulation=site.machine.emulation)
        for plan, site in zip(plans, sites, strict=True)
        if site.machine is not None
    ]
    if len(stages) < len(plans):
        return None
    expected = Expectation.of(
        stages,
        [_left(entry.need, len(unfinished.get(entry.index, ()))) for entry in entries],
        longest_first([entry.need for entry in entries]),
    )
    if expected is not None:
        log.info("%s", eta(expected.prediction))
    return expected


def _left(need: Need, num_generated: int) -> Need:
    """What a request still needs that an earlier run generated so much for."""
    return Need(need.prompt + num_generated, need.output - num_generated)


def _beside(expected: Expectation, made: Report, entries: Sequence[Entry], tally: Tally) -> Report:
    """The report with the prediction, made again where answers ended early."""
    fewer = {
        index: tally.num_early[entry.index]
        for index, entry in enumerate(entries)
        if entry.index in tally.num_early
    }
    prediction = expected.compare(made.figures, fewer)
    if not fewer:
        return replace(made, prediction=prediction)
    note = (
        f"{len(fewer)} answers ended before their limits; predicted is the job with the lengths "
        f"that came ({format_seconds(expected.prediction.total_s)} was for the limits)"
    )
    return replace(made, prediction=prediction, notes=[*made.notes, note])


def _compute(
    job: _Job,
    plan: Plan,
    batcher: Batcher,
    outcome: _Outcome,
    offload: OffloadDirectory,
    probes: Probes,
    crew: Crew | None,
) -> Report:
    """Compute this stage's part, and tell of all of them."""
    spec, device = job.spec, job.model.device
    assert outcome.progress is not None
    work = Work(plan=plan, device=device, steps=batcher.steps, commit=batcher.commit)
    events = Events(phase=outcome.progress.phase)
    traced = spec.trace_path is not None
    if crew is None:
        ran = compute(work, offload, events, probes, keep_spans=traced)
        stages: Sequence[StageUse] = ()
        if spec.trace_path is not None:
            write_trace(spec.trace_path, ran.recorder.spans, plan)
    else:
        with crew.leading(work, events) as (work, events):
            ran = compute(work, offload, events, probes, keep_spans=traced)
        stages = crew.stages(ran)
        crew.trace(ran, spec.trace_path)
    return report(spec.model, ran, batcher, outcome.tally, stages)


def _writer(job: _Job) -> ResultWriter:
    if job.journal is None:
        return ResultWriter(job.spec.output_path, job.spec.overwrite)
    keep = job.done.valid_bytes
    return ResultWriter(job.spec.output_path, mode="append", keep_bytes=keep)


def _take_in(job: _Job, intake: Intake, outcome: _Outcome) -> list[Entry]:
    """Read the input once: what is left to run; bad lines are written at once."""
    entries = []

    def left() -> Iterator[Request | BadLine]:
        for item in job.file:
            outcome.tally.num_requests += 1
            if job.done.holds(item):
                outcome.tally.num_earlier += 1
                if job.journal is not None:
                    job.journal.done(item.index)
            else:
                yield item

    for item in intake.judge(left()):
        if isinstance(item, Entry):
            entries.append(item)
        else:
            outcome.reject(item, job.spec.fail_fast)
    return entries


def _nothing_to_do(job: _Job, outcome: _Outcome) -> Report:
    """The report of a job whose every line has its record already."""
    if not outcome.tally.num_requests:
        raise InputError(f"{job.spec.input_path} holds no prompts")
    return Report(
        model=job.spec.model,
        device=job.model.device.name,
        compute_dtype=job.model.compute_dtype,
        strategy=job.spec.given.get("strategy", "event"),
        num_requests=outcome.tally.num_requests,
        num_finished=0,
        num_failed=outcome.tally.num_failed,
        num_earlier=outcome.tally.num_earlier,
        load_s=0.0,
        prefill_s=0.0,
        decode_s=0.0,
        total_s=0.0,
        prompt_tokens=0,
        generated_tokens=0,
        decode_step_tokens=0,
    )


class _Outcome:
    """Turns what becomes of lines into records, and counts."""

    def __init__(self, tokenizer: Tokenizer, writer: ResultWriter, journal: Journal | None) -> None:
        self._tokenizer = tokenizer
        self._writer = writer
        self._journal = journal
        self.progress: Progress | None = None
        self.tally = Tally()

    def go_on(self, tokens: Sequence[tuple[Entry, int]]) -> None:
        """New tokens of rows that go on."""
        if self._journal is not None:
            for entry, token in tokens:
                self._journal.append(entry.index, token)
            self._journal.flush()
        if self.progress is not None:
            self.progress.tokens(len(tokens))

    def finish(self, end: Finished) -> None:
        """A row's last token, or its failure: its record is written before it is forgotten."""
        entry, params = end.request.entry, end.request.params
        self._writer.write(
            Result(
                id=entry.id,
                text=cut_at_stop(self._tokenizer.decode(end.tokens), params.stop),
                token_ids=end.tokens,
                finish_reason=end.reason,
                prompt_tokens=entry.num_prompt,
                error=end.error,
            )
        )
        if end.error is not None:
            log.warning("request %r failed: %s", entry.id, end.error)
        if self._journal is not None:
            self._journal.done(entry.index)
        num_tokens = len(end.tokens) - len(end.request.generated)
        if len(end.tokens) < entry.num_output:
            self.tally.num_early[entry.index] = num_tokens
        self.tally.num_tokens += num_tokens
        self.tally.num_failed += end.error is not None
        self.tally.num_finished += end.error is None
        if self.progress is not None:
            self.progress.tokens(1)
            self.progress.request()

    def reject(self, line: BadLine, fail_fast: bool) -> None:
        """A line that cannot be run; with `fail_fast` it ends the job."""
        if fail_fast:
            raise InputError(f"line {line.index}: {line.reason} (--fail-fast)")
        self._writer.write(Rejection.of(line))
        self.tally.num_failed += 1
