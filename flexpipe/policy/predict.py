"""What a job will take on a machine: its steps, played by the simulator.

A job's steps follow from its requests (`flexpipe.schedule.places`), its ops from its steps, their
costs from the machine. Short jobs are simulated whole. Of long ones the steps are counted with
every so manieth request; every kind of step among them is priced as if its lanes overlapped
perfectly, and for a few, unlike each other, the simulator tells how much longer they take. It
plays those with few layers: twice in a row, with two numbers of layers, so that what a step and
what a layer adds in the steady state are differences. Requests are taken to generate all the
tokens they may.

The stages of a pipeline are played together, by the steps that rank 0 forms. Its blocks in flight
take turns, so in the steady state a step takes as long as the stage that is busiest with it; a long
job is then longer by what it takes to fill the stages before that one and to drain those behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.layer import LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.estimate import Work, step_work
from flexpipe.policy.profile import LINKS, Profile
from flexpipe.schedule.build import Steps, schedule
from flexpipe.schedule.op import Lane, Op
from flexpipe.schedule.places import Counts, IntArray, Part, Places, phases
from flexpipe.schedule.relay import Relay
from flexpipe.schedule.simulate import (
    OnCommit,
    RankOps,
    Simulated,
    SimulatedSpan,
    simulate_ranks,
)
from flexpipe.schedule.step import MicroBatch, Row

DRAWN_OPS = 5_000  # a timeline of more is hard to read
FloatArray = npt.NDArray[np.float64]
_GRAINS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # in powers of two of tokens
_ROUNDS = 2  # the first fills the lanes, the second tells what one more takes
FULL_BLOCKS = 4  # a job of more blocks than this is counted with every so manieth request


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much of a job is simulated: all of it up to `exact_ops`; else about `sampled_ops` in
    `few` and then in `more` decoder layers, of `least` to `most` steps, after up to `most_groups`
    kinds of steps were priced."""

    exact_ops: int = 20_000
    sampled_ops: int = 20_000
    few: int = 4
    more: int = 12
    least: int = 3
    most: int = 12
    most_groups: int = 160


THOROUGH = Effort()
QUICK = Effort(exact_ops=3000, sampled_ops=3000, few=2, more=8, most_groups=40)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A stage's plan, and what is known of the machine that runs it."""

    plan: Plan
    profile: Profile
    emulation: Emulation | None = None

    def costs(self, *, averaged: bool = False) -> CostModel:
        return CostModel(self.plan, self.profile, self.emulation, averaged=averaged)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePrediction:
    """What one rank has to do with a job, and how long it idles: `bubble` is the share of the job's
    time in which it computes nothing."""

    rank: int
    num_layers: int
    bound_s: float
    bottleneck: str
    busy_s: Mapping[str, float]  # of lanes and of links, by name, as if each were alone
    link_bytes: Mapping[str, int]
    tier_bytes: Mapping[str, int]
    bubble: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A job's times and traffic, as the machines' profiles have it.

    `bound_s` is what the busiest lane or link, `bottleneck`, would need alone for its work: no
    schedule of this plan is faster. `latency_s` is the mean time of a request from the step that
    takes it to its last token. `num_simulated` ops were played. Where there are several stages,
    `busy_s` is of the one with the bottleneck, and bytes are of all.
    """

    load_s: float
    prefill_s: float
    decode_s: float
    latency_s: float
    prompt_tokens: int
    generated_tokens: int
    num_steps: int
    bound_s: float
    bottleneck: str
    busy_s: Mapping[str, float]  # of lanes and of links, by name, as if each were alone
    link_bytes: Mapping[str, int]
    tier_bytes: Mapping[str, int]
    num_simulated: int
    stages: Sequence[StagePrediction]
    spans: Sequence[Sequence[SimulatedSpan]] = field(default=(), repr=False)  # by rank

    @property
    def run_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def total_s(self) -> float:
        return self.load_s + self.run_s

    @property
    def link_busy_s(self) -> dict[str, float]:
        return {name: seconds for name, seconds in self.busy_s.items() if name in LINKS}

    @property
    def bound_share(self) -> float:
        """How near the bound the run comes, 1 at best."""
        return self.bound_s / self.run_s if self.run_s else 0.0

    @property
    def generated_tokens_per_s(self) -> float:
        """All generated tokens over prefill and decode, as reports count it."""
        return self.generated_tokens / self.run_s if self.run_s else 0.0


def predict(
    plan: Plan,
    needs: Sequence[Need],
    profile: Profile,
    emulation: Emulation | None = None,
    *,
    order: Sequence[int] | None = None,
    effort: Effort = THOROUGH,
    keep_spans: bool = False,
) -> Prediction:
    """Play `needs` under the plan of a model in one stage."""
    stage = Assignment(plan=plan, profile=profile, emulation=emulation)
    return predict_stages([stage], needs, order=order, effort=effort, keep_spans=keep_spans)


def predict_stages(
    stages: Sequence[Assignment],
    needs: Sequence[Need],
    *,
    order: Sequence[int] | None = None,
    effort: Effort = THOROUGH,
    keep_spans: bool = False,
) -> Prediction:
    """Play `needs` under the stages' plans, one per rank; jobs beyond the effort are extrapolated.

    Requests take places in `order`, the longest first if none is given.
    """
    queue = _queue(needs, order)
    rehearsal = _Rehearsal.of(stages[0].plan, queue)
    num_ops = sum(_count_ops(stage.plan, rehearsal) for stage in stages)
    if num_ops <= effort.exact_ops:
        return _whole([stage.costs() for stage in stages], queue, keep_spans)
    costs = [stage.costs(averaged=True) for stage in stages]
    return _extrapolated(costs, queue, rehearsal, effort)


def _queue(needs: Sequence[Need], order: Sequence[int] | None = None) -> list[Need]:
    return [needs[index] for index in (longest_first(needs) if order is None else order)]


def first_spans(
    stages: Sequence[Assignment], needs: Sequence[Need], *, num_steps: int | None = None
) -> list[list[SimulatedSpan]]:
    """What runs when on each rank in a job's first steps; without their number, in those that begin
    with the first `DRAWN_OPS` ops of rank 0."""
    player = _Player(stages[0].plan, _queue(needs))
    opening = _Opening(stages[0].plan, player, num_steps)
    costs = [stage.costs() for stage in stages]
    made = _play(costs, opening.steps, opening.commit, keep_spans=True, counted=opening.counted)
    return [one.spans for one in made]


def _whole(costs: Sequence[CostModel], needs: Sequence[Need], keep_spans: bool) -> Prediction:
    player = _Player(costs[0].plan, needs)
    made = _play(costs, player.places.steps, player.commit, keep_spans=keep_spans)
    took = phases(player.places.counts, 0.0)
    works = [_work_in(one) for one in made]
    return _prediction(
        costs,
        needs,
        works,
        [one.bubble for one in made],
        prefill_s=took.prefill_s,
        decode_s=took.decode_s,
        latency_s=float(np.mean(player.latencies_s)),
        num_steps=sum(count.rows > 0 for count in player.places.counts),
        num_simulated=sum(sum(one.num_ops.values()) for one in made),
        spans=[one.spans for one in made],
    )


def _work_in(made: Simulated) -> Work:
    lanes = {lane.value: work_s for lane, work_s in made.work_s.items()}
    seconds = {**made.link_work_s, **lanes}  # a lane with a link's name has all the link's work
    return Work(seconds, {name: float(count) for name, count in made.link_bytes.items()})


Ops = Iterator[Op | None]


def _play(
    costs: Sequence[CostModel],
    steps: Steps,
    on_commit: OnCommit,
    *,
    keep_spans: bool = False,
    counted: Callable[[Ops], Ops] = lambda ops: ops,
) -> list[Simulated]:
    """All ranks' ops of the steps that rank 0 forms; `counted` passes those of rank 0 on."""
    relay = Relay(steps, len(costs))
    ops = [schedule(one.plan, known) for one, known in zip(costs, relay.steps, strict=True)]
    ops[0] = counted(ops[0])
    parts = [
        RankOps(
            ops=mine,
            cost_of=one,
            slowdown=one.profile.slowdown,
            hop_s=one.profile.overhead("hop"),
        )
        for mine, one in zip(ops, costs, strict=True)
    ]
    return simulate_ranks(parts, on_commit=on_commit, keep_spans=keep_spans)


class _Player:
    """Answers a simulation as the job would."""

    def __init__(self, plan: Plan, needs: Sequence[Need]) -> None:
        self.places: Places[Need] = Places(plan, needs, self._seat, _row)
        self.latencies_s: list[float] = []
        self._left: dict[tuple[int, int], int] = {}
        self._since_s: dict[tuple[int, int], float] = {}
        self._now_s = 0.0

    def commit(self, batch: MicroBatch, now_s: float) -> None:
        self._now_s = now_s
        self.places.computed(batch.index, now_s)
        for row in batch.rows:
            if not row.sampled:
                continue
            where = batch.index, row.place
            self._left[where] -= 1
            if self._left[where]:
                self.places.go_on(*where)
            else:
                self.places.leave(*where)
                self.latencies_s.append(now_s - self._since_s[where])

    def _seat(self, mb: int, place: int, need: Need) -> int:
        self._left[mb, place], self._since_s[mb, place] = need.output, self._now_s
        return need.prompt


class _Opening:
    """A job's steps up to some number, or while there are few ops; these are played to their
    end."""

    def __init__(self, plan: Plan, player: _Player, num_steps: int | None) -> None:
        self._blocks = plan.blocks
        self._player = player
        self._num_steps = num_steps
        self._num_ops = 0
        self._in_flight: set[int] = set()

    def counted(self, ops: Iterator[Op | None]) -> Iterator[Op | None]:
        for op in ops:
            self._num_ops += op is not None
            yield op

    def commit(self, batch: MicroBatch, now_s: float) -> None:
        self._in_flight.discard(batch.index)
        self._player.commit(batch, now_s)

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        if index == 0 or self._goes_on(index):
            formed = self._player.places.steps(index)
            return None if formed is None else self._passed_on(formed)
        return self._rest(self._blocks[index % len(self._blocks)]) if self._in_flight else None

    def _goes_on(self, index: int) -> bool:
        if self._num_steps is None:
            return self._num_ops < DRAWN_OPS
        return index < self._num_steps

    def _passed_on(self, formed: Iterator[MicroBatch | None]) -> Iterator[MicroBatch | None]:
        for batch in formed:
            if batch is not None:
                self._in_flight.add(batch.index)
            yield batch

    def _rest(self, block: Iterable[int]) -> Iterator[None]:
        while self._in_flight.intersection(block):
            yield None


def _row(mb: int, part: Part) -> Row:
    return Row(0, part.place, part.num_context, range(part.num_new), part.sampled)


@dataclass(slots=True)
class _Rehearsal:
    """A job's steps as counts: what each micro-batch computes, and how often a step like it comes.

    `stays` are the first and last step of each request.
    """

    steps: list[dict[int, Counts]]
    weights: list[float]
    stays: list[tuple[int, int]]

    @classmethod
    def of(cls, plan: Plan, needs: Sequence[Need]) -> _Rehearsal:
        """Of all requests, or of every so manieth: then steps of the steady state, in which rows
        leave and others wait, stand for so many more as make the tokens right."""
        num_places = sum(mb.num_places for mb in plan.micro_batches)
        every = max(1, len(needs) // (FULL_BLOCKS * num_places))
        made = _Rehearse(plan, needs[::every]).run()
        made._stretch(sum(need.output for need in needs))
        return made

    def _stretch(self, num_tokens: int) -> None:
        """Weigh the steady steps so that all steps together sample `num_tokens`."""
        sampled = np.array([sum(p.sampled.sum() for p in s.values()) for s in self.steps])
        steady = np.array(self.weights) == 0
        rest = float(sampled[~steady].sum())
        factor = (num_tokens - rest) / max(1.0, float(sampled[steady].sum()))
        self.weights = np.where(steady, factor, 1.0).tolist()


class _Rehearse:
    """Goes through a job's steps without costs; every micro-batch comes back at once. What is
    steady has the weight 0."""

    def __init__(self, plan: Plan, needs: Sequence[Need]) -> None:
        self._left = [np.zeros(mb.num_places, np.int64) for mb in plan.micro_batches]
        self._since = [np.zeros(mb.num_places, np.int64) for mb in plan.micro_batches]
        self._blocks = plan.blocks
        self._places: Places[Need] = Places(plan, needs, self._seat, _row)
        self._made = _Rehearsal([], [], [])

    def run(self) -> _Rehearsal:
        made = self._made
        for block in cycle(self._blocks):
            if self._places.is_done:
                break
            is_steady = bool(made.stays) and not self._places.is_tail
            step: dict[int, Counts] = {}
            for mb in block:
                parts = self._places.form(mb)
                if parts is not None:
                    step[mb] = parts
                    self._take(mb, parts)
            if step:
                made.steps.append(step)
                made.weights.append(0.0 if is_steady else 1.0)
        return made

    def _take(self, mb: int, parts: Counts) -> None:
        self._places.advance(mb, parts)
        sampled = parts.place[parts.sampled]
        left = self._left[mb]
        left[sampled] -= 1
        ended = sampled[left[sampled] == 0]
        self._places.go_on(mb, sampled)
        if len(ended):
            self._places.leave(mb, ended)
            now = len(self._made.steps)
            self._made.stays += [(int(first), now) for first in self._since[mb][ended]]

    def _seat(self, mb: int, place: int, need: Need) -> int:
        self._left[mb][place], self._since[mb][place] = need.output, len(self._made.steps)
        return need.prompt


def _count_ops(plan: Plan, rehearsal: _Rehearsal) -> float:
    """About how many ops the job has."""
    batches = sum(
        weight * len(step) for step, weight in zip(rehearsal.steps, rehearsal.weights, strict=True)
    )
    per_layer = 1 + 2 * any(plan.slot_places(mb) for mb in plan.micro_batches)
    per_layer += 2 * any(mb.hidden_home != plan.device_tier for mb in plan.micro_batches)
    streams = 2 * len(plan.streamed_layers) * len(rehearsal.steps)
    return batches * (per_layer * len(plan.layers) + 3) + streams


def _prediction(
    costs: Sequence[CostModel],
    needs: Sequence[Need],
    works: Sequence[Work],
    bubbles: Sequence[float],
    *,
    prefill_s: float,
    decode_s: float,
    latency_s: float,
    num_steps: int,
    num_simulated: int,
    spans: Sequence[Sequence[SimulatedSpan]] = (),
) -> Prediction:
    parts = zip(costs, works, bubbles, strict=True)
    stages = [_stage(rank, *part) for rank, part in enumerate(parts)]
    slowest = max(stages, key=lambda stage: stage.bound_s)
    where = f" of stage {slowest.rank}" if len(stages) > 1 else ""
    return Prediction(
        load_s=max(one.load_s for one in costs),
        prefill_s=prefill_s,
        decode_s=decode_s,
        latency_s=latency_s,
        prompt_tokens=sum(need.prompt for need in needs),
        generated_tokens=sum(need.output for need in needs),
        num_steps=num_steps,
        bound_s=slowest.bound_s,
        bottleneck=slowest.bottleneck + where,
        busy_s=slowest.busy_s,
        link_bytes=_summed(stage.link_bytes for stage in stages),
        tier_bytes=_summed(stage.tier_bytes for stage in stages),
        num_simulated=num_simulated,
        stages=stages,
        spans=spans,
    )


def _stage(rank: int, costs: CostModel, work: Work, bubble: float) -> StagePrediction:
    plan = costs.plan
    return StagePrediction(
        rank=rank,
        num_layers=_num_decoders(plan),
        bound_s=work.bound_s,
        bottleneck=work.bottleneck,
        busy_s=dict(work.seconds),
        link_bytes={name: round(num_bytes) for name, num_bytes in work.num_bytes.items()},
        tier_bytes={tier.value: plan.tier_bytes(tier) for tier in Tier if plan.tier_bytes(tier)},
        bubble=bubble,
    )


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


def _extrapolated(
    costs: Sequence[CostModel], needs: Sequence[Need], rehearsal: _Rehearsal, effort: Effort
) -> Prediction:
    thin = _thinned_alike([one.plan for one in costs], effort)
    groups, group_of = _groups(rehearsal, effort.most_groups)
    weights = np.array(rehearsal.weights)
    samples, nearest = _representatives(thin, rehearsal, groups, effort)
    scripts = [_batches(rehearsal.steps[index]) for index in groups]
    works = [[step_work(one, list(script.values())) for one in costs] for script in scripts]
    bounds = np.array([[work.bound_s for work in stages] for stages in works])
    totals = [Work() for _ in costs]
    for group, stages in enumerate(works):
        for total, work in zip(totals, stages, strict=True):
            total.add_all(work, float(weights[group_of == group].sum()))
    steady = [_steady(costs, thin, scripts[sample]) for sample in samples]
    # the layers played may stream less than those they stand for
    ratios = np.maximum([one.ratio for one in steady], 1.0)
    per_group = bounds.max(1) * ratios[nearest]
    took = per_group[group_of]
    ends = np.concatenate([[0.0], np.cumsum(took)])
    stays = [ends[last + 1] - ends[first] for first, last in rehearsal.stays]
    fill_s, drain_s = _edges(costs[0].plan, totals, bounds[group_of], rehearsal)
    prefills = np.array([any(not p.decodes.all() for p in s.values()) for s in rehearsal.steps])
    run_s = float((took * weights).sum()) + fill_s + drain_s
    prefill_s = float((took * weights)[prefills].sum()) + fill_s
    return _prediction(
        costs,
        needs,
        totals,
        [1 - _active_s(total) / run_s for total in totals],
        prefill_s=prefill_s,
        decode_s=run_s - prefill_s,
        latency_s=float(np.mean(stays)),
        num_steps=round(weights.sum()),
        num_simulated=sum(one.num_ops for one in steady),
    )


def _active_s(work: Work) -> float:
    """Seconds in which something is computed, if what can overlap does."""
    return max(work.seconds[lane.value] for lane in (Lane.COMPUTE, Lane.ATTEND_CPU))


def _edges(
    plan: Plan, totals: Sequence[Work], bounds: FloatArray, rehearsal: _Rehearsal
) -> tuple[float, float]:
    """Seconds to fill the stages before the slowest one, and to drain those behind it: each takes a
    micro-batch's part of the first step, and of the last. Barriers drain every round, which its
    steps' times hold already."""
    if len(totals) == 1 or plan.policy.strategy != "event":
        return 0.0, 0.0
    slowest = int(np.argmax([total.bound_s for total in totals]))
    first, last = (
        bounds[index] / (max(1, len(rehearsal.steps[index])) * plan.pipeline.num_chunks)
        for index in (0, -1)
    )
    return float(first[:slowest].sum()), float(last[slowest + 1 :].sum())


def _groups(rehearsal: _Rehearsal, most: int) -> tuple[IntArray, IntArray]:
    """Steps almost alike: of each kind the most typical one, and for every step its kind."""
    features = np.array([_features(step) for step in rehearsal.steps])
    for grain in _GRAINS:
        kinds, group_of = np.unique(np.round(features / grain), axis=0, return_inverse=True)
        group_of = group_of.reshape(-1)
        if len(kinds) <= most:
            break
    typical = []
    for group in range(len(kinds)):
        members = np.flatnonzero(group_of == group)
        tokens = 2.0 ** features[members]  # what a step costs is linear in tokens
        gaps = np.abs(tokens / tokens.mean(0) - 1).sum(1)
        typical.append(members[gaps.argmin()])
    return np.array(typical), group_of


def _representatives(
    thin: Sequence[Sequence[Plan]], rehearsal: _Rehearsal, groups: IntArray, effort: Effort
) -> tuple[list[int], IntArray]:
    """Groups unlike each other, and for every group the one among them that is most like it."""
    features = np.array([_features(rehearsal.steps[index]) for index in groups])
    num_ops = sum(_count_ops(plan, rehearsal) for plans in thin for plan in plans)
    num_played = _ROUNDS * thin[0][0].pipeline.num_blocks  # steps, to know one
    per_step = max(1.0, num_played * num_ops / sum(rehearsal.weights))
    count = int(np.clip(effort.sampled_ops / per_step, effort.least, effort.most))
    chosen = [0]
    distance = _distances(features, chosen[0])
    while len(chosen) < min(count, len(features)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, _distances(features, chosen[-1]))
    to_each = np.stack([_distances(features, index) for index in chosen])
    return chosen, to_each.argmin(0)


def _features(step: Mapping[int, Counts]) -> tuple[float, ...]:
    """On logarithmic axes: new tokens, keys that decoding rows see, and rows that are sampled."""
    new = sum(int(parts.num_new.sum()) for parts in step.values())
    seen = sum(int(parts.num_context.sum()) for parts in step.values())
    sampled = sum(int(parts.sampled.sum()) for parts in step.values())
    return float(np.log2(1 + new)), float(np.log2(64 + seen)), float(np.log2(1 + sampled))


def _distances(features: np.ndarray[tuple[int, int], np.dtype[np.float64]], index: int) -> IntArray:
    gaps: IntArray = np.abs(features - features[index]).sum(1)
    return gaps


class _Steady(NamedTuple):
    """How much longer one step takes in the steady state than its busiest lane or link, and the ops
    that were played to know."""

    ratio: float
    num_ops: int


class _Again(NamedTuple):
    """What one more round of equal steps takes, what a step's busiest lane needs, ops played."""

    seconds: float
    bound_s: float
    num_ops: int


def _steady(
    costs: Sequence[CostModel],
    thin: Sequence[Sequence[Plan]],
    step: Mapping[int, MicroBatch],
) -> _Steady:
    """One more step like those before it, of all layers."""
    few, more = (_again(costs, plans, step) for plans in thin)
    num_few, num_more, num_all = (
        sum(map(_num_decoders, plans)) for plans in (*thin, [one.plan for one in costs])
    )
    factor = (num_all - num_more) / (num_more - num_few) if num_more > num_few else 0.0
    seconds = more.seconds + factor * (more.seconds - few.seconds)
    bound_s = more.bound_s + factor * (more.bound_s - few.bound_s)
    if len(costs) == 1:  # of several stages not quite the same part was played
        bound_s = step_work(costs[0], list(step.values())).bound_s
    return _Steady(seconds / bound_s, few.num_ops + more.num_ops)


def _again(
    costs: Sequence[CostModel], plans: Sequence[Plan], step: Mapping[int, MicroBatch]
) -> _Again:
    """What a step takes in the second of two rounds, in which every block makes an equal one."""
    thin = [
        CostModel(plan, one.profile, one.emulation, averaged=True)
        for plan, one in zip(plans, costs, strict=True)
    ]
    script = _Script(_for_all_blocks(plans[0], step))
    made = _play(thin, script.steps, script.commit)
    first_s, second_s = script.ends_s
    batches = list(step.values())
    return _Again(
        seconds=(second_s - first_s) / plans[0].pipeline.num_blocks,
        bound_s=max(step_work(one, batches).bound_s for one in thin),
        num_ops=sum(sum(one.num_ops.values()) for one in made),
    )


def _batches(step: Mapping[int, Counts]) -> dict[int, MicroBatch]:
    return {
        mb: MicroBatch(mb, tuple(map(partial(_row, mb), parts.parts))) for mb, parts in step.items()
    }


def _for_all_blocks(plan: Plan, step: Mapping[int, MicroBatch]) -> list[list[MicroBatch]]:
    """A block's step for each of the blocks, as far as their places go."""
    (own,) = {index for index, block in enumerate(plan.blocks) if set(step) <= set(block)}
    made = []
    for block in plan.blocks:
        pairs = zip(plan.blocks[own], block, strict=False)
        alike = [(step[mine], other) for mine, other in pairs if mine in step]
        made.append([_moved_to(plan, batch, other) for batch, other in alike])
    return made


def _moved_to(plan: Plan, batch: MicroBatch, mb: int) -> MicroBatch:
    """The same rows in another micro-batch, at least one of them."""
    places = plan.micro_batches[mb].num_places
    rows = [row for row in batch.rows if row.place < places]
    return MicroBatch(mb, tuple(rows or [replace(batch.rows[0], place=0)]))


class _Script:
    """Every block's step, as often as there are rounds."""

    def __init__(self, blocks: Sequence[Sequence[MicroBatch]]) -> None:
        self.ends_s = [0.0] * _ROUNDS
        # equal, but not the same: what is known of a micro-batch is kept per object
        self._steps = [
            [MicroBatch(batch.index, batch.rows) for batch in block]
            for _ in range(_ROUNDS)
            for block in blocks
        ]
        self._num_blocks = len(blocks)
        self._in_flight: dict[int, int] = {}

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        if index >= len(self._steps) and not self._in_flight:
            return None
        return self._step(index)

    def commit(self, batch: MicroBatch, now_s: float) -> None:
        self.ends_s[self._in_flight.pop(batch.index)] = now_s

    def _step(self, index: int) -> Iterator[MicroBatch | None]:
        for batch in self._steps[index % len(self._steps)]:
            while batch.index in self._in_flight:
                yield None
            if index < len(self._steps):
                self._in_flight[batch.index] = index // self._num_blocks
                yield batch


def _num_decoders(plan: Plan) -> int:
    return len(_decoders(plan.layers))


def _decoders(layers: Iterable[LayerPlan]) -> list[int]:
    """Decoder layers of which there are parts among `layers`, ascending."""
    return sorted({layer.layer for layer in layers if layer.layer is not None})


def _thinned_alike(plans: Sequence[Plan], effort: Effort) -> tuple[list[Plan], list[Plan]]:
    """The stages with few of their decoder layers, and with some more: the same part of each."""
    longest = max(len(_decoders(chunk)) for plan in plans for chunk in plan.chunks)
    few, more = effort.few, effort.more
    if len(plans) > 1:  # the ops of all ranks are played, and of all blocks
        few, more = max(1, few // 2), max(2, more // 3)
    if longest <= more:
        return [*plans], [*plans]
    thin = [_thinned(plan, few / longest, more / longest) for plan in plans]
    return [one for one, _ in thin], [other for _, other in thin]


def _thinned(plan: Plan, few: float, more: float) -> tuple[Plan, Plan]:
    """The plan with these parts of each chunk's decoder layers. They lie next to each other, what
    there is more of them behind; and are those whose homes are most like those of all, since they
    stand for the rest."""
    kept_few, kept_more = set[int](), set[int]()
    for chunk in plan.chunks:
        decoders = _decoders(chunk)
        num_more = max(1, round(more * len(decoders)))
        num_few = max(1, min(num_more, round(few * len(decoders))))
        first = _typical(chunk, decoders, num_few, num_more)
        kept_few.update(decoders[first : first + num_few])
        kept_more.update(decoders[first : first + num_more])
    return _only(plan, kept_few), _only(plan, kept_more)


def _typical(layers: Sequence[LayerPlan], decoders: Sequence[int], few: int, more: int) -> int:
    """Where to begin so that the layers between `few` and `more` stream as much as all do."""
    index_of = {layer: index for index, layer in enumerate(decoders)}
    streamed = np.zeros((len(decoders), 2))
    for layer in layers:
        if layer.layer is not None:
            moved = layer.streamed.pack_bytes, layer.streamed.read_bytes
            streamed[index_of[layer.layer]] += moved
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(streamed, 0)])
    added = sums[more:] - sums[few : few + len(sums) - more]
    return int(np.abs(added - (more - few) * streamed.mean(0)).sum(1).argmin())


def _only(plan: Plan, decoders: AbstractSet[int]) -> Plan:
    """The plan without the other decoder layers."""
    kept = [layer for layer in plan.layers if layer.layer is None or layer.layer in decoders]
    return replace(plan, layers=tuple(replace(layer, position=i) for i, layer in enumerate(kept)))
