"""A policy for whoever gives none: fill the fastest tier, leave room for a sensible block.

Every knob the user fixed stays; the others are tried in a small, ordered set. Weights that fit
beside the compute device are kept there; otherwise the choice is the one that moves clearly fewer
seconds' worth of bytes per row and step than those before it, with nominal rates for the links.
Large steps come first: they prefill in few passes over the weights. It measures nothing and claims
no optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from flexpipe.errors import PolicyError
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.spelling import spelled
from flexpipe.plan.tier import Tier

ROWS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
BLOCKS = (1, 4)
BATCH_TOKENS = (2048, 512, 128)
CLEARLY = 0.85  # a shape later in that order must cost this much less
SHARE_STEP = 20  # shares are tried in twentieths
_DISK_BYTES_PER_S = 1e9
_HOST_BYTES_PER_S = 12e9

MakePlan = Callable[[Policy], Plan]


@dataclass(frozen=True, slots=True)
class _Choice:
    plan: Plan
    cost_s: float


def choose_plan(given: Mapping[str, Any], make: MakePlan, device_tier: Tier, num_rows: int) -> Plan:
    """The best plan the rule finds that keeps `given`; if none fits, the most modest one.

    `make` resolves a policy into a plan, or raises PolicyError. Layers are only cut in halves where
    nothing fits otherwise: their slots are smaller, and their ops are twice as many.
    """
    plan = _choose(given, make, device_tier, num_rows)
    if not plan.shortfalls() or "separate_layers" in given:
        return plan
    if make(replace(plan.policy, separate_layers=True)).shortfalls():
        return plan
    return _choose({**given, "separate_layers": True}, make, device_tier, num_rows)


def _choose(given: Mapping[str, Any], make: MakePlan, device_tier: Tier, num_rows: int) -> Plan:
    best: _Choice | None = None
    modest: Plan | None = None
    refusal: PolicyError | None = None
    for knobs in _shapes(given, num_rows):
        try:
            plan = _with_weights({**knobs, **given}, make, device_tier)
        except PolicyError as error:
            refusal = refusal or error
            continue
        if plan.shortfalls():
            modest = plan
            continue
        choice = _Choice(plan, _seconds_per_row(plan))
        if choice.cost_s == 0:
            return plan
        if best is None or choice.cost_s < CLEARLY * best.cost_s:
            best = choice
    if best is not None:
        return best.plan
    if modest is None:
        assert refusal is not None
        raise refusal
    return modest


def advice(given: Mapping[str, Any], make: MakePlan, device_tier: Tier, num_rows: int) -> str:
    """The smallest change to `given` that would fit, in the words of the command line."""
    shapes = {"micro_batch_size", "num_micro_batches", "max_batch_tokens"}
    shares = {"weights", "kv_cache", "hidden", "resident_dtype"}
    for freed in (shapes, shares, shapes | shares):
        kept = {name: value for name, value in given.items() if name not in freed}
        if len(kept) == len(given) and freed != shapes | shares:
            continue
        try:
            plan = choose_plan(kept, make, device_tier, num_rows)
        except PolicyError:
            continue
        if not plan.shortfalls():
            halved = plan.policy.separate_layers and "separate_layers" not in given
            named = freed | {"separate_layers"} if halved else freed
            words = spelled(plan.policy.to_dict(), named)
            return f"This would fit: {words}."
    return "Nothing smaller would fit either; raise the budgets, or use a machine with more memory."


def _shapes(given: Mapping[str, Any], num_rows: int) -> Iterator[dict[str, Any]]:
    """Block shapes in order of preference; a given knob is not varied."""
    enough = min((size for size in ROWS if size >= num_rows), default=ROWS[0])
    sizes = [size for size in ROWS if size <= enough]
    divided = "hidden" in given and len(given["hidden"].tiers) > 1  # whole micro-batches are
    blocks = [count for count in BLOCKS if count == 1 or num_rows > sizes[0] or divided]
    for tokens, count, size, kv in product(
        _free(given, "max_batch_tokens", BATCH_TOKENS),
        _free(given, "num_micro_batches", blocks),
        _free(given, "micro_batch_size", sizes),
        _free(given, "kv_cache", (0, 1, 2)),
    ):
        shape: dict[str, Any] = {"max_batch_tokens": tokens, "num_micro_batches": count}
        limit = given["max_batch_tokens"] if tokens is None else tokens
        shape["micro_batch_size"] = None if size is None else min(size, limit)
        shape["kv_cache"] = kv
        yield {name: value for name, value in shape.items() if value is not None}


def _free(given: Mapping[str, Any], name: str, values: Any) -> tuple[Any, ...]:
    return (None,) if name in given else tuple(values)


def _with_weights(knobs: dict[str, Any], make: MakePlan, device_tier: Tier) -> Plan:
    """The plan for these knobs with as many weights as fit on the fastest tiers."""
    tiers = list(Tier)[list(Tier).index(device_tier) :]
    if isinstance(knobs.get("kv_cache"), int):
        index = knobs["kv_cache"]
        if index >= len(tiers):
            raise PolicyError("there is no slower tier for the KV cache")
        knobs["kv_cache"] = _all_on(tiers[index])
    knobs.setdefault("hidden", _all_on(device_tier))
    if "weights" in knobs:
        return make(Policy(**knobs))
    plan = make(Policy(**knobs, weights=_all_on(device_tier)))
    if not plan.shortfalls():
        return plan
    if "resident_dtype" not in knobs:
        smaller = make(Policy(**knobs, weights=_all_on(device_tier), resident_dtype="checkpoint"))
        if not smaller.shortfalls():
            return smaller
    return _spread(knobs, make, tiers)


def _spread(knobs: dict[str, Any], make: MakePlan, tiers: list[Tier]) -> Plan:
    """Most weights on the fastest tier that fits, then on the next; the rest on the slowest."""
    counts = dict.fromkeys(Tier, 0)
    left = SHARE_STEP
    plan = make(Policy(**knobs, weights=_all_on(tiers[-1])))
    for index, tier in enumerate(tiers[:-1]):
        low, high = 0, left
        while low < high:
            middle = (low + high + 1) // 2
            tried = _try(knobs, make, {**counts, tier: middle}, tiers[-1])
            # what goes on the tiers before changes with this one by some alignment
            if tried is not None and not tried.shortfalls().keys() & set(tiers[: index + 1]):
                low = middle
                if not tried.shortfalls() or plan.shortfalls():
                    plan = tried
            else:
                high = middle - 1
        counts[tier], left = low, left - low
    return plan


def _try(
    knobs: dict[str, Any], make: MakePlan, counts: Mapping[Tier, int], slowest: Tier
) -> Plan | None:
    """A plan with so many twentieths per tier and the rest on `slowest`; None if no tensor fits."""
    given = {tier: counts.get(tier, 0) / SHARE_STEP for tier in Tier}
    given[slowest] = 1 - sum(share for tier, share in given.items() if tier != slowest)
    shares = Shares(gpu=given[Tier.GPU], cpu=given[Tier.CPU], disk=max(0.0, given[Tier.DISK]))
    try:
        return make(Policy(**knobs, weights=shares))
    except PolicyError:
        return None


def _seconds_per_row(plan: Plan) -> float:
    """Nominal seconds that one step's moves take, per row of the block."""
    disk = sum(layer.streamed.read_bytes for layer in plan.layers)
    host = sum(layer.streamed.num_bytes for layer in plan.layers) if plan.streams_to_device else 0
    for mb in plan.micro_batches:
        room = mb.region_tokens * plan.token_bytes * plan.num_decoder_layers
        disk += len(mb.places(Tier.DISK)) * room
        if plan.streams_to_device:
            host += len(plan.slot_places(mb)) * room
    rows = sum(mb.num_places for mb in plan.micro_batches)
    return (disk / _DISK_BYTES_PER_S + host / _HOST_BYTES_PER_S) / rows


def _all_on(tier: Tier) -> Shares:
    return Shares(**{tier.value: 1.0})
