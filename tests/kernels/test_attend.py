"""The decoding rows' kernel against attention in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.kernels import codec, team
from flexpipe.kernels.attend import KvRows, attend_rows, runs_here
from flexpipe.plan.codec import Codec

pytestmark = pytest.mark.skipif(not team.available(), reason="no llvmlite or no OpenMP here")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
dtypes = st.sampled_from(list(TOLERANCE))


def reference(q_RND, kv_RL2KD, rows):
    attended = []
    for q, kv, first, count in zip(q_RND, kv_RL2KD, rows.first_R, rows.count_R, strict=True):
        k, v = (
            kv[first : first + count].double().repeat_interleave(len(q) // kv.shape[2], 2).unbind(1)
        )
        scores = torch.einsum("nd,lnd->nl", q.double(), k) / math.sqrt(q.shape[1])
        attended.append(torch.einsum("nl,lnd->nd", scores.softmax(-1), v))
    return torch.stack(attended)


def some_rows(counts, region, generator):
    count_R = torch.tensor(counts)
    first_R = (torch.rand(len(counts), generator=generator) * (region - count_R + 1)).long()
    return KvRows(first_R, count_R, count_R.argsort(descending=True))


RAGGED = {
    "counts": st.lists(st.integers(1, 70), min_size=1, max_size=5),
    "num_kv": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 3, 4, 7, 8, 9, 12]),
    "dim": st.sampled_from([1, 2, 6, 8, 16, 24, 64, 80, 128]),
    "q_dtype": dtypes,
    "kv_dtype": dtypes,
    "scale": st.sampled_from([0.1, 1.0, 30.0]),
}


@settings(max_examples=20)  # each is a kernel to compile
@given(**RAGGED)
def test_ragged_rows_attend_to_just_their_tokens(**case):
    check_ragged(**case)


@pytest.mark.slow
@settings(max_examples=300)
@given(**RAGGED)
def test_rows_of_many_shapes_attend_to_just_their_tokens(**case):
    check_ragged(**case)


def check_ragged(counts, num_kv, group, dim, q_dtype, kv_dtype, scale):
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(len(counts), 70, 2, num_kv, dim, generator=generator).to(kv_dtype)
    gaps = torch.randn(len(counts), num_kv * group + 2, dim, generator=generator) * scale
    q = gaps.to(q_dtype)[:, : num_kv * group]
    rows = some_rows(counts, 70, generator)
    expected = reference(q, kv, rows)
    for row, (first, count) in enumerate(zip(rows.first_R, rows.count_R, strict=True)):
        kv[row, :first], kv[row, first + count :] = math.nan, math.nan
    attend_rows(q, kv, rows, None)
    tolerance = TOLERANCE[q_dtype] * max(1.0, scale)
    torch.testing.assert_close(q.double(), expected, rtol=tolerance, atol=tolerance)


COMPRESSED = {
    "counts": st.lists(st.integers(1, 70), min_size=1, max_size=4),
    "num_kv": st.integers(1, 3),
    "group": st.sampled_from([1, 3, 4, 8, 9]),
    "dim": st.sampled_from([8, 16, 40, 64, 80, 96, 128]),
    "bits": st.sampled_from([4, 8]),
    "group_size": st.sampled_from([32, 64]),
    "q_dtype": dtypes,
}


@settings(max_examples=10)  # each is a large kernel to compile
@given(**COMPRESSED)
def test_compressed_rows_attend_as_what_they_widen_to(**case):
    check_compressed(**case)


@pytest.mark.slow
@settings(max_examples=150)
@given(**COMPRESSED)
def test_compressed_rows_of_many_shapes_attend_as_what_they_widen_to(**case):
    check_compressed(**case)


def check_compressed(counts, num_kv, group, dim, bits, group_size, q_dtype):
    generator = torch.Generator().manual_seed(0)
    kind = Codec(bits=bits, group_size=group_size)
    wide = torch.randn(len(counts), 70, 2, num_kv, dim, generator=generator)
    kv = torch.empty(*wide.shape[:-1], kind.row_bytes(dim), dtype=torch.uint8)
    codec.compress(wide.flatten(0, 3), kind, kv.flatten(0, 3))
    codec.widen(kv.flatten(0, 3), kind, wide.flatten(0, 3))
    q = torch.randn(len(counts), num_kv * group, dim, generator=generator).to(q_dtype)
    rows = some_rows(counts, 70, generator)
    expected = reference(q, wide, rows)
    for row, (first, count) in enumerate(zip(rows.first_R, rows.count_R, strict=True)):
        kv[row, :first], kv[row, first + count :] = 255, 255  # NaN steps
    attend_rows(q, kv, rows, kind)
    tolerance = TOLERANCE[q_dtype]
    torch.testing.assert_close(q.double(), expected, rtol=tolerance, atol=tolerance)


def test_heads_beyond_a_thread_s_share_are_another_item():
    """Many wide heads: a row's heads are taken in several turns, its queries lie behind others."""
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(3, 40, 2, 40, 128, generator=generator)
    q = torch.randn(3, 80, 128, generator=generator)
    rows = some_rows([40, 17, 5], 40, generator)
    expected = reference(q, kv, rows)
    attend_rows(q, kv, rows, None)
    torch.testing.assert_close(q.double(), expected, rtol=2e-6, atol=2e-6)


def test_growing_scores_move_the_running_maximum():
    """Each token's score is far above all before it, then far below: neither may overflow."""
    kv = torch.ones(2, 64, 2, 1, 16)
    kv[0, :, 0] *= torch.linspace(-50, 50, 64)[:, None, None]
    kv[1, :, 0] *= torch.linspace(50, -50, 64)[:, None, None]
    kv[:, :, 1] = torch.arange(64.0)[:, None, None]
    q = torch.full((2, 1, 16), 3.0)
    rows = some_rows([64, 64], 64, torch.Generator())
    expected = reference(q, kv, rows)
    attend_rows(q, kv, rows, None)
    torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("part", [0, 1])
def test_a_key_or_a_value_that_is_no_number_shows(group, part):
    """A row whose cache went wrong must fail, not answer."""
    kv = torch.randn(2, 40, 2, 1, 64, generator=torch.Generator().manual_seed(0))
    kv[0, 7, part, 0, 3] = math.nan
    q = torch.randn(2, group, 64, generator=torch.Generator().manual_seed(1))
    attend_rows(q, kv, some_rows([40, 40], 40, torch.Generator()), None)
    assert q[0].isnan().any() and q[1].isfinite().all()


def test_any_number_of_threads_gives_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(9, 50, 2, 2, 32, generator=generator)
    q = torch.randn(9, 8, 32, generator=generator)
    rows = some_rows([1, 50, 17, 33, 2, 40, 16, 15, 8], 50, generator)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(q.clone())
            attend_rows(results[-1], kv, rows, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_only_cpus_run_it():
    assert runs_here(torch.device("cpu"))
    assert not runs_here(torch.device("meta"))
