"""What layers compute in follows from what the machine multiplies fastest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexpipe.errors import PolicyError
from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.dtype import candidate_dtypes, compute_dtype
from flexpipe.policy.profile import Profile
from tests.policy.machine import RATES, machine
from tests.schedule.plans import tiny_config


def multiplying(**rates: float) -> Profile:
    surfaces = {dtype: Surface.of({1.0: Curve.flat(rate)}) for dtype, rate in rates.items()}
    return machine(compute=replace(RATES, matmul=surfaces))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_an_accelerator_computes_in_what_is_stored_and_a_cpu_never_in_float16(stored: str) -> None:
    config = tiny_config(torch_dtype=stored)
    assert candidate_dtypes("auto", config, on_cpu=False) == (stored,)
    on_cpu = candidate_dtypes("auto", config, on_cpu=True)
    assert on_cpu == (("float32", "bfloat16") if stored == "bfloat16" else ("float32",))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_is_asked_for_is_taken_however_slow(on_cpu: bool) -> None:
    profile = multiplying(float32=1e12, bfloat16=1e9)
    config = tiny_config(torch_dtype="float32")
    assert compute_dtype("bfloat16", config, on_cpu, profile) == "bfloat16"


@pytest.mark.parametrize(("fast", "slow"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_cpu_takes_the_faster_of_its_candidates(fast: str, slow: str) -> None:
    config = tiny_config(torch_dtype="bfloat16")
    profile = multiplying(**{fast: 2e11, slow: 1e11})
    assert compute_dtype("auto", config, True, profile) == fast
    assert compute_dtype("auto", config, True, multiplying(**{slow: 1e11})) == slow
    assert compute_dtype("auto", config, True, None) == "float32"


def test_a_profile_without_any_candidate_is_refused_with_what_it_has() -> None:
    config = tiny_config(torch_dtype="bfloat16")
    with pytest.raises(PolicyError, match="no products in bfloat16; give --dtype, one of float16"):
        compute_dtype("auto", config, False, multiplying(float16=1e12))
