"""What ranks agree on arrives as it was decided, or is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import InputError
from flexpipe.job.crew import Orders, _check_alike
from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.policy import STRATEGIES, Policy, Shares
from flexpipe.runtime.ranks import Ranks

TWO = Ranks(rank=0, num_stages=2, port=1)
SHARES = st.sampled_from([Shares(cpu=1.0), Shares(gpu=0.25, cpu=0.5, disk=0.25)])
POLICIES = st.builds(
    Policy,
    weights=SHARES,
    kv_cache=SHARES,
    strategy=st.sampled_from(STRATEGIES),
    compress_cache=st.sampled_from(["none", "8"]),
    cpu_attention=st.booleans(),
    cpu_mem=st.one_of(st.none(), st.integers(1, 2**40)),
)


@given(first=POLICIES, second=POLICIES, needs=st.lists(st.integers(1, 5000), max_size=3))
def test_orders_arrive_as_they_were_given(first, second, needs):
    orders = Orders(
        pipeline=Pipeline(layers=(2, 1, 1, 1), num_stages=2, num_blocks=3, async_comm=False),
        policies=[first, second],
        needs=[Need(need, 1 + need // 2) for need in needs],
        compute_dtype="float32",
    )
    assert Orders.of(json.loads(json.dumps(orders.to_dict()))) == orders


def test_ranks_that_compute_beside_unlike_tiers_are_refused_with_the_first_that_differs():
    _check_alike(TWO, ["cpu", "cpu"])
    with pytest.raises(InputError) as refusal:
        _check_alike(TWO, ["gpu", "cpu"])
    assert "stage 0 computes beside the gpu tier, stage 1 beside the cpu" in str(refusal.value)
