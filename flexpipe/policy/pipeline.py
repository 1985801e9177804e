"""Finds a pipeline: where the model is cut, and a policy for each stage.

What passes from stage to stage is a micro-batch, so the block's shape is common to all; where
weights, KV cache and hidden rest, where rows attend and what resident weights are held in is each
stage's own. A pipeline is as fast as its slowest stage: of every shape each stage takes the choice
that its own estimate finds quickest, shapes are compared by the slowest of these, and the best are
played, all ranks together.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf

from flexpipe.errors import PlanError, PolicyError
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Plan
from flexpipe.plan.planner import Planner
from flexpipe.policy.choices import Choice, Choices
from flexpipe.policy.partition import Cut, cut_with, simple_cut
from flexpipe.policy.predict import COARSE, QUICK, Assignment, Prediction, predict_stages
from flexpipe.policy.room import SHAPE, pipeline_by_rule
from flexpipe.policy.search import MOST_REPLAYS, OPTIMISM, OTHER_TOKENS, Limits, best_plan
from flexpipe.policy.shares import realize
from flexpipe.policy.site import Knobs, Model, Site, first_like
from flexpipe.policy.stage_times import StageTimes, balanced_by

Shape = tuple[int, ...]

log = logging.getLogger("flexpipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPipeline:
    """A plan per rank, and what all of them together are predicted to come to."""

    plans: tuple[Plan, ...]
    prediction: Prediction

    @property
    def run_s(self) -> float:
        return self.prediction.run_s


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundPipeline:
    """The best pipeline, None where none fits; others that were played, best first; those that fit
    but break a limit, and how."""

    best: ScoredPipeline | None
    others: Sequence[ScoredPipeline]
    refused: Sequence[tuple[ScoredPipeline, str]]
    num_choices: int


def search_pipeline(
    model: Model,
    sites: Sequence[Site],
    arrangement: Arrangement,
    limits: Limits | None = None,
    *,
    coarse: bool = False,
) -> FoundPipeline:
    """The fastest pipeline over the ranks' sites that keeps what is given for each; a `coarse`
    search looks at fewer shapes, and plays the two most promising ones."""
    return _Search(model, sites, arrangement, limits or Limits(), coarse).run()


def best_pipeline(
    model: Model, sites: Sequence[Site], arrangement: Arrangement
) -> tuple[Plan, ...]:
    """The plans that a job takes: the search's. Where rates are not known, or too few of them, or
    where it finds nothing that fits, the rule's, whose shortfalls then say what is missing."""
    if arrangement.num_stages == 1:
        return (_whole_plan(model, sites[0], arrangement),)
    if all(site.machine is not None for site in sites):
        try:
            best = search_pipeline(model, sites, arrangement).best
        except PolicyError as error:
            log.info("no search for a pipeline: %s", error)
        except PlanError:
            pass  # the rule's plans tell by how much
        else:
            if best is not None:
                return best.plans
    return pipeline_by_rule(model, sites, arrangement)


def _whole_plan(model: Model, site: Site, arrangement: Arrangement) -> Plan:
    """The plan of a model in one stage."""
    pipeline = Pipeline.whole(model.num_layers, num_blocks=arrangement.num_blocks_in_flight)
    planner = model.make_planner(pipeline, 0, site.budgets)
    return best_plan(site.given, planner, model.needs, site.device_tier, site.machine)


@dataclass(frozen=True, slots=True)
class _Whole:
    """One choice per stage, all of one shape, and the estimated seconds of the slowest."""

    choices: tuple[Choice, ...]
    seconds: float


class _Stages:
    """The planner and the choices of every rank under one cut; ranks alike share them."""

    def __init__(self, pipeline: Pipeline, made: Sequence[tuple[Planner, Choices]]) -> None:
        self.planners = [planner for planner, _ in made]
        self.choices = [choices for _, choices in made]
        # the slowest stage's seconds are a round's only if no rank waits for a block to come round
        self._waiting = max(1.0, pipeline.num_stages / pipeline.num_blocks)
        # the last rank, which has the head, is likely to be the slowest
        self._kinds = [_Kind(one) for one in dict.fromkeys(reversed(self.choices))]
        self._kind_of = [
            next(kind for kind in self._kinds if kind.choices is one) for one in self.choices
        ]

    @property
    def shapes(self) -> Collection[Shape]:
        return self._kinds[0].shapes

    def wholes(self, shapes: Iterable[Shape]) -> Iterator[_Whole]:
        """Those of the shapes that may fit every rank, quickest first. A rank's estimate for a
        shape is made when no other shape can be quicker by what is known of it."""
        waiting = [(self._seconds(shape, 1), shape, 1) for shape in shapes]
        heapify(waiting)
        while waiting and waiting[0][0] < inf:
            _, shape, known = heappop(waiting)
            if known < len(self._kinds):
                heappush(waiting, (self._seconds(shape, known + 1), shape, known + 1))
            else:
                choices = [kind.quickest(shape) for kind in self._kind_of]
                yield self._whole([choice for choice in choices if choice is not None])

    def with_tokens(self, whole: _Whole, tokens: int) -> list[_Whole]:
        """The same with other chunks of prompts, where that fits."""
        found = []
        for choices, choice in zip(self.choices, whole.choices, strict=True):
            most = max(tokens, choice.knobs["micro_batch_size"])
            found.append(choices.estimated([{**choice.knobs, "max_batch_tokens": most}]))
        return [self._whole([one[0] for one in found])] if all(found) else []

    def _seconds(self, shape: Shape, known: int) -> float:
        """Of the slowest of the first few unlike ranks, infinite where one has no choice."""
        found = [kind.quickest(shape) for kind in self._kinds[:known]]
        return max(inf if choice is None else choice.solution.seconds for choice in found)

    def _whole(self, choices: Sequence[Choice]) -> _Whole:
        seconds = self._waiting * max(choice.solution.seconds for choice in choices)
        return _Whole(tuple(choices), seconds)


class _Kind:
    """Ranks alike: of every shape the choice that is quickest by estimate, None where none fits."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.shapes: dict[Shape, list[Knobs]] = {}
        for knobs in choices.knobs():
            self.shapes.setdefault(_shape_of(knobs), []).append(knobs)
        self._quickest: dict[Shape, Choice | None] = {}

    def quickest(self, shape: Shape) -> Choice | None:
        if shape not in self._quickest:
            found = self.choices.estimated(self.shapes.get(shape, ()))
            self._quickest[shape] = next(iter(found), None)
        return self._quickest[shape]


class _Search:
    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        arrangement: Arrangement,
        limits: Limits,
        coarse: bool,
    ) -> None:
        self._model = model
        self._sites = sites
        self._arrangement = arrangement
        self._limits = limits
        self._coarse = coarse
        self._effort = COARSE if coarse else QUICK
        self._num_choices = 0
        self._scored: list[ScoredPipeline] = []
        self._refused: list[tuple[ScoredPipeline, str]] = []
        self._kinds = [first_like(sites, site) for site in sites]

    def run(self) -> FoundPipeline:
        failure = None
        try:
            self._search()
        except PlanError as error:
            failure = error
        if not self._scored and not self._refused:
            self._by_rule()
        if failure is not None and not self._scored and not self._refused:
            raise failure
        scored = sorted(self._scored, key=lambda one: one.run_s)
        return FoundPipeline(
            best=scored[0] if scored else None,
            others=scored[1:],
            refused=self._refused,
            num_choices=self._num_choices,
        )

    def _search(self) -> None:
        arrangement, model = self._arrangement, self._model
        stages = self._stages(simple_cut(arrangement, model.num_layers))
        if arrangement.is_searched:
            stages = self._stages(self._balanced(stages))
        shapes = self._near(stages) if self._coarse else stages.shapes
        self._replay(stages, stages.wholes(shapes))
        is_free = not any("max_batch_tokens" in site.given for site in self._sites)
        if self._scored and is_free and not self._coarse:
            quickest = next(stages.wholes(shapes))
            for tokens in OTHER_TOKENS:
                self._replay(stages, stages.with_tokens(quickest, tokens))
        different = {id(choices): choices for choices in stages.choices}
        self._num_choices = sum(choices.num_choices for choices in different.values())

    def _near(self, stages: _Stages) -> Collection[Shape]:
        """Shapes within a factor of two, in size and number of micro-batches, of the quickest of
        every other one."""
        steps = [sorted({shape[axis] for shape in stages.shapes}) for axis in (0, 1)]
        few = [s for s in stages.shapes if s[0] in steps[0][::2] and s[1] in steps[1][::2]]
        quickest = next(stages.wholes(few), None)
        if quickest is None:
            return stages.shapes
        at = _shape_of(quickest.choices[0].knobs)
        return [s for s in stages.shapes if all(at[i] / 2 <= s[i] <= 2 * at[i] for i in (0, 1))]

    def _by_rule(self) -> None:
        """Play what needs no estimate: its blocks may be smaller."""
        plans = pipeline_by_rule(self._model, self._sites, self._arrangement)
        if not any(plan.shortfalls() for plan in plans):
            self._score(plans)

    def _balanced(self, stages: _Stages) -> Cut:
        """The cut by what stages of the shape that an even cut likes best would take."""
        arrangement, model = self._arrangement, self._model
        quickest = next(stages.wholes(stages.shapes), None)
        shape = (
            self._smallest_shape(stages)
            if quickest is None
            else _shape_of(quickest.choices[0].knobs)
        )
        ranks = range(arrangement.num_stages)
        least, most = arrangement.num_chunks, model.num_layers - arrangement.num_chunks * ranks[-1]

        def estimate(rank: int, count: int) -> float:
            cut = cut_with(arrangement, rank, count, model.num_layers)
            choices = self._choices(arrangement.pipeline(cut), rank)
            alike = (knobs for knobs in choices.knobs() if _shape_of(knobs) == shape)
            return next((one.solution.seconds for one in choices.estimated(alike)), inf)

        alike = [(self._kinds[rank], rank == 0, rank == ranks[-1]) for rank in ranks]
        usual = max(least, model.num_layers // arrangement.num_stages)
        times = StageTimes(estimate, alike, least, usual, most)
        return balanced_by(times, model.num_layers, len(ranks), arrangement.num_chunks)

    def _smallest_shape(self, stages: _Stages) -> Shape:
        return min(_shape_of(knobs) for knobs in stages.choices[0].knobs())

    def _stages(self, cut: Cut) -> _Stages:
        pipeline = self._arrangement.pipeline(cut)
        made: dict[object, Choices] = {}
        ranks = []
        for rank, kind in enumerate(self._kinds):
            layers = pipeline.layers[rank :: pipeline.num_stages]
            key = kind, layers, pipeline.embeds(rank), pipeline.has_head(rank)
            if key not in made:
                made[key] = self._choices(pipeline, rank)
            ranks.append((self._planner(pipeline, rank), made[key]))
        return _Stages(pipeline, ranks)

    def _planner(self, pipeline: Pipeline, rank: int) -> Planner:
        return self._model.make_planner(pipeline, rank, self._sites[rank].budgets)

    def _choices(self, pipeline: Pipeline, rank: int) -> Choices:
        site = self._sites[rank]
        assert site.machine is not None
        return Choices(
            site.given,
            self._planner(pipeline, rank),
            self._model.needs,
            site.machine,
            max_latency_s=self._limits.max_latency_s,
            max_disk_writes=self._limits.max_disk_writes,
            coarse=self._coarse,
        )

    def _replay(self, stages: _Stages, wholes: Iterable[_Whole]) -> None:
        """Play the first few shapes, while an estimate can win."""
        left = 2 if self._coarse else MOST_REPLAYS
        for whole in wholes:
            fastest = min((scored.run_s for scored in self._scored), default=inf)
            if whole.seconds > OPTIMISM * fastest:
                return
            left -= self._play(stages, whole)
            if not left:
                return

    def _play(self, stages: _Stages, whole: _Whole) -> bool:
        """Whether this comes to whole tensors that fit on every rank."""
        plans = []
        for site, planner, choice in zip(self._sites, stages.planners, whole.choices, strict=True):
            assert site.machine is not None
            plan = realize(planner, choice.knobs, choice.solution, site.machine.tiers)
            if plan is None:
                return False
            plans.append(plan)
        self._score(tuple(plans))
        return True

    def _score(self, plans: tuple[Plan, ...]) -> None:
        """What the stages come to together, kept or refused."""
        assignments = []
        for site, plan in zip(self._sites, plans, strict=True):
            assert site.machine is not None
            profile, emulation = site.machine.profile, site.machine.emulation
            assignments.append(Assignment(plan=plan, profile=profile, emulation=emulation))
        prediction = predict_stages(assignments, self._model.needs, effort=self._effort)
        scored = ScoredPipeline(plans=plans, prediction=prediction)
        refusal = self._limits.refusal(prediction)
        if refusal is None:
            self._scored.append(scored)
        else:
            self._refused.append((scored, refusal))


def _shape_of(knobs: Knobs) -> Shape:
    return tuple(knobs[name] for name in SHAPE)
