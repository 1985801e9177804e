"""The shape of the blocks: micro-batches, places for rows, room for their KV cache and hidden.

Requests are taken longest first, so the first rows are the largest that will ever run: whoever
takes a finished row's place needs at most as much. A micro-batch's places all have room for the
longest of its first rows; that room, times the places, is what the KV cache costs. Several blocks
in flight are as many more micro-batches, dealt to the blocks in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flexpipe.plan.layout import round_up
from flexpipe.plan.placement import deal_places
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier

KV_PAGE = 16 * 1024  # bytes; the unit in which a row's KV cache is written to disk
# A gap between rows that is cheaper to read than to skip, several reads in flight as they are: 256
# short rows came 1.5 times as fast as with every gap skipped, long rows no slower.
_READ_OVER_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Need:
    """Tokens one request may come to: its prompt and the most it may generate."""

    prompt: int
    output: int

    @property
    def total(self) -> int:
        return self.prompt + self.output


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchPlan:
    """One micro-batch: a place per row, each place's KV home, the hidden's home.

    `region_tokens` is the room of each place, `max_new_tokens` the most new tokens in one step.
    """

    index: int
    region_tokens: int
    max_new_tokens: int
    kv_homes: tuple[Tier, ...]
    hidden_home: Tier

    @property
    def num_places(self) -> int:
        return len(self.kv_homes)

    def places(self, tier: Tier) -> tuple[int, ...]:
        """Places whose KV cache rests on `tier`, ascending."""
        return tuple(place for place, home in enumerate(self.kv_homes) if home == tier)

    def num_places_on(self, tier: Tier) -> int:
        """How many of them there are."""
        return self.kv_homes.count(tier)

    def region_bytes(self, tier: Tier, token_bytes: int) -> int:
        """Bytes of one place in one layer; whole pages on disk."""
        num_bytes = self.region_tokens * token_bytes
        return round_up(num_bytes, KV_PAGE) if tier == Tier.DISK else num_bytes


def longest_first(needs: Sequence[Need]) -> list[int]:
    """Order in which requests take places: by the room they need, then by their prompt."""
    return sorted(range(len(needs)), key=lambda i: (-needs[i].total, -needs[i].prompt, i))


@dataclass(frozen=True, slots=True)
class Queue:
    """All requests, in the order they take places, the longest prompt among them, and whether they
    are all alike."""

    needs: tuple[Need, ...]
    longest_prompt: int
    is_even: bool

    @classmethod
    def of(cls, needs: Sequence[Need]) -> Queue:
        ordered = tuple(needs[index] for index in longest_first(needs))
        return cls(ordered, max(need.prompt for need in needs), len(set(needs)) == 1)


def block_shape(
    policy: Policy,
    queue: Queue,
    *,
    token_bytes: int,
    hidden_bytes: int,
    num_blocks: int = 1,
) -> tuple[MicroBatchPlan, ...]:
    """The micro-batches of all blocks in flight for these requests.

    `token_bytes` is what a token's keys and values take in one layer, `hidden_bytes` its hidden.
    """
    num_places = _num_places(policy) * num_blocks
    first = queue.needs[:num_places]
    size = policy.micro_batch_size
    groups = [first[start : start + size] for start in range(0, len(first), size)]
    regions = [max(need.total for need in group) for group in groups]
    tokens = [
        min(policy.max_batch_tokens, max(len(group) * queue.longest_prompt, len(group)))
        for group in groups
    ]
    kv_sizes = [
        region * token_bytes for region, group in zip(regions, groups, strict=True) for _ in group
    ]
    kv_homes = iter(deal_places("kv_cache", "row", policy.kv_cache, kv_sizes))
    hidden_homes = deal_places(
        "hidden", "micro-batch", policy.hidden, [num * hidden_bytes for num in tokens]
    )
    return tuple(
        MicroBatchPlan(
            index=index,
            region_tokens=regions[index],
            max_new_tokens=tokens[index],
            kv_homes=tuple(next(kv_homes) for _ in group),
            hidden_home=hidden_homes[index],
        )
        for index, group in enumerate(groups)
    )


def block_ranges(num_micro_batches: int, num_blocks: int) -> tuple[range, ...]:
    """The micro-batches of each block; where there are few, the first blocks have one more."""
    size, more = divmod(num_micro_batches, num_blocks)
    starts = [block * size + min(block, more) for block in range(num_blocks + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def page_extents(
    ranks: Sequence[int], num_bytes: Sequence[int], stride: int
) -> Iterator[tuple[int, int]]:
    """(first row, bytes) of the reads that cover every row's whole pages.

    Row i holds `num_bytes[i]`, in whole pages, at rank `ranks[i]` of regions `stride` bytes apart.
    """
    first, end = -1, 0
    for index, (rank, size) in enumerate(zip(ranks, num_bytes, strict=True)):
        if not size:
            continue
        start = rank * stride
        if first >= 0 and start - end <= _READ_OVER_BYTES:
            end = start + size
            continue
        if first >= 0:
            yield first, end - ranks[first] * stride
        first, end = index, start + size
    if first >= 0:
        yield first, end - ranks[first] * stride


def _num_places(policy: Policy) -> int:
    return policy.micro_batch_size * policy.num_micro_batches
