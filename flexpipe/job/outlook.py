"""Everything a prediction or a search needs, without a byte of weights: model, requests, machine.

The machine is the one at hand, or one that a hardware file describes; the model may be a
checkpoint, or a shape whose weights are nowhere near. Nothing here imports torch unless the machine
at hand or the tokens of a text are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexpipe.errors import InputError
from flexpipe.job.bench import Workload, block_rows
from flexpipe.job.params import SamplingParams
from flexpipe.job.spec import DEFAULT_OFFLOAD_DIR, checked_emulation
from flexpipe.memory.dummy import find_shape
from flexpipe.memory.paper import paper_forms, tensors_of
from flexpipe.memory.shards import shard_tensors
from flexpipe.model.config import ModelConfig, Shard, shard_config
from flexpipe.model.families import read_config
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.block import Need, Queue
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.placement import Stored
from flexpipe.plan.plan import Budgets, Plan, check_fits
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.policy_file import MadeFor
from flexpipe.plan.rule import advice
from flexpipe.plan.tier import Tier
from flexpipe.policy.dtype import candidate_dtypes, compute_dtype
from flexpipe.policy.pipeline import best_pipeline
from flexpipe.policy.predict import Assignment
from flexpipe.policy.profile import Profile, read_profile
from flexpipe.policy.room import least_stages
from flexpipe.policy.search import best_plan
from flexpipe.policy.shares import Machine
from flexpipe.policy.site import Model, Site
from flexpipe.preset import hardware_file
from flexpipe.units import MIB

PROCESS_BYTES = 512 * MIB  # a Python process with torch, before anything is loaded

# fields of an Inquiry: whoever gives the first gives none of the others
_EXCLUDE: Mapping[str, tuple[str, ...]] = {
    "input_path": ("num_prompts", "prompt_len", "gen_len"),
    "hardware": ("device", "emulation"),
}

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model as far as plans know it; `directory` may hold a tokenizer."""

    name: str
    config: ModelConfig
    stored: Mapping[str, Stored]
    directory: Path | None

    @classmethod
    def open(cls, model: str, revision: str | None = None, *, num_shards: int = 1) -> Shape:
        """Of a checkpoint's directory, a hub name, a preset or a bare config.json; with several
        shards, the first one's, which has the most to do."""
        directory, hf_config = find_shape(model, revision)
        whole = read_config(hf_config)
        config = shard_config(whole, Shard(0, num_shards))
        stored = shard_tensors(config, tensors_of(directory, whole))
        return cls(name=model, config=config, stored=stored, directory=directory)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A model, what is asked of it, and the machine that is to do it.

    `compute_dtype` is what "auto" comes to here. Without a profile only bytes are known.
    """

    shape: Shape
    needs: Sequence[Need]
    profile: Profile | None
    emulation: Emulation | None
    device: str
    device_tier: Tier
    budgets: Budgets
    compute_dtype: str

    @classmethod
    def on_paper(
        cls, shape: Shape, needs: Sequence[Need], hardware: str, given: Mapping[str, Any]
    ) -> Outlook:
        """On the machine of a hardware file or preset; budgets among `given` bound its memory."""
        profile = read_profile(hardware_file(hardware))
        Policy(**given).check_device(profile.device)
        return cls(
            shape=shape,
            needs=needs,
            profile=profile,
            emulation=None,
            device=profile.name,
            device_tier=Tier.CPU if profile.is_cpu else Tier.GPU,
            budgets=_budgets(profile, given),
            compute_dtype=compute_dtype(
                given.get("compute_dtype", "auto"), shape.config, profile.is_cpu, profile
            ),
        )

    @classmethod
    def here(
        cls,
        shape: Shape,
        needs: Sequence[Need],
        device: str,
        emulation: Emulation | None,
        offload_dir: Path,
        given: Mapping[str, Any],
        *,
        needs_rates: bool = True,
    ) -> Outlook:
        """On this machine, as a run would find it now; measured, unless no rate is needed."""
        from flexpipe.job.prepare import budgets
        from flexpipe.profiling.cache import machine_profile
        from flexpipe.runtime.device import open_device

        opened = open_device(device, emulation)
        Policy(**given).check_device(opened.name)
        asked, on_cpu = given.get("compute_dtype", "auto"), not opened.has_streams
        dtypes = candidate_dtypes(asked, shape.config, on_cpu)
        profile = machine_profile(opened.name, offload_dir, dtypes) if needs_rates else None
        return cls(
            shape=shape,
            needs=needs,
            profile=profile,
            emulation=emulation,
            device=opened.name,
            device_tier=opened.tier,
            budgets=budgets(given, opened, emulation, offload_dir),
            compute_dtype=compute_dtype(asked, shape.config, on_cpu, profile),
        )

    def planner(self, compute_dtype: str | None = None) -> Planner:
        """Resolves policies into plans, in another dtype if one is named."""
        return Planner(
            self.shape.config,
            self.needs,
            self.shape.stored,
            self.budgets,
            device_tier=self.device_tier,
            compute_dtype=compute_dtype or self.compute_dtype,
            form_of=paper_forms(self.shape.config),
        )

    @property
    def stage_model(self) -> Model:
        """The model, for whoever shares it among ranks."""
        config, queue = self.shape.config, Queue.of(self.needs)

        def planner(pipeline: Pipeline, rank: int, budgets: Budgets) -> Planner:
            return Planner(
                config,
                queue,
                self.shape.stored,
                budgets,
                device_tier=self.device_tier,
                compute_dtype=self.compute_dtype,
                form_of=paper_forms(config),
                pipeline=pipeline,
                rank=rank,
            )

        return Model(num_layers=config.num_layers, needs=self.needs, make_planner=planner)

    def sites(self, stage_given: Sequence[Mapping[str, Any]]) -> list[Site]:
        """As many machines like this one, one for each stage."""
        return [
            Site(
                budgets=_within(self.budgets, given),
                device_tier=self.device_tier,
                machine=None if self.profile is None else self.machine,
                given=given,
            )
            for given in stage_given
        ]

    @property
    def machine(self) -> Machine:
        assert self.profile is not None
        return Machine(profile=self.profile, device_tier=self.device_tier, emulation=self.emulation)

    def choose(self, given: Mapping[str, Any]) -> Plan:
        """The plan that a run with these knobs takes; a PlanError where none fits."""
        planner = self.planner()
        plan = best_plan(given, planner, self.needs, self.device_tier, self.machine)
        if plan.shortfalls():
            change = advice(given, planner, self.device_tier, len(self.needs))
            check_fits(plan, " ".join((change, *self._more_stages([given]))))
        return plan

    def choose_stages(
        self, stage_given: Sequence[Mapping[str, Any]], arrangement: Arrangement
    ) -> tuple[Plan, ...]:
        """The plans of a pipeline's stages, each on a machine like this one; a PlanError where none
        fits."""
        if arrangement.num_stages == 1:
            return (self.choose(stage_given[0]),)
        plans = best_pipeline(self.stage_model, self.sites(stage_given), arrangement)
        if any(plan.shortfalls() for plan in plans):
            change = self._more_stages(stage_given) or ["Use machines with more memory."]
            for plan in plans:
                check_fits(plan, " ".join(change))
        return plans

    def least_stages(self, stage_given: Sequence[Mapping[str, Any]]) -> int | None:
        """The smallest number of such machines that hold the model; None where no number does, or
        where stages are given unlike knobs."""
        site, *others = self.sites(stage_given)
        return None if any(one != site for one in others) else least_stages(self.stage_model, site)

    def _more_stages(self, stage_given: Sequence[Mapping[str, Any]]) -> list[str]:
        """What to tell of pipelines that do fit."""
        least = self.least_stages(stage_given)
        if least is None:
            return []
        return [f"At least {least} such machines hold it: --pipeline-parallel-size {least}."]

    def assignments(self, plans: Sequence[Plan]) -> list[Assignment]:
        """Each stage's plan on a machine like this one."""
        machine = self.machine
        return [
            Assignment(plan=plan, profile=machine.profile, emulation=machine.emulation)
            for plan in plans
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inquiry:
    """What a user asks of a plan that nobody runs, before anything was looked at.

    The requests are those of `input_path`, or `num_prompts` alike (None: one block). The machine is
    that of `hardware`, or this one with `device`.
    """

    model: str
    revision: str | None = None
    input_path: Path | None = None
    max_tokens: int | None = None
    num_prompts: int | None = None
    prompt_len: int | None = None
    gen_len: int | None = None
    hardware: str | None = None
    device: str = "auto"
    emulation: Emulation | None = None
    offload_dir: Path | None = None

    def __post_init__(self) -> None:
        for name, others in _EXCLUDE.items():
            for other in others:
                if getattr(self, name) is not None and getattr(self, other) not in (None, "auto"):
                    raise InputError(
                        f"{_option(name)} and {_option(other)} exclude each other; drop one of them"
                    )
        if self.max_tokens is not None and self.input_path is None:
            raise InputError("--max-tokens goes with --input-file; the other way has --gen-len")
        object.__setattr__(self, "emulation", checked_emulation(self.device, self.emulation))

    def outlook(
        self,
        given: Mapping[str, Any],
        made_for: MadeFor | None = None,
        *,
        needs_rates: bool = True,
        num_shards: int = 1,
    ) -> Outlook:
        """Look at model, requests and machine; `given` are the policy's knobs, `made_for` the model
        they were found for, if they were. With several shards all is of one, on a machine of its
        own."""
        shape = Shape.open(self.model, self.revision, num_shards=num_shards)
        if made_for is not None:
            made_for.check(shape.name, shape.config)
        needs = self._needs(shape, given)
        if self.hardware is not None:
            return Outlook.on_paper(shape, needs, self.hardware, given)
        offload_dir = (self.offload_dir or DEFAULT_OFFLOAD_DIR).expanduser()
        how = shape, needs, self.device, self.emulation, offload_dir, given
        return Outlook.here(*how, needs_rates=needs_rates)

    def _needs(self, shape: Shape, given: Mapping[str, Any]) -> list[Need]:
        if self.input_path is not None:
            params = SamplingParams()
            if self.max_tokens is not None:
                params = replace(params, max_tokens=self.max_tokens)
            return needs_of_file(self.input_path, shape, params)
        asked = {"prompt_len": self.prompt_len, "gen_len": self.gen_len}
        workload = Workload(
            num_prompts=self.num_prompts or block_rows(given),
            **{name: value for name, value in asked.items() if value is not None},
        )
        return workload.needs(shape.config)


def _option(field: str) -> str:
    word = {"input_path": "input-file", "emulation": "emulate"}.get(field, field)
    return f"--{word.replace('_', '-')}"


def needs_of_file(path: Path, shape: Shape, params: SamplingParams) -> list[Need]:
    """What the requests of an input file come to; lines that cannot be run are told and left out.

    `params` hold where a line does not say.
    """
    from flexpipe.job.batcher import Entry
    from flexpipe.job.intake import Intake
    from flexpipe.job.request import RequestFile
    from flexpipe.job.tokenizer import Tokenizer

    file = RequestFile(path, params)
    has_text = file.has_text
    if has_text and shape.directory is None:
        raise InputError(
            f"{shape.name} is a shape without a tokenizer, so the tokens of {path} cannot be "
            "counted; name a checkpoint, or give prompt_token_ids or --prompt-len"
        )
    size = shape.config.vocab_size
    tokenizer = Tokenizer.open(shape.directory, size, bytes_if_missing=not has_text)
    intake = Intake(file=file, tokenizer=tokenizer, config=shape.config, eos_token_ids=frozenset())
    judged = list(intake.judge(file))
    needs = [item.need for item in judged if isinstance(item, Entry)]
    if not needs:
        raise InputError(f"{path} holds no request that can be run")
    if len(needs) < len(judged):
        log.warning("%d lines of %s cannot be run and do not count", len(judged) - len(needs), path)
    return needs


def _within(budgets: Budgets, given: Mapping[str, Any]) -> Budgets:
    """The budgets, or less where a stage is given less."""
    asked = {tier.value: given.get(f"{tier.value}_mem") for tier in Tier}
    least = {
        name: budgets.of(Tier(name)) if size is None else min(size, budgets.of(Tier(name)))
        for name, size in asked.items()
    }
    return Budgets(**least, overhead=budgets.overhead)


def _budgets(profile: Profile, given: Mapping[str, Any]) -> Budgets:
    def spend(tier: Tier) -> int:
        has, asked = profile.memory.get(tier, 0), given.get(f"{tier.value}_mem")
        return has if asked is None else min(has, asked)

    return Budgets(
        gpu=spend(Tier.GPU), cpu=spend(Tier.CPU), disk=spend(Tier.DISK), overhead=PROCESS_BYTES
    )
