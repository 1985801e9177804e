"""What sums over the shards of a stage cost, and that estimates count them as schedules do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from flexpipe.model.config import Shard, shard_config
from flexpipe.model.cost import decoder_flops, num_attended
from flexpipe.plan.block import Need
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.layer import LayerKind
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Shares, percent_shares
from flexpipe.policy.cost import CostModel
from flexpipe.policy.curve import Curve
from flexpipe.policy.estimate import step_work
from flexpipe.policy.predict import predict
from flexpipe.schedule.op import Kind, Lane
from tests.policy.machine import OVERHEADS, machine
from tests.schedule.plans import ops_of, step_of, tiny_config, tiny_plan

LINKS = {**machine().links, "comm": Curve.flat(4e9)}
MACHINE = machine(overhead_s=OVERHEADS, links=LINKS)
ON_DEVICE = {name: Shares(gpu=1.0) for name in ("weights", "kv_cache", "hidden")}


def shard_plan(size: int, *, post_norm: bool = False, **knobs: object) -> Plan:
    whole = replace(tiny_config(vocab_size=1000), post_norm=post_norm)
    config = shard_config(whole, Shard(0, size))
    return tiny_plan(**{"config": config, "micro_batch_size": 2, **knobs})


@pytest.mark.parametrize("size", [2, 4])
def test_a_sum_sends_each_shards_part_twice_less_its_own(size):
    plan = shard_plan(size, **ON_DEVICE)
    model, tokens = CostModel(plan, MACHINE), 3
    hidden, adds = tokens * 2 * 64, tokens * 2 * 64 / 1e9
    for op in ops_of(plan, [step_of(plan, tokens=tokens)]):
        if op.kind != Kind.ALL_REDUCE or op.mb != 0:
            continue
        cost, kind = model(op), plan.layers[op.layer].kind
        numbers = 2 * 1000 if kind == LayerKind.HEAD else hidden
        moved = 2 * (size - 1) * numbers * 4 // size
        added = adds if kind == LayerKind.DECODER else 0.0
        assert (cost.link, cost.num_bytes, op.lane) == ("comm", moved, Lane.REDUCE)
        assert cost.seconds == pytest.approx(OVERHEADS["move"] + moved / 4e9 + added)


def test_the_parts_of_a_layer_are_its_work():
    """A device of a given rate computes no longer in two halves than in one."""
    rate = 1e6
    plan = shard_plan(2, **ON_DEVICE)
    model = CostModel(plan, machine(links=LINKS), Emulation(flops_per_s=rate))
    ops = [op for op in ops_of(plan, [step_of(plan, context=8)]) if op.layer == 1 and op.mb == 0]
    seconds = sum(model(op).seconds for op in ops if op.kind == Kind.COMPUTE)
    flops = decoder_flops(plan.config, 2, 2 * num_attended(8, 1))
    assert seconds == pytest.approx(flops / rate)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("cpu_attention", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_an_estimate_has_the_ops_of_a_shards_step(size, cpu_attention, separate, post_norm):
    plan = shard_plan(
        size,
        post_norm=post_norm,
        **percent_shares([0, 100, 0, 100, 0, 100]),
        separate_layers=separate,
        cpu_attention=cpu_attention,
        num_micro_batches=2,
    )
    model, step = CostModel(plan, MACHINE), step_of(plan, context=8)
    played: dict[str, float] = defaultdict(float)
    for op in ops_of(plan, [step] * 3):
        if op.step == 1 and op.kind != Kind.BARRIER:
            played[op.lane.value] += model(op).seconds
    estimated = step_work(model, step).seconds
    assert {lane.value for lane in Lane} & set(estimated) == set(played)
    for lane, seconds in played.items():
        assert estimated[lane] == pytest.approx(seconds), lane


def test_shards_are_predicted_to_be_faster_the_faster_their_link():
    """On a device of a given rate half the work takes half the time, and sums come on top."""
    needs, device = [Need(64, 12)] * 24, Emulation(flops_per_s=1e8)
    knobs = {**ON_DEVICE, "needs": needs, "micro_batch_size": 8, "num_micro_batches": 3}
    took = {}
    for size, rate in ((1, 4e9), (2, 4e9), (2, 4e6), (4, 4e9)):
        profile = machine(links={**LINKS, "comm": Curve.flat(rate)})
        took[size, rate] = predict(shard_plan(size, **knobs), needs, profile, device).run_s
    assert took[1, 4e9] / took[2, 4e9] == pytest.approx(2, rel=0.1)
    assert took[1, 4e9] / took[4, 4e9] == pytest.approx(4, rel=0.2)
    assert took[2, 4e6] > 1.2 * took[2, 4e9]
