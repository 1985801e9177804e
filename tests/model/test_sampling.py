"""Samples follow the distribution they are cut to, and depend on nothing but their own draw."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.model.draw import Draw, uniform
from flexpipe.model.sampling import choose

VOCAB = 40


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def kept_tokens(row_V: torch.Tensor, draw: Draw) -> dict[int, float]:
    """Naively: the tokens that temperature, top-k and then top-p leave, and their share."""
    probability = (row_V.double() / draw.temperature).softmax(0)
    order = probability.argsort(descending=True).tolist()[: draw.top_k or None]
    total = sum(float(probability[token]) for token in order)
    kept: dict[int, float] = {}
    before = 0.0
    for token in order:
        if before >= draw.top_p:
            break
        kept[token] = float(probability[token]) / total
        before += kept[token]
    return kept


@settings(max_examples=60)
@given(
    st.integers(0, 1000),
    st.floats(0.2, 3),
    st.integers(0, VOCAB),
    st.floats(0.01, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_a_sample_is_the_inverse_of_the_cut_distribution(
    seed: int, temperature: float, top_k: int, top_p: float, number: float
) -> None:
    draw = Draw(temperature, top_k, top_p, number)
    row_V = logits(seed)[0]
    token = int(choose(row_V.unsqueeze(0), [draw])[0])
    kept = kept_tokens(row_V, draw)
    assert token in kept
    below = sum(p for other, p in kept.items() if list(kept).index(other) < list(kept).index(token))
    target = number * sum(kept.values())
    assert below - 1e-9 <= target <= below + kept[token] + 1e-9


def test_shares_of_many_samples_follow_the_probabilities() -> None:
    row_V = logits(3)[0]
    count = 4000
    draws = [Draw(1.0, 0, 1.0, uniform(7, "a", position)) for position in range(count)]
    tokens, _ = choose(row_V.expand(count, -1).clone(), draws)
    shares = torch.bincount(tokens, minlength=VOCAB) / count
    assert (shares - row_V.softmax(0)).abs().max() < 0.03


def test_other_rows_do_not_change_a_sample() -> None:
    rows_RV = logits(5, rows=6)
    draws = [Draw(0.9, 12, 0.95, uniform(1, row, 0)) if row % 2 else None for row in range(6)]
    together, finite = choose(rows_RV, draws)
    alone = [int(choose(rows_RV[row : row + 1], [draws[row]])[0]) for row in range(6)]
    assert together.tolist() == alone
    assert finite.all()
    assert together[0] == rows_RV[0].argmax()


def test_rows_that_are_not_finite_are_flagged_and_leave_the_others_alone() -> None:
    rows_RV = logits(5, rows=3)
    rows_RV[1, 4] = float("nan")
    draw = Draw(1.0, 0, 1.0, 0.5)
    tokens, finite = choose(rows_RV, [draw, draw, None])
    assert finite.tolist() == [True, False, True]
    assert tokens[2] == rows_RV[2].argmax()


def test_the_uniform_number_depends_on_seed_id_and_position() -> None:
    numbers = {
        uniform(seed, request, position)
        for seed in (0, 1)
        for request in ("1", 1, "ü")
        for position in range(50)
    }
    assert len(numbers) == 300
    assert all(0 <= number < 1 for number in numbers)
