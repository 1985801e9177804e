"""What a job will take on a machine: its steps, played by the simulator.

A job's steps follow from its requests (`flexpipe.schedule.places`), its ops from its steps, their
costs from the machine. Short jobs are simulated whole. Of long ones the steps are counted with
every so manieth request, a few steps unlike each other stand for all, and each is simulated with
few layers: twice in a row, with two numbers of layers, so that what a step and what a layer adds
in the steady state are differences. Requests are taken to generate all the tokens they may.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from flexpipe.plan.block import Need, longest_first
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.layer import LayerPlan
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.profile import Profile
from flexpipe.schedule.build import schedule
from flexpipe.schedule.places import Counts, IntArray, Part, Places, phases
from flexpipe.schedule.simulate import Simulated, SimulatedSpan, simulate
from flexpipe.schedule.step import MicroBatch, Row

EXACT_OPS = 20_000  # a job of so many is simulated whole
SAMPLED_OPS = 20_000  # of the steps that stand for a longer one
MOST_SAMPLES = 12
FULL_BLOCKS = 4  # a job of more blocks than this is counted with every so manieth request
FEW_LAYERS = (4, 12)  # beside the other kinds of layer


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
    lane_busy_s: Mapping[str, float]
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
    def generated_tokens_per_s(self) -> float:
        """All generated tokens over prefill and decode, as reports count it."""
        return self.generated_tokens / self.run_s if self.run_s else 0.0


def predict(
    plan: Plan,
    needs: Sequence[Need],
    profile: Profile,
    emulation: Emulation | None = None,
    *,
    exact_ops: int = EXACT_OPS,
    keep_spans: bool = False,
) -> Prediction:
    """Play `needs` under `plan`; jobs of more than `exact_ops` ops are extrapolated."""
    costs = CostModel(plan, profile, emulation)
    rehearsal = _Rehearsal.of(plan, needs)
    num_ops = _count_ops(plan, rehearsal)
    if num_ops <= exact_ops:
        return _whole(plan, needs, costs, keep_spans)
    return _extrapolated(plan, needs, costs, rehearsal)


def _whole(plan: Plan, needs: Sequence[Need], costs: CostModel, keep_spans: bool) -> Prediction:
    player = _Player(plan, needs)
    made = simulate(
        schedule(plan, player.places.steps),
        costs,
        slowdown=costs.profile.slowdown,
        hop_s=costs.profile.overhead("hop"),
        on_commit=player.commit,
        keep_spans=keep_spans,
    )
    took = phases(player.places.counts, 0.0)
    return _prediction(
        costs,
        needs,
        _Totals.of(made),
        prefill_s=took.prefill_s,
        decode_s=took.decode_s,
        latency_s=float(np.mean(player.latencies_s)),
        num_steps=len(player.places.counts),
        spans=made.spans,
    )


class _Player:
    """Answers a simulation as the job would."""

    def __init__(self, plan: Plan, needs: Sequence[Need]) -> None:
        queue = (needs[index] for index in longest_first(needs))
        self.places: Places[Need] = Places(plan, queue, self._seat, _row)
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
        order = longest_first(needs)[::every]
        made = _Rehearse(plan, [needs[index] for index in order]).run()
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


@dataclass(slots=True)
class _Totals:
    """What adds up over steps and layers; where a lane has a link's name, all the link's work is
    the lane's."""

    work_s: dict[str, float]
    busy_s: dict[str, float]
    link_bytes: dict[str, float]
    num_ops: int = 0

    @classmethod
    def of(cls, made: Simulated) -> _Totals:
        return cls(
            {**made.link_work_s, **{lane.value: took for lane, took in made.work_s.items()}},
            {lane.value: seconds for lane, seconds in made.busy_s.items()},
            dict(made.link_bytes),
            sum(made.num_ops.values()),
        )

    @classmethod
    def none(cls) -> _Totals:
        return cls(defaultdict(float), defaultdict(float), defaultdict(float))

    def add(self, other: _Totals, factor: float) -> None:
        for mine, theirs in (
            (self.work_s, other.work_s),
            (self.busy_s, other.busy_s),
            (self.link_bytes, other.link_bytes),
        ):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + factor * value


def _prediction(
    costs: CostModel,
    needs: Sequence[Need],
    totals: _Totals,
    *,
    prefill_s: float,
    decode_s: float,
    latency_s: float,
    num_steps: int,
    spans: Sequence[SimulatedSpan] = (),
) -> Prediction:
    plan = costs.plan
    bottleneck = max(totals.work_s, key=lambda name: totals.work_s[name])
    return Prediction(
        load_s=costs.load_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        latency_s=latency_s,
        prompt_tokens=sum(need.prompt for need in needs),
        generated_tokens=sum(need.output for need in needs),
        num_steps=num_steps,
        bound_s=totals.work_s[bottleneck],
        bottleneck=bottleneck,
        lane_busy_s=totals.busy_s,
        link_bytes={name: round(num_bytes) for name, num_bytes in totals.link_bytes.items()},
        tier_bytes={tier.value: plan.tier_bytes(tier) for tier in Tier if plan.tier_bytes(tier)},
        num_simulated=totals.num_ops,
        spans=spans,
    )


def _extrapolated(
    plan: Plan, needs: Sequence[Need], costs: CostModel, rehearsal: _Rehearsal
) -> Prediction:
    samples, nearest = _representatives(plan, rehearsal)
    played = [_steady(plan, costs, rehearsal.steps[index]) for index in samples]
    totals = _Totals.none()
    totals.num_ops = sum(one.totals.num_ops for one in played)
    took = np.array([played[which].seconds for which in nearest])
    weights = np.array(rehearsal.weights)
    for which, one in enumerate(played):
        totals.add(one.totals, float(weights[nearest == which].sum()))
    prefills = np.array([any(not p.decodes.all() for p in s.values()) for s in rehearsal.steps])
    ends = np.concatenate([[0.0], np.cumsum(took)])
    stays = [ends[last + 1] - ends[first] for first, last in rehearsal.stays]
    return _prediction(
        costs,
        needs,
        totals,
        prefill_s=float((took * weights)[prefills].sum()),
        decode_s=float((took * weights)[~prefills].sum()),
        latency_s=float(np.mean(stays)),
        num_steps=round(weights.sum()),
    )


def _representatives(plan: Plan, rehearsal: _Rehearsal) -> tuple[list[int], IntArray]:
    """Steps unlike each other, and for every step the one among them that is most like it."""
    features = np.array([_features(step) for step in rehearsal.steps])
    num_ops = _count_ops(_thinned(plan, sum(FEW_LAYERS)), rehearsal)
    per_step = max(1.0, 2 * num_ops / sum(rehearsal.weights))
    count = int(np.clip(SAMPLED_OPS / per_step, 3, MOST_SAMPLES))
    chosen = [int(np.argmax(rehearsal.weights))]
    distance = _distances(features, chosen[0])
    while len(chosen) < min(count, len(features)) and distance.max() > 0.02:
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


@dataclass(frozen=True, slots=True)
class _Steady:
    """What one step adds in the steady state."""

    seconds: float
    totals: _Totals


def _steady(plan: Plan, costs: CostModel, step: Mapping[int, Counts]) -> _Steady:
    """One more step like those before it, of all layers."""
    few, more = (_again(_thinned(plan, count), costs, step) for count in FEW_LAYERS)
    num_few, num_more = (_num_decoders(_thinned(plan, count)) for count in FEW_LAYERS)
    if num_more == num_few:
        return more
    factor = (_num_decoders(plan) - num_more) / (num_more - num_few)
    totals = _Totals.none()
    totals.num_ops = few.totals.num_ops + more.totals.num_ops
    totals.add(more.totals, 1 + factor)
    totals.add(few.totals, -factor)
    return _Steady(more.seconds + factor * (more.seconds - few.seconds), totals)


def _again(plan: Plan, costs: CostModel, step: Mapping[int, Counts]) -> _Steady:
    """What the second of two equal steps takes."""
    script = _Script(plan, step)
    mine = CostModel(plan, costs.profile, costs.emulation, averaged=True)
    made = simulate(
        schedule(plan, script.steps),
        mine,
        slowdown=costs.profile.slowdown,
        hop_s=costs.profile.overhead("hop"),
        on_commit=script.commit,
    )
    totals = _Totals.none()
    totals.add(_Totals.of(made), 0.5)
    totals.num_ops = sum(made.num_ops.values())
    return _Steady(script.ends_s[1] - script.ends_s[0], totals)


class _Script:
    """The same step twice."""

    def __init__(self, plan: Plan, step: Mapping[int, Counts]) -> None:
        self.ends_s = [0.0, 0.0]
        self._batches = [
            {
                mb: MicroBatch(mb, tuple(map(partial(_row, mb), parts.parts)))
                for mb, parts in step.items()
            }
            for _ in self.ends_s
        ]
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


def _thinned(plan: Plan, count: int) -> Plan:
    """The plan with so many decoder layers, next to each other, whose homes are most like all."""
    decoders = _num_decoders(plan)
    if decoders <= count:
        return plan
    streamed = np.zeros((decoders, 2))
    for layer in plan.layers:
        if layer.layer is not None:
            streamed[layer.layer] += layer.streamed.pack_bytes, layer.streamed.read_bytes
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(streamed, 0)])
    gaps = np.abs(sums[count:] - sums[:-count] - count * streamed.mean(0)).sum(1)
    first = int(gaps.argmin())
    kept = [
        layer
        for layer in plan.layers
        if layer.layer is None or first <= layer.layer < first + count
    ]
    return replace(plan, layers=tuple(_moved(layer, i) for i, layer in enumerate(kept)))


def _moved(layer: LayerPlan, position: int) -> LayerPlan:
    return replace(layer, position=position)
