"""Everything before a byte of weights moves: device, model, input, the checked plan.

A request that alone keeps the plan from fitting is refused by itself; a plan that does not fit even
then is refused with the shortfall and what would fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flexpipe.errors import FlexpipeError, PolicyError
from flexpipe.job.batcher import Entry
from flexpipe.job.request import BadLine
from flexpipe.job.spec import JobSpec
from flexpipe.job.tokenizer import Tokenizer
from flexpipe.memory.checkpoint import Checkpoint, StoredTensor
from flexpipe.memory.form import FOLDER, FormCache
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.memory.shards import shard_tensors
from flexpipe.memory.source import open_checkpoint
from flexpipe.model.config import ModelConfig, Shard, shard_config
from flexpipe.model.families import read_config
from flexpipe.plan.block import Need
from flexpipe.plan.hardware import Emulation, rss_bytes
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import model_tensors
from flexpipe.plan.plan import Budgets, Plan, check_fits
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.rule import advice
from flexpipe.plan.tier import Tier
from flexpipe.policy.dtype import candidate_dtypes, compute_dtype
from flexpipe.policy.pipeline import best_pipeline
from flexpipe.policy.profile import Profile
from flexpipe.policy.room import pipeline_by_rule
from flexpipe.policy.shares import Machine
from flexpipe.policy.site import MakePlanner, Site
from flexpipe.policy.site import Model as Shared
from flexpipe.profiling.cache import machine_profile
from flexpipe.runtime.device import Device, open_device
from flexpipe.runtime.usable import ALONE, Sharers, usable_memory

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What to run and on what: nothing of it depends on the input."""

    device: Device
    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    compute_dtype: str
    profile: Profile | None  # of the device; None where there is none to be had
    stored: Mapping[str, StoredTensor]

    @cached_property
    def identity(self) -> str:
        return self.checkpoint.identity()

    @classmethod
    def open(cls, spec: JobSpec, offload: OffloadDirectory, *, needs_text: bool) -> Model:
        """Read the checkpoint's headers; `needs_text` says whether there are prompts to encode."""
        device = open_device(spec.device, spec.emulation)
        Policy(**spec.given).check_device(device.name)
        checkpoint = open_checkpoint(
            spec.model,
            load_format=spec.load_format,
            seed=spec.seed,
            cache_dir=offload.cache,
            revision=spec.revision,
        )
        config = read_config(checkpoint.config)
        if spec.made_for is not None:
            spec.made_for.check(spec.model, config)
        tokenizer = Tokenizer.open(
            checkpoint.directory,
            config.vocab_size,
            bytes_if_missing=spec.load_format == "dummy" or not needs_text,
        )
        asked = spec.given.get("compute_dtype", "auto")
        on_cpu = not device.has_streams
        profile = _profile(device, offload, candidate_dtypes(asked, config, on_cpu))
        return cls(
            device=device,
            checkpoint=checkpoint,
            config=config,
            tokenizer=tokenizer,
            eos_token_ids=frozenset(_eos_token_ids(checkpoint, config, tokenizer)),
            compute_dtype=compute_dtype(asked, config, on_cpu, profile),
            profile=profile,
            stored={
                tensor.name: checkpoint.require(tensor.name, tensor.shape)
                for tensor in model_tensors(config)
            },
        )

    def of_shard(self, shard: Shard) -> Model:
        """What one shard of a stage has of the model."""
        if shard.size == 1:
            return self
        config = shard_config(self.config, shard)
        return replace(self, config=config, stored=shard_tensors(config, self.stored))

    def planners(
        self, offload: OffloadDirectory, needs: Sequence[Need], *, never_stops: bool
    ) -> MakePlanner:
        """What makes the plans of any stage for requests with these needs."""
        forms = FormCache(offload.cache / FOLDER, self.stored, lambda: self.identity)

        def planner(pipeline: Pipeline, stage: int, budgets: Budgets) -> Planner:
            return Planner(
                self.config,
                needs,
                self.stored,
                budgets,
                device_tier=self.device.tier,
                compute_dtype=self.compute_dtype,
                form_of=forms.locate,
                pipeline=pipeline,
                rank=stage,
                never_stops=never_stops,
            )

        return planner


def site_here(
    spec: JobSpec,
    model: Model,
    offload: OffloadDirectory,
    *,
    stage: int = 0,
    sharers: Sharers = ALONE,
) -> Site:
    """What this process may spend, and what its machine can do."""
    given = spec.given_at(stage)
    device, profile = model.device, model.profile
    machine = None
    if profile is not None:
        machine = Machine(profile=profile, device_tier=device.tier, emulation=spec.emulation)
    return Site(
        budgets=budgets(given, device, spec.emulation, offload.path, sharers),
        device_tier=device.tier,
        machine=machine,
        given=given,
    )


def _profile(device: Device, offload: OffloadDirectory, dtypes: Sequence[str]) -> Profile | None:
    """The machine's, measured now if it never was; None, with a line that says why, where that
    cannot be."""
    try:
        return machine_profile(device.name, offload.path, dtypes)
    except PolicyError:
        raise  # of a profile that the user named
    except FlexpipeError as error:
        log.info("nothing is predicted: %s", error)
        return None


def plan_job(
    spec: JobSpec,
    model: Model,
    entries: Sequence[Entry],
    offload: OffloadDirectory,
    sites: Sequence[Site],
) -> tuple[tuple[Plan, ...], list[Entry], list[BadLine]]:
    """Plans that fit, one for each stage at its site, the best that a search finds; the requests
    they serve, and those that do not fit even alone."""
    arrangement = spec.arrangement

    def shared(served: Sequence[Entry]) -> Shared:
        needs = [entry.need for entry in served]
        planners = model.planners(offload, needs, never_stops=spec.ignore_eos)
        return Shared(num_layers=model.config.num_layers, needs=needs, make_planner=planners)

    def fits_without_rates(served: Sequence[Entry]) -> bool:
        return _fit(pipeline_by_rule(shared(served), sites, arrangement))

    kept, refused = list(entries), list[BadLine]()
    plans = best_pipeline(shared(kept), sites, arrangement)
    if not _fit(plans):
        by_need = sorted(entries, key=lambda entry: entry.need.total)
        fits = _most(len(by_need), lambda count: fits_without_rates([by_need[count - 1]]))
        if 0 < fits < len(by_need):
            refused = [_too_long(entry, by_need[fits - 1]) for entry in by_need[fits:]]
            without = {line.index for line in refused}
            kept = [entry for entry in entries if entry.index not in without]
            plans = best_pipeline(shared(kept), sites, arrangement)
    for plan, site in zip(plans, sites, strict=True):
        if plan.shortfalls():
            planner = shared(kept).make_planner(plan.pipeline, plan.rank, site.budgets)
            check_fits(plan, advice(site.given, planner, site.device_tier, len(kept)))
    return plans, kept, refused


def _fit(plans: Sequence[Plan]) -> bool:
    return not any(plan.shortfalls() for plan in plans)


def _most(count: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `count` for which `holds`, which holds up to some number; else 0."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _too_long(entry: Entry, longest: Entry) -> BadLine:
    reason = (
        f"its KV cache of {entry.need.total} tokens does not fit the budgets even alone (the "
        f"longest request that does has {longest.need.total}); raise them, lower max_tokens, or "
        "give the KV cache a slower tier"
    )
    return BadLine(index=entry.index, id=entry.id, reason=reason, offset=entry.offset)


def _eos_token_ids(
    checkpoint: Checkpoint, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Where a prompt's answer ends: generation_config, else config, else the tokenizer."""
    given = checkpoint.generation_config.get("eos_token_id")
    if given is not None:
        return tuple(given) if isinstance(given, list) else (int(given),)
    return config.eos_token_ids or tokenizer.eos_token_ids


def budgets(
    given: Mapping[str, Any],
    device: Device,
    emulation: Emulation | None,
    offload: Path,
    sharers: Sharers = ALONE,
) -> Budgets:
    """What each tier may spend: what is free less a margin, or less where the user says so."""
    overhead, free = rss_bytes(), usable_memory(device, offload, sharers)
    cpu = _least(free[Tier.CPU], given.get("cpu_mem"))
    gpu = 0
    if device.has_streams:
        gpu = _least(free[Tier.GPU], given.get("gpu_mem"))
    elif device.tier == Tier.GPU:
        assert emulation is not None
        asked = given.get("gpu_mem") or emulation.memory_bytes or cpu // 2
        gpu = min(asked, cpu - overhead)
        cpu = _least(min(cpu, free[Tier.CPU] - gpu), given.get("cpu_mem"))
    disk = _least(free[Tier.DISK], given.get("disk_mem"))
    return Budgets(gpu=gpu, cpu=cpu, disk=disk, overhead=overhead)


def _least(free: int, asked: int | None) -> int:
    return free if asked is None else min(free, asked)
