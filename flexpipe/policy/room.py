"""How many layers machines can hold, and so how many of them a model needs: bytes, not rates.

A rank can hold so many layers if the smallest block that the given knobs allow fits beside them.
The embedding weighs on the first rank and the head on the last, a tied table on both; each block in
flight has its own rows. What a rank can hold is found by halving: whoever can hold some layers is
taken to hold fewer too. Decoder layers are taken to be alike.

More stages need not help: each adds a block in flight, whose KV cache the ends have to hold beside
embedding or head. So numbers of stages are tried one by one, none is inferred from another; what a
rank could hold among one stage less is only where the search for what it can hold begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexpipe.errors import PolicyError
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.plan import Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.rule import BATCH_TOKENS, BLOCKS, ROWS, choose_plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.partition import Cut, cut_with, most_even, simple_cut
from flexpipe.policy.shares import all_on
from flexpipe.policy.site import Knobs, Model, Site, first_like

SHAPE = ("micro_batch_size", "num_micro_batches", "max_batch_tokens")  # the same for all stages
_KINDS = ("weights", "kv_cache", "hidden")
_Kind = tuple[int, bool, bool]  # ranks of one kind can hold as many layers


def pipeline_by_rule(
    model: Model, sites: Sequence[Site], arrangement: Arrangement
) -> tuple[Plan, ...]:
    """The plans that need no rate: of an even cut, or where that does not fit and the cut is free,
    of the most even one that does."""
    plans = _by_rule(model, sites, arrangement, simple_cut(arrangement, model.num_layers))
    if _fit(plans) or not arrangement.is_searched:
        return plans
    cut = Room(model, sites, arrangement).cut()
    return plans if cut is None else _by_rule(model, sites, arrangement, cut)


def _by_rule(
    model: Model, sites: Sequence[Site], arrangement: Arrangement, cut: Cut
) -> tuple[Plan, ...]:
    """Each stage's own plan, then in the shape of the smallest block; where that does not fit, in
    the smallest shape there is."""
    pipeline = arrangement.pipeline(cut)
    num_rows = _rows_per_block(model, arrangement)
    planners = [model.make_planner(pipeline, rank, site.budgets) for rank, site in enumerate(sites)]

    def plans(common: Knobs) -> tuple[Plan, ...]:
        return tuple(
            choose_plan({**common, **site.given}, planner, site.device_tier, num_rows)
            for site, planner in zip(sites, planners, strict=True)
        )

    policies = [plan.policy for plan in plans({})]
    smallest = min(policies, key=lambda one: one.micro_batch_size * one.num_micro_batches)
    tokens = min(policy.max_batch_tokens for policy in policies)
    shape = {name: getattr(smallest, name) for name in SHAPE}
    made = plans({**shape, "max_batch_tokens": max(tokens, smallest.micro_batch_size)})
    least = _smallest_shape(sites[0].given)
    return made if _fit(made) or least is None else plans(least)


def _fit(plans: Sequence[Plan]) -> bool:
    return not any(plan.shortfalls() for plan in plans)


def _rows_per_block(model: Model, arrangement: Arrangement) -> int:
    return -(-len(model.needs) // arrangement.num_blocks_in_flight)


def _smallest_shape(given: Knobs) -> dict[str, int] | None:
    """Of a block; None where shares are given that too few rows cannot meet."""
    if any(name in given and len(given[name].tiers) > 1 for name in ("kv_cache", "hidden")):
        return None
    size = given.get("micro_batch_size", ROWS[-1])
    values = size, BLOCKS[0], max(BATCH_TOKENS[-1], size)
    return dict(zip(SHAPE, values, strict=True))


def plan_on(tiers: Sequence[Tier], given: Knobs, planner: Planner, num_rows: int) -> Plan | None:
    """A plan that fits and rests nothing elsewhere, by the rule; None where it finds none. The
    first of the tiers is the device's."""
    asked = dict(given)
    if len(tiers) == 1:
        for kind in _KINDS:
            asked.setdefault(kind, all_on(tiers[0]))
    try:
        plan = choose_plan(asked, planner, tiers[0], num_rows)
    except PolicyError:
        return None
    used = {tier for kind in _KINDS for tier in getattr(plan.policy, kind).tiers}
    return None if plan.shortfalls() or not used <= set(tiers) else plan


def least_stages(model: Model, site: Site, tiers: Sequence[Tier] | None = None) -> int | None:
    """The smallest number of stages, each on such a machine, that hold the model, on `tiers` alone
    if they are named; None where no number does. Weights that no share is given for are divided
    among tiers in twentieths, as the rule does."""
    guesses: dict[_Kind, int] = {}
    for num_stages in range(1, model.num_layers + 1):
        arrangement = Arrangement(num_stages=num_stages)
        room = Room(model, [site] * num_stages, arrangement, tiers, guesses)
        if room.cut() is not None:
            return num_stages
    return None


class Room:
    """What the ranks of a pipeline can hold, on `tiers` alone if they are named.

    `guesses` are where the search for it begins; what it finds goes there too.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        arrangement: Arrangement,
        tiers: Sequence[Tier] | None = None,
        guesses: dict[_Kind, int] | None = None,
    ) -> None:
        self._model = model
        self._sites = sites
        self._arrangement = arrangement
        self._tiers = tiers
        self._guesses = {} if guesses is None else guesses
        self._known: dict[tuple[_Kind, int], bool] = {}
        last = arrangement.num_stages - 1
        self._kinds = [
            (first_like(sites, site), rank == 0, rank == last) for rank, site in enumerate(sites)
        ]

    def cut(self) -> Cut | None:
        """The most even cut of which every rank can hold its part; None where there is none."""
        if self._arrangement.num_stages == 1:
            return (self._model.num_layers,) if self._holds(0, self._model.num_layers) else None
        rooms: dict[_Kind, int] = {}
        for rank, kind in enumerate(self._kinds):
            if kind not in rooms:
                rooms[kind] = self._most(rank)
            if rooms[kind] < self._arrangement.num_chunks:
                return None
        num_stages, num_chunks = self._arrangement.num_stages, self._arrangement.num_chunks
        cut = most_even(self._model.num_layers, [rooms[kind] for kind in self._kinds], num_chunks)
        parts = [] if cut is None else [sum(cut[rank::num_stages]) for rank in range(num_stages)]
        return cut if all(self._holds(rank, count) for rank, count in enumerate(parts)) else None

    def _most(self, rank: int) -> int:
        """The most layers that the rank can hold, others having some too; 0 where it can hold
        none. Steps away from a guess double, then what lies between is halved."""
        num_layers, arrangement = self._model.num_layers, self._arrangement
        num_stages, num_chunks = arrangement.num_stages, arrangement.num_chunks
        fits, fails = num_chunks - 1, num_layers - num_chunks * (num_stages - 1) + 1
        # a share that is given may be too small for the tensors of few layers
        usual = num_layers // num_stages if "weights" in self._sites[rank].given else num_chunks
        guess = self._guesses.get(self._kinds[rank]) or usual
        tried, step = min(max(guess, fits + 1), fails - 1), 1
        while fits + 1 < fails:
            if not fits < tried < fails:
                tried = (fits + fails) // 2
            if self._holds(rank, tried):
                fits, tried = tried, tried + step
            else:
                fails, tried = tried, tried - step
            step *= 2
        self._guesses[self._kinds[rank]] = fits
        return fits

    def _holds(self, rank: int, count: int) -> bool:
        """Whether the smallest block fits beside so many layers."""
        key = self._kinds[rank], count
        if key not in self._known:
            cut = cut_with(self._arrangement, rank, count, self._model.num_layers)
            site, pipeline = self._sites[rank], self._arrangement.pipeline(cut)
            planner = self._model.make_planner(pipeline, rank, site.budgets)
            self._known[key] = self._fits_somehow(site, planner)
        return self._known[key]

    def _fits_somehow(self, site: Site, planner: Planner) -> bool:
        """With all of the KV cache on one tier or another, where it is not given."""
        tiers = self._tiers or tuple(Tier)[tuple(Tier).index(site.device_tier) :]
        shape = _smallest_shape(site.given) or {}
        num_rows = _rows_per_block(self._model, self._arrangement)
        return any(
            plan_on(tiers, {**shape, "kv_cache": all_on(tier), **site.given}, planner, num_rows)
            for tier in (tiers if "kv_cache" not in site.given else tiers[:1])
        )
