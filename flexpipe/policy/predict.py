"""What a job will take on a machine: its steps, played by the simulator.

A job's steps follow from its requests (`flexpipe.schedule.places`), its ops from its steps, their
costs from the machine. Short jobs are simulated whole. Of long ones the steps are counted with
every so manieth request; every kind of step among them is priced as if its lanes overlapped
perfectly, and for a few, unlike each other, the simulator tells how much longer they take. It
plays those with few layers: twice in a row, with two numbers of layers, so that what a step and
what a layer adds in the steady state are differences. Requests are taken to generate all the
tokens they may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.layer import LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.estimate import Work, step_work
from flexpipe.policy.profile import LINKS, Profile
from flexpipe.schedule.build import schedule
from flexpipe.schedule.op import Op
from flexpipe.schedule.places import Counts, IntArray, Part, Places, phases
from flexpipe.schedule.simulate import Simulated, SimulatedSpan, simulate
from flexpipe.schedule.step import MicroBatch, Row

DRAWN_OPS = 5_000  # a timeline of more is hard to read
_GRAINS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # in powers of two of tokens
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
class Prediction:
    """A job's times and traffic, as the machine's profile has it.

    `bound_s` is what the busiest lane or link, `bottleneck`, would need alone for its work: no
    schedule of this plan is faster. `latency_s` is the mean time of a request from the step that
    takes it to its last token. `num_simulated` ops were played.
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
    spans: Sequence[SimulatedSpan] = field(default=(), repr=False)

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
    """Play `needs` under `plan`; jobs beyond the effort are extrapolated.

    Requests take places in `order`, the longest first if none is given.
    """
    costs = CostModel(plan, profile, emulation)
    queue = _queue(needs, order)
    rehearsal = _Rehearsal.of(plan, queue)
    num_ops = _count_ops(plan, rehearsal)
    if num_ops <= effort.exact_ops:
        return _whole(plan, queue, costs, keep_spans)
    costs = CostModel(plan, profile, emulation, averaged=True)
    return _extrapolated(plan, queue, costs, rehearsal, effort)


def _queue(needs: Sequence[Need], order: Sequence[int] | None = None) -> list[Need]:
    return [needs[index] for index in (longest_first(needs) if order is None else order)]


def first_spans(
    plan: Plan,
    needs: Sequence[Need],
    profile: Profile,
    emulation: Emulation | None = None,
    *,
    num_steps: int | None = None,
) -> list[SimulatedSpan]:
    """What runs when in a job's first steps; without their number, in those that begin with the
    first `DRAWN_OPS` ops."""
    costs = CostModel(plan, profile, emulation)
    player = _Player(plan, _queue(needs))
    opening = _Opening(player.places, num_steps)
    ops = opening.counted(schedule(plan, opening.steps))
    return _play(ops, player, costs, keep_spans=True).spans


def _whole(plan: Plan, needs: Sequence[Need], costs: CostModel, keep_spans: bool) -> Prediction:
    player = _Player(plan, needs)
    made = _play(schedule(plan, player.places.steps), player, costs, keep_spans)
    took = phases(player.places.counts, 0.0)
    return _prediction(
        costs,
        needs,
        _work_in(made),
        prefill_s=took.prefill_s,
        decode_s=took.decode_s,
        latency_s=float(np.mean(player.latencies_s)),
        num_steps=sum(count.rows > 0 for count in player.places.counts),
        num_simulated=sum(made.num_ops.values()),
        spans=made.spans,
    )


def _work_in(made: Simulated) -> Work:
    lanes = {lane.value: work_s for lane, work_s in made.work_s.items()}
    seconds = {**made.link_work_s, **lanes}  # a lane with a link's name has all the link's work
    return Work(seconds, {name: float(count) for name, count in made.link_bytes.items()})


def _play(
    ops: Iterator[Op | None], player: _Player, costs: CostModel, keep_spans: bool
) -> Simulated:
    return simulate(
        ops,
        costs,
        slowdown=costs.profile.slowdown,
        hop_s=costs.profile.overhead("hop"),
        on_commit=player.commit,
        keep_spans=keep_spans,
    )


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

    def __init__(self, places: Places[Need], num_steps: int | None) -> None:
        self._places = places
        self._num_steps = num_steps
        self._num_ops = 0

    def counted(self, ops: Iterator[Op | None]) -> Iterator[Op | None]:
        for op in ops:
            self._num_ops += op is not None
            yield op

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        if index == 0 or self._goes_on(index):
            return self._places.steps(index)
        return self._rest() if self._places.is_busy else None

    def _goes_on(self, index: int) -> bool:
        if self._num_steps is None:
            return self._num_ops < DRAWN_OPS
        return index < self._num_steps

    def _rest(self) -> Iterator[None]:
        while self._places.is_busy:
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
        self._places: Places[Need] = Places(plan, needs, self._seat, _row)
        self._made = _Rehearsal([], [], [])

    def run(self) -> _Rehearsal:
        made = self._made
        while not self._places.is_done:
            is_steady = bool(made.stays) and not self._places.is_tail
            step: dict[int, Counts] = {}
            for mb in range(len(self._left)):
                parts = self._places.form(mb)
                if parts is not None:
                    step[mb] = parts
                    self._take(mb, parts)
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
    costs: CostModel,
    needs: Sequence[Need],
    work: Work,
    *,
    prefill_s: float,
    decode_s: float,
    latency_s: float,
    num_steps: int,
    num_simulated: int,
    spans: Sequence[SimulatedSpan] = (),
) -> Prediction:
    plan = costs.plan
    return Prediction(
        load_s=costs.load_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        latency_s=latency_s,
        prompt_tokens=sum(need.prompt for need in needs),
        generated_tokens=sum(need.output for need in needs),
        num_steps=num_steps,
        bound_s=work.bound_s,
        bottleneck=work.bottleneck,
        busy_s=dict(work.seconds),
        link_bytes={name: round(num_bytes) for name, num_bytes in work.num_bytes.items()},
        tier_bytes={tier.value: plan.tier_bytes(tier) for tier in Tier if plan.tier_bytes(tier)},
        num_simulated=num_simulated,
        spans=spans,
    )


def _extrapolated(
    plan: Plan,
    needs: Sequence[Need],
    costs: CostModel,
    rehearsal: _Rehearsal,
    effort: Effort,
) -> Prediction:
    thin = _thinned(plan, effort.few, effort.more)
    groups, group_of = _groups(rehearsal, effort.most_groups)
    weights = np.array(rehearsal.weights)
    samples, nearest = _representatives(thin, rehearsal, groups, effort)
    scripts = [_batches(rehearsal.steps[index]) for index in groups]
    works = [step_work(costs, list(script.values())) for script in scripts]
    bounds = np.array([work.bound_s for work in works])
    total = Work()
    for group, work in enumerate(works):
        total.add_all(work, float(weights[group_of == group].sum()))
    steady = [_steady(plan, thin, costs, scripts[sample]) for sample in samples]
    ratios = np.array([one.seconds for one in steady]) / bounds[samples]
    ratios = np.maximum(ratios, 1.0)  # the layers played may stream less than those they stand for
    per_group = bounds * ratios[nearest]
    took = per_group[group_of]
    prefills = np.array([any(not p.decodes.all() for p in s.values()) for s in rehearsal.steps])
    ends = np.concatenate([[0.0], np.cumsum(took)])
    stays = [ends[last + 1] - ends[first] for first, last in rehearsal.stays]
    return _prediction(
        costs,
        needs,
        total,
        prefill_s=float((took * weights)[prefills].sum()),
        decode_s=float((took * weights)[~prefills].sum()),
        latency_s=float(np.mean(stays)),
        num_steps=round(weights.sum()),
        num_simulated=sum(one.num_ops for one in steady),
    )


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
    thin: Sequence[Plan], rehearsal: _Rehearsal, groups: IntArray, effort: Effort
) -> tuple[list[int], IntArray]:
    """Groups unlike each other, and for every group the one among them that is most like it."""
    features = np.array([_features(rehearsal.steps[index]) for index in groups])
    num_ops = sum(_count_ops(plan, rehearsal) for plan in thin)
    per_step = max(1.0, 2 * num_ops / sum(rehearsal.weights))
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
    """What one step adds in the steady state, and the ops that were played to know."""

    seconds: float
    num_ops: int


def _steady(
    plan: Plan, thin: tuple[Plan, Plan], costs: CostModel, step: Mapping[int, MicroBatch]
) -> _Steady:
    """One more step like those before it, of all layers."""
    few, more = (_again(one, costs, step) for one in thin)
    num_few, num_more = map(_num_decoders, thin)
    if num_more == num_few:
        return more
    factor = (_num_decoders(plan) - num_more) / (num_more - num_few)
    seconds = more.seconds + factor * (more.seconds - few.seconds)
    return _Steady(seconds, few.num_ops + more.num_ops)


def _again(plan: Plan, costs: CostModel, step: Mapping[int, MicroBatch]) -> _Steady:
    """What the second of two equal steps takes."""
    script = _Script(step)
    made = simulate(
        schedule(plan, script.steps),
        CostModel(plan, costs.profile, costs.emulation, averaged=True),
        slowdown=costs.profile.slowdown,
        hop_s=costs.profile.overhead("hop"),
        on_commit=script.commit,
    )
    return _Steady(script.ends_s[1] - script.ends_s[0], sum(made.num_ops.values()))


def _batches(step: Mapping[int, Counts]) -> dict[int, MicroBatch]:
    return {
        mb: MicroBatch(mb, tuple(map(partial(_row, mb), parts.parts))) for mb, parts in step.items()
    }


class _Script:
    """The same step twice."""

    def __init__(self, step: Mapping[int, MicroBatch]) -> None:
        self.ends_s = [0.0, 0.0]
        # equal, but not the same: what is known of a micro-batch is kept per object
        self._batches = [step, {mb: MicroBatch(mb, batch.rows) for mb, batch in step.items()}]
        self._in_flight: dict[int, int] = {}

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        if index >= len(self._batches) and not self._in_flight:
            return None
        return self._step(index)

    def commit(self, batch: MicroBatch, now_s: float) -> None:
        self.ends_s[self._in_flight.pop(batch.index)] = now_s

    def _step(self, index: int) -> Iterator[MicroBatch | None]:
        for mb in self._batches[0]:
            while mb in self._in_flight:
                yield None
            if index < len(self._batches):
                self._in_flight[mb] = index
                yield self._batches[index][mb]


def _num_decoders(plan: Plan) -> int:
    return len({layer.layer for layer in plan.layers if layer.layer is not None})


def _thinned(plan: Plan, few: int, more: int) -> tuple[Plan, Plan]:
    """The plan with so many decoder layers, next to each other, and with some more behind them:
    those whose homes are most like those of all, since they stand for the rest."""
    decoders = _num_decoders(plan)
    if decoders <= more:
        return plan, plan
    streamed = np.zeros((decoders, 2))
    for layer in plan.layers:
        if layer.layer is not None:
            streamed[layer.layer] += layer.streamed.pack_bytes, layer.streamed.read_bytes
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(streamed, 0)])
    added = sums[more:] - sums[few : few + len(sums) - more]
    first = int(np.abs(added - (more - few) * streamed.mean(0)).sum(1).argmin())
    return _some(plan, first, few), _some(plan, first, more)


def _some(plan: Plan, first: int, count: int) -> Plan:
    kept = [
        layer
        for layer in plan.layers
        if layer.layer is None or first <= layer.layer < first + count
    ]
    return replace(plan, layers=tuple(_moved(layer, i) for i, layer in enumerate(kept)))


def _moved(layer: LayerPlan, position: int) -> LayerPlan:
    return replace(layer, position=position)
