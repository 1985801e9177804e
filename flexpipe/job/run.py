"""One batch job from its spec to its report: the way of a request through the rooms.

Input and model are read and the plan is made and checked before anything is loaded. Whatever stops
a run, its own folder in the offload directory is cleared and no thread is left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flexpipe.errors import InputError
from flexpipe.job.batcher import Batcher, Finished, TokenizedRequest
from flexpipe.job.report import LaneUse, LinkUse, Report, ShareUse, TierUse
from flexpipe.job.request import Request, read_requests
from flexpipe.job.result import FinishReason, Result, ResultWriter, check_output
from flexpipe.job.spec import JobSpec
from flexpipe.job.tokenizer import Tokenizer
from flexpipe.memory.checkpoint import Checkpoint
from flexpipe.memory.disk import DiskFile, physical_bytes_read
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.memory.source import open_checkpoint
from flexpipe.model.config import ModelConfig
from flexpipe.model.families import read_config
from flexpipe.plan.hardware import (
    free_disk,
    free_memory,
    peak_rss_bytes,
    reset_peak_rss,
    rss_bytes,
)
from flexpipe.plan.placement import model_tensors
from flexpipe.plan.plan import Budgets, Plan, check_fits, make_plan
from flexpipe.plan.policy import Policy
from flexpipe.plan.rule import advice, choose_plan
from flexpipe.plan.tier import Tier
from flexpipe.runtime.device import Device, open_device
from flexpipe.runtime.executor import ChangeOps, execute
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import OpHook, Stage
from flexpipe.schedule.op import Kind, Lane
from flexpipe.schedule.trace import write_trace
from flexpipe.units import GIB, MIB, format_bytes

DISK_BOUND_SHARE = 0.9  # of the bytes asked of the disk that the device itself must have read
DEFAULT_OFFLOAD_DIR = Path("~/.cache/flexpipe")
_LINK_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "h2d": (Kind.LOAD_WEIGHT, Kind.LOAD_EMBED, Kind.LOAD_CACHE, Kind.LOAD_HIDDEN),
    "d2h": (Kind.STORE_CACHE, Kind.STORE_HIDDEN, Kind.FETCH_TOKENS),
    "disk_read": (Kind.READ_WEIGHT, Kind.READ_EMBED, Kind.READ_CACHE, Kind.READ_HIDDEN),
    "disk_write": (Kind.WRITE_CACHE, Kind.WRITE_HIDDEN),
}


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What tests and benchmarks put into a run: hooks that observe, delay, fail or spoil it."""

    before_op: OpHook | None = None
    change_ops: ChangeOps | None = None
    poison: bool = False
    keep_spans: bool = False
    on_stage: Callable[[Stage], None] | None = None
    on_recorder: Callable[[Recorder], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job whose input and model were read and whose plan fits."""

    spec: JobSpec
    device: Device
    requests: Sequence[Request]
    tokenized: Sequence[TokenizedRequest]
    tokenizer: Tokenizer
    plan: Plan
    eos_token_ids: Sequence[int]


def run_job(spec: JobSpec, probes: Probes | None = None) -> Report:
    """Run the job `spec`; results are on disk when this returns.

    Raises a FlexpipeError that names what to change for whatever a user can cause.
    """
    probes = probes or Probes()
    check_output(spec.output_path, spec.overwrite)
    requests = read_requests(spec.input_path, spec.max_tokens)
    with OffloadDirectory((spec.offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()) as offload:
        job = prepare(spec, requests, offload)
        return _run(job, offload, probes)


def prepare(spec: JobSpec, requests: Sequence[Request], offload: OffloadDirectory) -> Prepared:
    """Everything up to the checked plan; loads no weights."""
    device = open_device(spec.device, spec.emulation)
    checkpoint = open_checkpoint(
        spec.model,
        load_format=spec.load_format,
        seed=spec.seed,
        cache_dir=offload.cache,
        revision=spec.revision,
    )
    config = read_config(checkpoint.config)
    tokenizer = Tokenizer.open(
        checkpoint.directory,
        config.vocab_size,
        bytes_if_missing=spec.load_format == "dummy" or all(r.prompt is None for r in requests),
    )
    tokenized = _tokenize(requests, tokenizer, config)
    plan = _plan(spec, device, checkpoint, config, tokenized, offload)
    return Prepared(
        spec=spec,
        device=device,
        requests=requests,
        tokenized=tokenized,
        tokenizer=tokenizer,
        plan=plan,
        eos_token_ids=_eos_token_ids(checkpoint, config, tokenizer),
    )


def _tokenize(
    requests: Sequence[Request], tokenizer: Tokenizer, config: ModelConfig
) -> list[TokenizedRequest]:
    texts = [request.prompt for request in requests if request.prompt is not None]
    encoded = iter(tokenizer.encode_batch(texts))
    made = []
    for index, request in enumerate(requests):
        ids = request.prompt_token_ids
        tokens = tuple(next(encoded)) if ids is None else ids
        _check_tokens(request, tokens, config)
        made.append(TokenizedRequest(index, tokens, request.max_tokens))
    return made


def _check_tokens(request: Request, tokens: Sequence[int], config: ModelConfig) -> None:
    where = f"line {request.index} (id {request.id!r})"
    if not tokens:
        raise InputError(f"{where}: the prompt has no tokens")
    total = len(tokens) + request.max_tokens
    if total > config.max_positions:
        raise InputError(
            f"{where}: {len(tokens)} prompt tokens and max_tokens {request.max_tokens} make "
            f"{total}, more than the model's {config.max_positions} positions; lower max_tokens to "
            f"{max(0, config.max_positions - len(tokens))} or shorten the prompt"
        )
    if max(tokens) >= config.vocab_size or min(tokens) < 0:
        raise InputError(
            f"{where}: token {max(tokens)} lies outside the vocabulary of {config.vocab_size}"
        )


def _eos_token_ids(
    checkpoint: Checkpoint, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Where a prompt's answer ends: generation_config, else config, else the tokenizer."""
    given = checkpoint.generation_config.get("eos_token_id")
    if given is not None:
        return tuple(given) if isinstance(given, list) else (int(given),)
    return config.eos_token_ids or tokenizer.eos_token_ids


def _plan(
    spec: JobSpec,
    device: Device,
    checkpoint: Checkpoint,
    config: ModelConfig,
    tokenized: Sequence[TokenizedRequest],
    offload: OffloadDirectory,
) -> Plan:
    Policy(**spec.given).check_device(device.name)
    stored = {
        tensor.name: checkpoint.require(tensor.name, tensor.shape)
        for tensor in model_tensors(config)
    }
    dtype = compute_dtype(spec.given.get("compute_dtype", "auto"), device, config)
    needs = [request.need for request in tokenized]
    limits = budgets(spec, device, offload.path)

    def make(policy: Policy) -> Plan:
        return make_plan(
            config,
            policy,
            needs,
            stored,
            limits,
            device_tier=device.tier,
            compute_dtype=dtype,
        )

    plan = choose_plan(spec.given, make, device.tier, len(needs))
    if plan.shortfalls():
        check_fits(plan, advice(spec.given, make, device.tier, len(needs)))
    return plan


def compute_dtype(asked: str, device: Device, config: ModelConfig) -> str:
    """The dtype layers compute in; "auto" is float32 on CPUs, the checkpoint's on accelerators."""
    if asked != "auto":
        return asked
    return config.dtype if device.has_streams else "float32"


def budgets(spec: JobSpec, device: Device, offload: Path) -> Budgets:
    """What each tier may spend: what is free less a margin, or less where the user says so."""
    overhead = rss_bytes()
    host = free_memory() + overhead
    cpu = _least(host - host // 50 - 64 * MIB, spec.given.get("cpu_mem"))
    gpu = 0
    if device.has_streams:
        import torch

        free = torch.accelerator.get_memory_info(device.torch_device)[0]
        gpu = _least(free - free // 20 - 256 * MIB, spec.given.get("gpu_mem"))
    elif device.tier == Tier.GPU:
        assert spec.emulation is not None
        asked = spec.given.get("gpu_mem") or spec.emulation.memory_bytes or cpu // 2
        gpu = min(asked, cpu - overhead)
        cpu = _least(min(cpu, host - host // 50 - 64 * MIB - gpu), spec.given.get("cpu_mem"))
    disk = _least(max(0, free_disk(offload) - GIB), spec.given.get("disk_mem"))
    return Budgets(gpu=gpu, cpu=cpu, disk=disk, overhead=overhead)


def _least(free: int, asked: int | None) -> int:
    return free if asked is None else min(free, asked)


def _run(job: Prepared, offload: OffloadDirectory, probes: Probes) -> Report:
    spec, plan, device = job.spec, job.plan, job.device
    recorder = Recorder(keep_spans=probes.keep_spans or spec.trace_path is not None)
    if probes.on_recorder is not None:
        probes.on_recorder(recorder)
    with ExitStack() as stack:
        writer = stack.enter_context(ResultWriter(spec.output_path, spec.overwrite))
        bar = stack.enter_context(_progress(spec, len(job.requests)))
        outcome = _Outcome(job, writer, bar)
        batcher = Batcher(plan, job.tokenized, job.eos_token_ids, outcome.finish)
        files = {
            name: stack.enter_context(_reserved(offload.job / f"{name}.bin", num_bytes, device))
            for name, num_bytes in _disk_bytes(plan).items()
        }
        reset_peak_rss()
        start = time.perf_counter()
        stage = Stage(
            plan,
            device,
            kv_file=files.get("KV cache"),
            hidden_file=files.get("hidden"),
            commit=batcher.commit,
            before_op=probes.before_op,
            poison=probes.poison,
        )
        stack.callback(stage.close)
        bar.set_postfix_str("loading")
        stage.load(lambda num_bytes: None)
        load_s = time.perf_counter() - start
        if probes.on_stage is not None:
            probes.on_stage(stage)
        read_before = physical_bytes_read()
        began = time.perf_counter()
        bar.set_postfix_str("")
        execute(plan, device, stage, batcher.steps, recorder, change_ops=probes.change_ops)
        run_s = time.perf_counter() - began
        read_after = physical_bytes_read()
        disk_bytes = sum(file.allocated_bytes for file in files.values())
    if spec.trace_path is not None:
        write_trace(spec.trace_path, recorder.spans, plan)
    physical = None if read_before is None or read_after is None else read_after - read_before
    measured = _Measured(load_s, began, run_s, physical, disk_bytes)
    return _report(job, stage, batcher, recorder, outcome, measured)


@dataclass(frozen=True, slots=True)
class _Measured:
    """Seconds and bytes of the run; `physical_read_bytes` came from the device itself."""

    load_s: float
    began: float
    run_s: float
    physical_read_bytes: int | None
    disk_bytes: int


class _Outcome:
    """Turns finished rows into result lines and counts them."""

    def __init__(self, job: Prepared, writer: ResultWriter, bar: tqdm[Any]) -> None:
        self._job = job
        self._writer = writer
        self._bar = bar
        self.num_finished = self.num_failed = self.num_tokens = 0

    def finish(self, end: Finished) -> None:
        request, tokenized = self._job.requests[end.index], self._job.tokenized[end.index]
        reason: FinishReason = (
            "error" if end.error else ("stop" if end.reason == "stop" else "length")
        )
        self._writer.write(
            Result(
                id=request.id,
                text=self._job.tokenizer.decode(end.tokens),
                token_ids=end.tokens,
                finish_reason=reason,
                prompt_tokens=len(tokenized.tokens),
                error=end.error,
            )
        )
        self.num_tokens += len(end.tokens)
        self.num_failed += end.error is not None
        self.num_finished += end.error is None
        self._bar.update()


@contextmanager
def _progress(spec: JobSpec, total: int) -> Iterator[tqdm[Any]]:
    bar: tqdm[Any]
    with tqdm(
        total=total, unit="request", file=sys.stderr, disable=not spec.progress, dynamic_ncols=True
    ) as bar:
        yield bar


@contextmanager
def _reserved(path: Path, num_bytes: int, device: Device) -> Iterator[DiskFile]:
    with DiskFile(path, "rw", stop=device.stop) as file:
        file.reserve(num_bytes)
        yield file


def _disk_bytes(plan: Plan) -> dict[str, int]:
    return {pool.name: pool.num_bytes for pool in plan.pools if pool.tier == Tier.DISK}


def _report(
    job: Prepared,
    stage: Stage,
    batcher: Batcher,
    recorder: Recorder,
    outcome: _Outcome,
    measured: _Measured,
) -> Report:
    prefill_s, decode_s, decoded = _phases(batcher, measured.began)
    plan = job.plan
    return Report(
        model=job.spec.model,
        device=job.device.name,
        strategy=plan.policy.strategy,
        num_requests=len(job.requests),
        num_finished=outcome.num_finished,
        num_failed=outcome.num_failed,
        load_s=measured.load_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        total_s=measured.load_s + measured.run_s,
        prompt_tokens=sum(count.prompt_tokens for count in batcher.counts),
        generated_tokens=outcome.num_tokens,
        decode_step_tokens=decoded,
        links=_links(job, recorder),
        lanes=_lanes(recorder, measured.run_s),
        tiers=_tiers(plan, stage, measured.disk_bytes),
        shares=_shares(plan),
        policy=plan.policy.to_dict(),
        notes=_notes(job, stage, measured),
    )


def _phases(batcher: Batcher, began: float) -> tuple[float, float, int]:
    """Seconds of steps that prefill, seconds of steps that only decode, and the latters' tokens."""
    prefill_s = decode_s = 0.0
    decoded, last = 0, began
    for count in batcher.counts:
        if not count.prompt_tokens and not count.decode_tokens:
            continue
        seconds, last = count.end_s - last, count.end_s
        if count.prompt_tokens:
            prefill_s += seconds
        else:
            decode_s += seconds
            decoded += count.decode_tokens
    return prefill_s, decode_s, decoded


def _links(job: Prepared, recorder: Recorder) -> list[LinkUse]:
    uses = []
    for link in job.device.links:
        if not link.num_bytes:
            continue
        busy_s = sum(recorder.busy_s.get(kind, 0.0) for kind in _LINK_KINDS[link.name])
        rate = link.num_bytes / busy_s if busy_s else 0.0
        uses.append(LinkUse(name=link.name, bytes=link.num_bytes, busy_s=busy_s, bytes_per_s=rate))
    return uses


def _lanes(recorder: Recorder, run_s: float) -> list[LaneUse]:
    uses = []
    for lane in Lane:
        num_ops, busy_s = recorder.lane_ops(lane), recorder.lane_busy_s(lane)
        if num_ops:
            share = busy_s / run_s if run_s else 0.0
            uses.append(LaneUse(name=lane.value, num_ops=num_ops, busy_s=busy_s, busy_share=share))
    return uses


def _tiers(plan: Plan, stage: Stage, disk_bytes: int) -> list[TierUse]:
    measured = {
        Tier.GPU: stage.memory.peak_device_bytes(),
        Tier.CPU: peak_rss_bytes() - stage.memory.emulated_bytes(plan.device_tier),
        Tier.DISK: disk_bytes,
    }
    return [
        TierUse(
            tier=tier.value,
            asked_bytes=plan.policy.budget(tier),
            planned_bytes=plan.tier_bytes(tier),
            measured_bytes=measured[tier],
        )
        for tier in Tier
        if plan.tier_bytes(tier)
    ]


def _shares(plan: Plan) -> list[ShareUse]:
    policy = plan.policy
    by_kind: dict[str, dict[Tier, int]] = {
        "weights": dict(plan.placement.achieved_bytes),
        "kv_cache": dict.fromkeys(Tier, 0),
        "hidden": dict.fromkeys(Tier, 0),
    }
    for mb in plan.micro_batches:
        by_kind["hidden"][mb.hidden_home] += plan.hidden_bytes(mb)
        for tier in Tier:
            room = mb.region_tokens * plan.token_bytes * plan.config.num_layers
            by_kind["kv_cache"][tier] += len(mb.places(tier)) * room
    uses = []
    for kind, given in by_kind.items():
        shares = getattr(policy, kind)
        for tier in Tier:
            if shares.of(tier) or given[tier]:
                achieved = given[tier] / max(1, sum(given.values()))
                uses.append(
                    ShareUse(
                        kind=kind,
                        tier=tier.value,
                        asked=shares.of(tier),
                        achieved=achieved,
                        bytes=given[tier],
                    )
                )
    return uses


def _notes(job: Prepared, stage: Stage, measured: _Measured) -> list[str]:
    notes = []
    copies = job.device.synchronous
    if copies.num_copies:
        notes.append(
            f"{copies.num_copies} copies ({format_bytes(copies.num_bytes)}) were synchronous: "
            f"{format_bytes(stage.memory.unpinned_bytes)} of host memory could not be page-locked"
        )
    asked, physical = job.device.disk_read.num_bytes, measured.physical_read_bytes
    if asked and physical is not None and physical < DISK_BOUND_SHARE * asked:
        notes.append(
            f"the device read {physical / asked:.0%} of the bytes asked of the disk; the rest "
            "came from a cache, so this run says nothing about the disk"
        )
    return notes
