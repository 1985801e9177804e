"""What a job's steps ask of each lane and link, per share of weights and KV cache: a few numbers.

A search prices hundreds of block shapes, too many to simulate. Here a job is three kinds of steps,
of micro-batches all alike: the first block's prompts, the steady state in which finished rows are
replaced, and the last block's decoding. Each is priced with all weights, and all KV cache, on one
tier after the other; what lies between is a mixture. The result is optimistic, since lanes overlap
perfectly, and it is linear in the shares, which is what a linear programme wants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flexpipe.model.cost import num_attended
from flexpipe.plan.block import KV_PAGE, Need
from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import Attention, CostModel, Shape
from flexpipe.schedule.op import Kind, Op, Segment
from flexpipe.schedule.step import MicroBatch

Work = Mapping[str, float]  # seconds by lane or link


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """The requests of a job on average."""

    num_requests: int
    prompt: float
    output: float

    @classmethod
    def of(cls, needs: Sequence[Need]) -> Demand:
        return cls(
            num_requests=len(needs),
            prompt=sum(need.prompt for need in needs) / len(needs),
            output=sum(need.output for need in needs) / len(needs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """So many steps alike: per micro-batch, rows that decode and prompt tokens of others."""

    num_steps: float
    decoding: int
    prompt_tokens: int


def phases_of(plan: Plan, demand: Demand) -> tuple[Phase, ...]:
    """The kinds of steps that a job under this plan's block comes to."""
    count = len(plan.micro_batches)
    places = sum(mb.num_places for mb in plan.micro_batches)
    size = -(-places // count)
    most = max(mb.max_new_tokens for mb in plan.micro_batches)
    first = max(1.0, places * demand.prompt / (count * most))
    per_step = min(most, round(places * demand.prompt / (count * first)))
    phases = [Phase(num_steps=first, decoding=0, prompt_tokens=max(1, per_step))]
    later = demand.num_requests - places
    if later > 0:
        tokens = later * demand.prompt / count
        steps = max(later * demand.output / places, tokens / max(1, most - size), 1.0)
        prompt = max(1, round(tokens / steps))
        phases.append(Phase(num_steps=steps, decoding=size, prompt_tokens=prompt))
    if demand.output > 1:
        phases.append(Phase(num_steps=demand.output - 1, decoding=size, prompt_tokens=0))
    return tuple(phases)


def work_of(costs: CostModel, phase: Phase, demand: Demand) -> Work:
    """Seconds that one step of `phase` keeps each lane and link busy, under a plan whose tensors of
    a kind all rest on one tier."""
    plan, work = costs.plan, defaultdict[str, float](float)
    count = len(plan.micro_batches)
    batch = MicroBatch(0, ())
    costs.know(batch, _shape(plan, phase, demand))
    decoders = [layer for layer in plan.layers if layer.layer is not None]
    halves = 1 + plan.policy.separate_layers
    for layer in (*decoders[:halves], *(one for one in plan.layers if one.layer is None)):
        times = len(decoders) / halves if layer.layer is not None else 1.0
        for op, per_step in _ops(plan, layer, batch, phase):
            cost = costs(op)
            seconds = cost.seconds * times * (1 if per_step else count)
            work[op.lane.value] += seconds
            if cost.link:
                work[cost.link] += seconds
    return work


def _shape(plan: Plan, phase: Phase, demand: Demand) -> Shape:
    """A micro-batch of the phase, its KV cache where that of the plan's first row is."""
    context = round(demand.prompt + demand.output / 2)
    home = plan.micro_batches[0].kv_homes[0]
    chunk = max(1, min(round(demand.prompt), phase.prompt_tokens))
    prompts = -(-phase.prompt_tokens // chunk) if phase.prompt_tokens else 0
    away = plan.attends_on_cpu
    here, on_cpu = {}, {}
    for window in dict.fromkeys(plan.config.windows or (None,)):
        attended = phase.decoding * num_attended(context, 1, window)
        decode = (Attention(phase.decoding, 1, attended),) if phase.decoding else ()
        seen = prompts * num_attended(0, chunk, window)
        prefill = (Attention(prompts, chunk, seen),) if prompts else ()
        here[window] = prefill if away else (*prefill, *decode)
        on_cpu[window] = decode if away else ()
    moving = home != plan.device_tier
    behind = 0 if away or not moving else phase.decoding
    new = phase.prompt_tokens + (0 if away else phase.decoding)
    page = context * plan.token_bytes // KV_PAGE * KV_PAGE
    on_disk = home == Tier.DISK
    fills = (
        phase.decoding * plan.token_bytes / KV_PAGE + prompts * chunk * plan.token_bytes / KV_PAGE
    )
    return Shape(
        num_new=phase.decoding + phase.prompt_tokens,
        num_rows=phase.decoding + prompts,
        num_sampled=phase.decoding + round(phase.prompt_tokens / demand.prompt),
        num_on_cpu=phase.decoding if away else 0,
        here=here,
        on_cpu=on_cpu,
        load_tokens=behind * context,
        load_rows=behind,
        store_tokens=new if moving else 0,
        store_rows=behind + prompts if moving else 0,
        read_bytes=behind * page if on_disk else 0,
        read_extents=behind if on_disk else 0,
        write_bytes=round(fills * KV_PAGE) if on_disk else 0,
        write_extents=max(1, round(min(fills, phase.decoding + prompts))) if on_disk else 0,
    )


def _ops(
    plan: Plan, layer: LayerPlan, batch: MicroBatch, phase: Phase
) -> Iterator[tuple[Op, bool]]:
    """Ops of a layer for one micro-batch, and whether they come once per step instead."""

    def op(kind: Kind, segment: Segment | None = None) -> tuple[Op, bool]:
        return Op(0, kind, 0, layer.position, batch, (), segment=segment), False

    if layer.is_streamed:
        yield from _weight_ops(plan, layer)
    if layer.kind == LayerKind.EMBED and plan.embed_streams:
        yield op(Kind.READ_EMBED)
        if plan.streams_to_device:
            yield op(Kind.LOAD_EMBED)
    if layer.layer is not None:
        yield from (op(kind) for kind in _hidden_kinds(plan))
    if layer.has_kv_cache:
        yield from (op(kind) for kind in _cache_kinds(plan, phase))
        if plan.attends_on_cpu and phase.decoding:
            for kind in (Kind.MOVE_QUERY, Kind.ATTEND_CPU, Kind.MOVE_OUTPUT):
                yield op(kind)
            yield op(Kind.COMPUTE, Segment.QKV)
            if phase.prompt_tokens:
                yield op(Kind.COMPUTE, Segment.ATTEND)
            yield op(Kind.COMPUTE, Segment.OUT)
            return
    yield op(Kind.COMPUTE)
    if layer is plan.layers[-1]:
        for kind in (Kind.SAMPLE, Kind.FETCH_TOKENS, Kind.COMMIT):
            yield op(kind)


def _weight_ops(plan: Plan, layer: LayerPlan) -> Iterator[tuple[Op, bool]]:
    if layer.reads_disk:
        yield Op(0, Kind.READ_WEIGHT, 0, layer.position, None, ()), True
    if plan.streams_to_device:
        yield Op(0, Kind.LOAD_WEIGHT, 0, layer.position, None, ()), True


def _hidden_kinds(plan: Plan) -> tuple[Kind, ...]:
    home = plan.micro_batches[0].hidden_home
    if home == plan.device_tier:
        return ()
    disk = (Kind.READ_HIDDEN, Kind.WRITE_HIDDEN) if home == Tier.DISK else ()
    links = (Kind.LOAD_HIDDEN, Kind.STORE_HIDDEN) if plan.streams_to_device else ()
    return *disk, *links


def _cache_kinds(plan: Plan, phase: Phase) -> Iterator[Kind]:
    """Moves of the KV cache of rows that attend on the device."""
    home, away = plan.micro_batches[0].kv_homes[0], plan.attends_on_cpu
    if home == plan.device_tier:
        return
    decodes = bool(phase.decoding) and not away
    if decodes:
        if home == Tier.DISK:
            yield Kind.READ_CACHE
        if plan.streams_to_device:
            yield Kind.LOAD_CACHE
    if decodes or phase.prompt_tokens:
        if plan.streams_to_device:
            yield Kind.STORE_CACHE
        if home == Tier.DISK:
            yield Kind.WRITE_CACHE
