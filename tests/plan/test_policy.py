"""Policies: legal in themselves, and refused by the name a user knows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.policy import (
    OPTION_NAMES,
    Policy,
    Shares,
    knob,
    percent_shares,
)
from flexpipe.plan.tier import Tier

FIVES = st.integers(0, 20).map(lambda step: 5 * step)


@given(wg=FIVES, wc=FIVES, kg=FIVES, kc=FIVES, hg=FIVES, hc=FIVES)
def test_six_numbers_become_shares_that_add_up_or_are_refused_by_name(wg, wc, kg, kc, hg, hc):
    asked = {"weights": (wg, wc), "kv_cache": (kg, kc), "hidden": (hg, hc)}
    wrong = [name for name, (gpu, cpu) in asked.items() if gpu + cpu > 100]
    if wrong:
        with pytest.raises(PolicyError, match=f"--percent gives {wrong[0]}"):
            percent_shares([wg, wc, kg, kc, hg, hc])
        return
    for name, shares in percent_shares([wg, wc, kg, kc, hg, hc]).items():
        gpu, cpu = asked[name]
        assert (shares.gpu, shares.cpu) == (gpu / 100, cpu / 100)
        assert shares.gpu + shares.cpu + shares.disk == pytest.approx(1)
        assert (Tier.DISK in shares.tiers) == (gpu + cpu < 100)


@pytest.mark.parametrize("percent", [[100, 0, 100, 0, 100], [100] * 7, []])
def test_percent_takes_six_numbers_and_says_so(percent):
    with pytest.raises(PolicyError, match=f"six numbers, got {len(percent)}"):
        percent_shares(percent)


def test_a_negative_percent_is_refused():
    with pytest.raises(PolicyError, match=r"--percent gives hidden -5 on gpu"):
        percent_shares([100, 0, 100, 0, -5, 100])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"gpu": 0.5, "cpu": 0.6}, "add up to 1, got 1.1"),
        ({"gpu": 0.5}, "add up to 1, got 0.5"),
        ({"gpu": 1.5, "cpu": -0.5}, "lies between 0 and 1, got gpu: 1.5"),
        ({"cpu": "half"}, "lies between 0 and 1, got cpu: 'half'"),
        ({"cpu": float("nan")}, "lies between 0 and 1"),
    ],
)
def test_shares_that_are_no_shares_are_refused(shares, message):
    with pytest.raises(PolicyError, match=message):
        Shares(**shares)


@pytest.mark.parametrize(
    "name", ["micro_batch_size", "num_micro_batches", "prefetch_depth", "max_batch_tokens"]
)
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"])
def test_counts_are_whole_numbers_from_one_and_refused_by_option(name, value):
    with pytest.raises(PolicyError, match=OPTION_NAMES[name]):
        Policy(**{name: value})


@pytest.mark.parametrize(
    ("name", "known"), [("strategy", "event"), ("compute_dtype", "auto"), ("resident_dtype", "co")]
)
def test_an_unknown_choice_is_refused_with_the_known_ones(name, known):
    with pytest.raises(PolicyError, match=rf"{OPTION_NAMES[name]}\) is one of .*{known}.*'wild'"):
        Policy(**{name: "wild"})


def test_more_rows_than_tokens_in_a_step_is_refused_with_the_option_to_raise():
    with pytest.raises(PolicyError, match=r"--gpu-batch-size 64 .*--max-batch-tokens is 63; raise"):
        Policy(micro_batch_size=64, max_batch_tokens=63)


@pytest.mark.parametrize("name", ["weights", "kv_cache", "hidden"])
def test_a_gpu_share_on_the_cpu_is_refused_with_emulated_as_the_way_out(name):
    policy = Policy(**{name: Shares(gpu=0.25, cpu=0.75)})
    with pytest.raises(PolicyError, match=rf"{name}\.gpu is 0\.25.*use --device emulated"):
        policy.check_device("cpu")
    policy.check_device("emulated")


def test_a_gpu_budget_on_the_cpu_is_refused():
    with pytest.raises(PolicyError, match="--gpu-mem needs a gpu tier"):
        Policy(gpu_mem=2**30).check_device("cpu")


def test_every_field_of_a_policy_has_an_option():
    assert set(OPTION_NAMES) == set(Policy.__dataclass_fields__)


def test_budgets_in_a_file_may_have_units_or_be_absent():
    assert knob("gpu_mem", "2GiB") == 2**31
    assert knob("cpu_mem", None) is None
