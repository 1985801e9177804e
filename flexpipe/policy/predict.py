"""What a job will take on a machine, or on several: its steps, played by the simulator.

A job's steps follow from its requests (`flexpipe.policy.rehearsal`), its ops from its steps, their
costs from the machines. Short jobs are simulated whole, all ranks together. Of long ones every kind
of step is priced as if a stage's lanes overlapped perfectly, and for a few kinds, unlike each
other, the simulator tells how much longer they take it alone (`flexpipe.policy.steady`); then the
steps pass the stages (`flexpipe.policy.flow`). Requests are taken to generate all the tokens they
may.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.estimate import Work, step_work
from flexpipe.policy.flow import FloatArray, StepShape, flow
from flexpipe.policy.profile import LINKS, Profile
from flexpipe.policy.rehearsal import Rehearsal, StepCounts, batches_of, row_of, unlike
from flexpipe.policy.steady import Thinned, num_steps_played, steady_step
from flexpipe.schedule.build import Steps, schedule
from flexpipe.schedule.op import Lane, Op
from flexpipe.schedule.places import Places, phases
from flexpipe.schedule.relay import Relay
from flexpipe.schedule.simulate import (
    COMPUTING,
    OnCommit,
    RankOps,
    Simulated,
    SimulatedSpan,
    simulate_ranks,
)
from flexpipe.schedule.step import MicroBatch

DRAWN_OPS = 5_000  # a timeline of more is hard to read


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
COARSE = Effort(exact_ops=1000, sampled_ops=1000, few=1, more=3, least=2, most=4, most_groups=12)


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
    rehearsal = Rehearsal.of(stages[0].plan, queue)
    num_ops = sum(rehearsal.count_ops(stage.plan) for stage in stages)
    exact = num_ops <= effort.exact_ops
    costs = [stage.costs(averaged=not exact) for stage in stages]
    made = (
        _whole(costs, queue, keep_spans)
        if exact
        else _extrapolated(costs, queue, rehearsal, effort)
    )
    return _with_first_times(made, rehearsal, max(one.new_rows_s for one in costs))


def _with_first_times(made: Prediction, rehearsal: Rehearsal, each_s: float) -> Prediction:
    """What kernels for new numbers of rows take, which no op tells alone; requests wait for them as
    they do for all that a run takes."""
    in_prefill, in_decode = rehearsal.num_new_rows()
    longer = 1 + (in_prefill + in_decode) * each_s / made.run_s if made.run_s else 1.0
    return replace(
        made,
        prefill_s=made.prefill_s + in_prefill * each_s,
        decode_s=made.decode_s + in_decode * each_s,
        latency_s=made.latency_s * longer,
    )


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
        RankOps(ops=mine, cost_of=one, pace=one.profile.pace)
        for mine, one in zip(ops, costs, strict=True)
    ]
    return simulate_ranks(parts, on_commit=on_commit, keep_spans=keep_spans)


class _Player:
    """Answers a simulation as the job would."""

    def __init__(self, plan: Plan, needs: Sequence[Need]) -> None:
        self.places: Places[Need] = Places(plan, needs, self._seat, row_of)
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
        num_layers=plan.num_decoder_layers,
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
    costs: Sequence[CostModel], needs: Sequence[Need], rehearsal: Rehearsal, effort: Effort
) -> Prediction:
    kinds, kind_of = rehearsal.kinds(effort.most_groups)
    typical = [rehearsal.steps[index] for index in kinds]
    stages = _Stages(costs, typical, rehearsal, effort)
    seconds = np.array([one.seconds for one in stages.of_ranks])[:, kind_of]
    weights = np.array(rehearsal.weights)
    plan = costs[0].plan
    shapes = [StepShape(_block_of(plan, step), len(step)) for step in rehearsal.steps]
    went = flow(
        plan.pipeline,
        shapes,
        seconds,
        stages.message_s[kind_of],
        stages.return_s[kind_of],
        drains=plan.policy.strategy != "event",
    )
    took_s = went.took_s if len(costs) > 1 else seconds[0]
    stays_s = [went.ends_s[last] - went.begins_s[first] for first, last in rehearsal.stays]
    prefills = np.array([any(not p.decodes.all() for p in s.values()) for s in rehearsal.steps])
    prefill_s = float((took_s * weights)[prefills].sum())
    decode_s = float((took_s * weights)[~prefills].sum())
    often = np.bincount(kind_of, weights).astype(np.float64)
    totals = [one.total(often) for one in stages.of_ranks]
    return _prediction(
        costs,
        needs,
        totals,
        [1 - float(one.active_s @ often) / (prefill_s + decode_s) for one in stages.of_ranks],
        prefill_s=prefill_s,
        decode_s=decode_s,
        latency_s=float(np.mean(stays_s)),
        num_steps=round(weights.sum()),
        num_simulated=stages.num_simulated,
    )


def _block_of(plan: Plan, step: Mapping[int, object]) -> int:
    """Whose step it is."""
    first = next(iter(step))
    return next(index for index, block in enumerate(plan.blocks) if first in block)


@dataclass(frozen=True, slots=True)
class _StageTimes:
    """What a stage has to do in each kind of step, how long that takes it alone, and in how much of
    that time it computes."""

    works: Sequence[Work]
    seconds: FloatArray
    active_s: FloatArray

    def total(self, often: FloatArray) -> Work:
        """All its work, where kinds come so often."""
        total = Work()
        for work, times in zip(self.works, often, strict=True):
            total.add_all(work, float(times))
        return total


class _Stages:
    """The stages' times in each kind of step; those of stages alike are found once.

    The price with perfect overlap is exact. How much longer a step takes is found by playing a few
    that are unlike, and taken for those most like them.
    """

    def __init__(
        self,
        costs: Sequence[CostModel],
        typical: Sequence[StepCounts],
        rehearsal: Rehearsal,
        effort: Effort,
    ) -> None:
        self.num_simulated = 0
        self._hop_s = costs[0].profile.overhead("hop")
        self._scripts = [batches_of(step) for step in typical]
        first_like = [next(other for other in costs if _alike(one, other)) for one in costs]
        different = {id(one): one for one in first_like}
        thin = {
            key: Thinned.of(one.plan, effort.few, effort.more) for key, one in different.items()
        }
        played = sum(rehearsal.count_ops(plan) for both in thin.values() for plan in both)
        per_step = num_steps_played(costs[0].plan) * played / sum(rehearsal.weights)
        count = int(np.clip(effort.sampled_ops / max(1.0, per_step), effort.least, effort.most))
        self._samples, self._nearest = unlike(typical, count)
        found = {key: self._times(one, thin[key]) for key, one in different.items()}
        self.of_ranks = [found[id(one)] for one in first_like]

    def _times(self, costs: CostModel, thin: Thinned) -> _StageTimes:
        works = [step_work(costs, list(script.values())) for script in self._scripts]
        bounds = np.array([work.bound_s for work in works])
        steady = [steady_step(costs, thin, self._scripts[sample]) for sample in self._samples]
        self.num_simulated += sum(one.num_ops for one in steady)
        ratios = np.array([one.seconds for one in steady]) / bounds[self._samples]
        ratios = np.maximum(ratios, 1.0)  # layers played may stream less than those they stand for
        alone_s = [max(work.seconds[lane.value] for lane in COMPUTING) for work in works]
        stretch = np.array([one.stretch for one in steady])
        active_s = np.array(alone_s) * stretch[self._nearest]
        return _StageTimes(works, bounds * ratios[self._nearest], active_s)

    @property
    def message_s(self) -> FloatArray:
        """What one micro-batch's hidden takes from the first stage to the next, by kind: onto the
        sender's lane, over, and onto the receiver's next one."""
        sent = [work.seconds[Lane.SEND.value] for work in self.of_ranks[0].works]
        return np.array(sent) / [len(script) for script in self._scripts] + 2 * self._hop_s

    @property
    def return_s(self) -> FloatArray:
        """What a step's tokens take from the last stage to the step that follows, by kind: the same
        way, then COMMIT after COMMIT. A stage that is alone has that in its own times."""
        if len(self.of_ranks) == 1:
            return np.zeros(len(self._scripts))
        first = [work.seconds for work in self.of_ranks[0].works]
        back = [one[Lane.RECEIVE.value] + one[Lane.HOST.value] for one in first]
        return np.array(back) + 3 * self._hop_s


def _alike(one: CostModel, other: CostModel) -> bool:
    """Whether two stages take the same for every step."""
    if one is other:
        return True
    ours, theirs = one.plan, other.plan
    return (
        (ours.policy, ours.embeds, ours.has_head) == (theirs.policy, theirs.embeds, theirs.has_head)
        and (one.profile, one.emulation) == (other.profile, other.emulation)
        and [la.likeness for la in ours.layers] == [la.likeness for la in theirs.layers]
    )
