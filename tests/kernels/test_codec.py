"""Compression: what a number may become, and that every way to widen gives the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.kernels import codec as codec_module
from flexpipe.kernels import team
from flexpipe.kernels.codec import LARGEST, compress, widen
from flexpipe.plan.codec import Codec

codecs = st.builds(
    Codec, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([32, 64, 66, 128, 256])
)


def compressed(x, codec):
    rows = torch.empty(x.shape[0], codec.row_bytes(x.shape[1]), dtype=torch.uint8)
    compress(x, codec, rows)
    return rows


def widened(rows, codec, size, dtype=torch.float32):
    out = torch.empty(rows.shape[0], size, dtype=dtype)
    widen(rows, codec, out)
    return out


def steps(rows, codec, size):
    """Each number's step."""
    params = rows[:, codec.code_bytes(size) :].contiguous().view(torch.float16).float()
    step = params.view(rows.shape[0], -1, 2)[:, :, 0]
    return step.repeat_interleave(codec.group_size, 1)[:, :size].double()


@given(
    codec=codecs,
    size=st.integers(1, 300),
    scale=st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 1.0, -1000.1, 1 / 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step_of_its_group(codec, size, scale, shift, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, size, generator=generator) * scale + shift).to(dtype)
    rows = compressed(x, codec)
    error = (x.double() - widened(rows, codec, size).double()).abs()
    assert (error <= steps(rows, codec, size) * 0.5 * (1 + 1e-6) + 1e-7 * x.double().abs()).all()


@settings(max_examples=25)
@given(
    codec=codecs,
    size=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_kernel_and_torch_widen_to_the_same_bits(codec, size, dtype):
    x = torch.randn(19, size, generator=torch.Generator().manual_seed(size))
    rows = compressed(x, codec)
    by_torch = torch.empty(19, size, dtype=dtype)
    codec_module._widen_by_torch(rows, codec, by_torch)
    assert torch.equal(widened(rows, codec, size, dtype), by_torch)


@pytest.mark.skipif(not team.available(), reason="no llvmlite or no OpenMP here")
def test_widen_takes_the_kernel_on_a_cpu(monkeypatch):
    monkeypatch.setattr(codec_module, "_widen_by_torch", None)
    rows = compressed(torch.randn(3, 70), Codec(bits=4))
    assert widened(rows, Codec(bits=4), 70).isfinite().all()


@given(codec=codecs, size=st.integers(1, 300))
def test_segments_cover_every_number_once_within_the_codes(codec, size):
    covered = [n for s in codec.segments(size) for n in range(s.start, s.stop)]
    assert covered == list(range(size))
    ends = [s.byte + s.stop - s.start for s in codec.segments(size)]
    assert max(ends) <= codec.code_bytes(size) < max(ends) + 2
    assert codec.row_bytes(size) == codec.code_bytes(size) + 4 * -(-size // codec.group_size)


def test_four_bits_in_groups_of_64_take_the_bytes_of_the_paper():
    assert Codec(bits=4).row_bytes(4096) / 4096 == 0.5625
    assert Codec(bits=8).row_bytes(4096) / 4096 == 1.0625


def test_what_float16_cannot_hold_saturates_and_nan_stays_nan():
    x = torch.tensor([[3e38, -3e38, 1.0] + [0.0] * 61, [float("nan")] + [1.0] * 63])
    made = widened(compressed(x, Codec(bits=8)), Codec(bits=8), 64)
    assert made[0].isfinite().all() and made[0, 0] >= LARGEST * 0.99
    assert made[1].isnan().all()


@pytest.mark.parametrize(
    "given", [{"bits": 3}, {"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 33}]
)
def test_impossible_codecs_are_refused(given):
    with pytest.raises(PolicyError):
        Codec(**given)
