"""Cuts: the slowest stage is as quick as any cut makes it, memory is kept, hands are believed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PlanError, PolicyError
from flexpipe.policy.partition import Cut, balanced, by_hand, even, most_even
from flexpipe.policy.stage_times import StageTimes, balanced_by

COSTS = st.floats(0.1, 10.0)


def all_cuts(num_layers: int, num_stages: int, least: int = 1) -> Iterator[Cut]:
    for ends in itertools.combinations(range(1, num_layers), num_stages - 1):
        cut = tuple(b - a for a, b in itertools.pairwise((0, *ends, num_layers)))
        if min(cut) >= least:
            yield cut


class Stages:
    """Ranks of unlike speed and room; the first embeds, the last has the head."""

    def __init__(
        self, layer_s: list[float], embed_s: float, head_s: float, rooms: list[int]
    ) -> None:
        self.layer_s, self.embed_s, self.head_s, self.rooms = layer_s, embed_s, head_s, rooms

    def __call__(self, rank: int, count: int) -> float:
        edges = self.embed_s * (rank == 0) + self.head_s * (rank == len(self.layer_s) - 1)
        return count * self.layer_s[rank] + edges if count <= self.rooms[rank] else inf

    def slowest(self, cut: Cut) -> float:
        return max(self(rank, count) for rank, count in enumerate(cut))


@st.composite
def stages(draw: st.DrawFn) -> Stages:
    count = draw(st.integers(1, 4))
    return Stages(
        draw(st.lists(COSTS, min_size=count, max_size=count)),
        draw(COSTS),
        draw(COSTS),
        draw(st.lists(st.integers(1, 12), min_size=count, max_size=count)),
    )


@given(ranks=stages(), num_layers=st.integers(4, 12))
def test_no_cut_has_a_quicker_slowest_stage(ranks, num_layers):
    num_stages = len(ranks.layer_s)
    best = min(map(ranks.slowest, all_cuts(num_layers, num_stages)))
    if best == inf:
        with pytest.raises(PlanError, match=f"no cut of {num_layers} layers into {num_stages}"):
            balanced(num_layers, num_stages, ranks)
        return
    cut = balanced(num_layers, num_stages, ranks)
    assert sum(cut) == num_layers and min(cut) >= 1
    assert ranks.slowest(cut) == best


@given(ranks=stages(), num_layers=st.integers(4, 12))
def test_of_cuts_that_are_as_quick_the_most_balanced_one_is_taken(ranks, num_layers):
    ranks.rooms = [num_layers] * len(ranks.rooms)
    cut = balanced(num_layers, len(ranks.layer_s), ranks)

    def squares(one: Cut) -> float:
        return sum(ranks(rank, count) ** 2 for rank, count in enumerate(one))

    as_quick = [
        one
        for one in all_cuts(num_layers, len(ranks.layer_s))
        if ranks.slowest(one) <= ranks.slowest(cut)
    ]
    assert squares(cut) == pytest.approx(min(map(squares, as_quick)))


@given(num_stages=st.integers(1, 8), num_chunks=st.integers(1, 3), extra=st.integers(0, 60))
@settings(max_examples=30)
def test_stages_alike_are_cut_evenly_the_first_ones_a_layer_longer(num_stages, num_chunks, extra):
    num_layers = num_stages * num_chunks + extra
    cut = even(num_layers, num_stages, num_chunks)
    assert sum(cut) == num_layers and max(cut) - min(cut) <= 1
    assert list(cut) == sorted(cut, reverse=True)
    found = balanced(num_layers, num_stages, lambda rank, count: 0.1 * count, num_chunks)
    per_rank = [sum(found[rank::num_stages]) for rank in range(num_stages)]
    assert per_rank == list(even(num_layers, num_stages))
    assert len(found) == num_stages * num_chunks and sum(found) == num_layers


def test_embedding_and_head_weigh():
    cut = balanced(12, 3, Stages([1.0] * 3, 2.0, 4.0, [12] * 3))
    assert cut == (4, 6, 2)


def test_a_slower_device_gets_fewer_layers_and_a_small_one_what_it_holds():
    assert balanced(12, 2, Stages([1.0, 3.0], 0.0, 0.0, [12, 12])) == (9, 3)
    assert balanced(12, 2, Stages([1.0, 3.0], 0.0, 0.0, [7, 12])) == (7, 5)


def test_a_rank_of_several_virtual_stages_deals_its_layers_among_them():
    # rank 0 is three times as fast: 9 layers of 12, in chunks of 5 and 4; rank 1 has 2 and 1
    cut = balanced(12, 2, Stages([1.0, 3.0], 0.0, 0.0, [12, 12]), num_chunks=2)
    assert cut == (5, 2, 4, 1)


@pytest.mark.parametrize(
    ("layers", "chunks", "said"),
    [
        ((10, 14, 9), 1, "adds up to 33, but the model has 32"),
        ((16, 16), 1, "names 2 stages, but there are 3"),
        ((10, 14, 8), 2, "names 3 stages, but there are 3 of 2 virtual stages each; name 6"),
        ((18, 14, 0), 1, "leaves a stage without layers"),
    ],
)
def test_a_cut_by_hand_that_is_none_is_told_with_both_numbers(layers, chunks, said):
    with pytest.raises(PolicyError, match=said):
        by_hand(layers, 32, 3, chunks)


def test_a_cut_by_hand_is_believed():
    assert by_hand((10, 14, 8), 32, 3) == (10, 14, 8)


def test_more_stages_than_layers_are_refused_with_both_numbers():
    with pytest.raises(PolicyError, match="3 layers cannot be cut into 4 stages"):
        even(3, 4)
    with pytest.raises(PolicyError, match="5 layers cannot be cut into 3 stages of 2 virtual"):
        balanced(5, 3, lambda rank, count: 1.0, 2)


# -- estimates that cost something ----------------------------------------------------------------


class Counted:
    """Remembers what was estimated."""

    def __init__(self, ranks: Stages) -> None:
        self.ranks = ranks
        self.asked: list[tuple[int, int]] = []

    def __call__(self, rank: int, count: int) -> float:
        self.asked.append((rank, count))
        return self.ranks(rank, count)


@given(ranks=stages(), num_layers=st.integers(4, 12))
def test_times_on_lines_between_estimates_lead_to_the_same_cut(ranks, num_layers):
    num_stages = len(ranks.layer_s)
    if min(map(ranks.slowest, all_cuts(num_layers, num_stages))) == inf:
        return
    usual, most = num_layers // num_stages, num_layers - num_stages + 1
    times = StageTimes(ranks, range(num_stages), 1, usual, most)
    cut = balanced_by(times, num_layers, num_stages, 1)
    assert ranks.slowest(cut) == pytest.approx(
        ranks.slowest(balanced(num_layers, num_stages, ranks))
    )


def test_few_stages_of_a_deep_model_are_estimated():
    ranks = Counted(Stages([1.0] * 8, 0.5, 2.0, [20] * 8))
    alike = [(rank == 0, rank == 7) for rank in range(8)]
    times = StageTimes(ranks, alike, 1, 15, 119)
    assert ranks.ranks.slowest(balanced_by(times, 126, 8, 1)) == 16.5
    assert len(ranks.asked) < 60


@given(
    rooms=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    num_layers=st.integers(4, 12),
    num_chunks=st.integers(1, 2),
)
def test_no_cut_within_the_rooms_has_a_smaller_largest_stage(rooms, num_layers, num_chunks):
    cuts = [
        cut
        for cut in all_cuts(num_layers, len(rooms), least=num_chunks)
        if all(count <= room for count, room in zip(cut, rooms, strict=True))
    ]
    cut = most_even(num_layers, rooms, num_chunks)
    assert (cut is None) == (not cuts)
    if cut is not None:
        ranks = tuple(sum(cut[rank :: len(rooms)]) for rank in range(len(rooms)))
        assert ranks in cuts
        assert max(ranks) == min(map(max, cuts))
