"""What a job's steps ask of each lane and link, per share of weights and KV cache: a few numbers.

A search prices hundreds of block shapes, too many to simulate. Here a job is three kinds of steps,
of micro-batches all alike: the first block's prompts, the steady state in which finished rows are
replaced, and the last block's decoding. Each is priced with all weights, and all KV cache, on one
tier after the other; what lies between is a mixture. The result is optimistic, since lanes overlap
perfectly, and it is linear in the shares, which is what a linear programme wants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flexpipe.model.cost import num_attended
from flexpipe.plan.block import KV_PAGE, Need
from flexpipe.plan.layer import LayerKind, LayerPlan, Piece
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.shape import Attention, Shape
from flexpipe.schedule.op import Kind, Op, Segment
from flexpipe.schedule.simulate import Cost, Pairs
from flexpipe.schedule.step import MicroBatch

_MESSAGES = {LayerKind.RECEIVE: Kind.RECEIVE_HIDDEN, LayerKind.SEND: Kind.SEND_HIDDEN}
_BESIDE = {Kind.READ_CACHE, Kind.LOAD_CACHE, Kind.STORE_CACHE, Kind.WRITE_CACHE}


@dataclass(slots=True)
class Work:
    """Seconds that lanes and links are busy, and bytes over links, by name; and the seconds in
    which activities disturb others."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    active: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, lane: str, cost: Cost, times: float) -> None:
        self.seconds[lane] += cost.seconds * times
        self.active[cost.activity] += cost.seconds * cost.duty * times
        if cost.link:
            if cost.link != lane:  # a lane with a link's name has all the link's work
                self.seconds[cost.link] += cost.seconds * times
            self.num_bytes[cost.link] += cost.num_bytes * times

    def add_all(self, other: Work, times: float) -> None:
        for mine, theirs in (
            (self.seconds, other.seconds),
            (self.num_bytes, other.num_bytes),
            (self.active, other.active),
        ):
            for name, value in theirs.items():
                mine[name] += value * times

    def disturbed(self, slowdown: Pairs) -> Work:
        """The same where everything overlaps: a lane or link named as its activity takes longer by
        what the others slow it down, who go on all the while. That is still a lower bound."""
        seconds = dict(self.seconds)
        for activity, own_s in self.active.items():
            name = "compute" if activity == "compute_few" else activity
            lost = sum(
                (1 - 1 / slowdown.get((activity, beside), 1.0)) * active_s
                for beside, active_s in self.active.items()
            )
            if own_s and name in seconds:
                seconds[name] += lost * own_s / self.seconds[name]
        return Work(seconds, self.num_bytes, self.active)

    @property
    def bound_s(self) -> float:
        """No schedule is faster."""
        return max(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """Whose work that is."""
        return max(self.seconds, key=lambda name: self.seconds[name])


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
    batch = MicroBatch(0, ())
    costs.know(batch, _shape(costs.plan, phase, demand))
    plan, own = costs.plan, Work()
    path_s = _add_ops(own, costs, batch)
    work = _step_only(costs, [batch], plan.pipeline.num_blocks)
    work.add_all(own, len(plan.micro_batches))
    work = work.disturbed(costs.profile.slowdown)
    work.seconds["path"] = path_s
    return work


def step_work(costs: CostModel, batches: Sequence[MicroBatch]) -> Work:
    """Seconds that a stage's step keeps each lane and link busy."""
    work = _step_only(costs, batches)
    for batch in batches:
        _add_ops(work, costs, batch)
    return work


def _step_only(costs: CostModel, batches: Sequence[MicroBatch], num_steps: int = 1) -> Work:
    """What a step does once, whatever its micro-batches."""
    plan, work = costs.plan, Work()
    for layer, count in costs.alike:
        for kind in _weight_kinds(plan, layer):
            op = Op(0, kind, 0, layer.position, None, ())
            work.add(op.lane.value, costs(op), count * num_steps)
    for kind in _step_kinds(plan):
        op = Op(0, kind, 0, 0, None, (), batches=tuple(batches))
        work.add(op.lane.value, costs(op), num_steps)
    return work


def _add_ops(work: Work, costs: CostModel, batch: MicroBatch) -> float:
    """Add one micro-batch's own ops to `work`. Those but for the moves of its KV cache come one
    after the other: their seconds, since with few micro-batches no lane is busy all the time."""
    plan, shape, path_s = costs.plan, costs.shape(batch), 0.0
    for layer, count in costs.alike:
        for kind, segment in _kinds(plan, layer, batch, shape):
            op = Op(0, kind, 0, layer.position, batch, (), segment=segment)
            cost = costs(op)
            work.add(op.lane.value, cost, count)
            path_s += 0.0 if kind in _BESIDE else cost.seconds * count
    for kind in _end_kinds(plan, shape):
        op = Op(0, kind, 0, 0, batch, ())
        cost = costs(op)
        work.add(op.lane.value, cost, 1)
        path_s += cost.seconds
    return path_s


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
        disk_rows=phase.decoding + prompts if on_disk else 0,
    )


def _weight_kinds(plan: Plan, layer: LayerPlan) -> Iterator[Kind]:
    if layer.is_streamed and (layer.reads_disk or not plan.streams_to_device):
        yield Kind.READ_WEIGHT
    if layer.is_streamed and plan.streams_to_device:
        yield Kind.LOAD_WEIGHT


def _step_kinds(plan: Plan) -> Iterator[Kind]:
    """Ops that a step has once: its tokens go from the last stage to the first."""
    if plan.pipeline.is_cut:
        if plan.has_head:
            yield Kind.SEND_TOKENS
        if plan.embeds:
            yield Kind.RECEIVE_TOKENS


def _end_kinds(plan: Plan, shape: Shape) -> Iterator[Kind]:
    """Ops of a micro-batch behind its last layer."""
    if plan.has_head and shape.num_sampled:
        yield Kind.SAMPLE
        yield Kind.FETCH_TOKENS
    if plan.embeds:
        yield Kind.COMMIT


def _kinds(
    plan: Plan, layer: LayerPlan, batch: MicroBatch, shape: Shape
) -> Iterator[tuple[Kind, Segment | None]]:
    """Ops of a layer for a micro-batch, as `flexpipe.schedule.build` makes them."""
    if layer.kind == LayerKind.HEAD and not shape.num_sampled:
        return
    if layer.kind == LayerKind.EMBED and plan.embed_streams:
        yield Kind.READ_EMBED, None
        if plan.streams_to_device:
            yield Kind.LOAD_EMBED, None
    for kind in _hidden_kinds(plan, layer, batch):
        yield kind, None
    if layer.kind in _MESSAGES:
        yield _MESSAGES[layer.kind], None
        return
    apart = layer.has_kv_cache and shape.num_on_cpu > 0
    if layer.has_kv_cache:
        for kind in _cache_kinds(plan, shape):
            yield kind, None
    is_split = plan.config.is_split
    if apart:
        for kind in (Kind.MOVE_QUERY, Kind.ATTEND_CPU, Kind.MOVE_OUTPUT):
            yield kind, None
        yield Kind.COMPUTE, Segment.QKV
        if any(shape.here.values()):
            yield Kind.COMPUTE, Segment.ATTEND
        yield Kind.COMPUTE, Segment.PROJECT if is_split else Segment.OUT
    elif is_split and layer.has_kv_cache:
        yield Kind.COMPUTE, Segment.ATTENTION
    elif not (is_split and layer.kind == LayerKind.MLP):
        yield Kind.COMPUTE, None
    if is_split:
        yield from _sum_kinds(plan, layer)


def _sum_kinds(plan: Plan, layer: LayerPlan) -> Iterator[tuple[Kind, Segment | None]]:
    """What follows the first part of a shard's layer."""
    is_slice = layer.kind == LayerKind.HEAD and layer is not plan.layers[-1]
    if layer.kind != LayerKind.MLP and not is_slice:
        yield Kind.ALL_REDUCE, None
    if layer.has_kv_cache and plan.config.post_norm:
        yield Kind.COMPUTE, Segment.AFTER_ATTENTION
    if Piece.MLP in layer.pieces:
        yield Kind.COMPUTE, Segment.MLP
        yield Kind.ALL_REDUCE, None
        if plan.config.post_norm:
            yield Kind.COMPUTE, Segment.AFTER_MLP


def _hidden_kinds(plan: Plan, layer: LayerPlan, batch: MicroBatch) -> Iterator[Kind]:
    home = plan.micro_batches[batch.index].hidden_home
    if home == plan.device_tier:
        return
    if layer.takes_hidden:
        if home == Tier.DISK:
            yield Kind.READ_HIDDEN
        if plan.streams_to_device:
            yield Kind.LOAD_HIDDEN
    if layer.leaves_hidden:
        if plan.streams_to_device:
            yield Kind.STORE_HIDDEN
        if home == Tier.DISK:
            yield Kind.WRITE_HIDDEN


def _cache_kinds(plan: Plan, shape: Shape) -> Iterator[Kind]:
    """Moves of the KV cache of rows that attend on the device."""
    if shape.read_extents:
        yield Kind.READ_CACHE
    if plan.streams_to_device and shape.load_rows:
        yield Kind.LOAD_CACHE
    if plan.streams_to_device and shape.store_rows:
        yield Kind.STORE_CACHE
    if shape.disk_rows:
        yield Kind.WRITE_CACHE
