"""What ops cost on a machine of round numbers: bytes over rates, FLOPs over rates, overheads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.model.cost import attend_flops, decoder_flops, num_attended
from flexpipe.plan.block import KV_PAGE
from flexpipe.plan.hardware import DISK_QUEUE_BYTES, EMULATED_TURN_S, Emulation
from flexpipe.plan.layer import LayerKind
from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import Shares
from flexpipe.plan.tier import Tier
from flexpipe.policy.cost import CostModel
from flexpipe.policy.curve import Curve, Surface
from flexpipe.schedule.op import Kind, Op, Segment
from flexpipe.schedule.simulate import Cost
from flexpipe.schedule.step import MicroBatch, Row
from tests.policy.machine import OVERHEADS, RATES, machine
from tests.schedule.plans import ops_of, plans, step_of, steps_for, tiny_config, tiny_plan

CPU, GPU, DISK = Shares(cpu=1.0), Shares(gpu=1.0), Shares(disk=1.0)
RESIDENT = {"weights": CPU, "kv_cache": CPU, "hidden": CPU}
OFF_DEVICE = {"weights": CPU, "kv_cache": CPU, "hidden": CPU}


def costs(
    plan: Plan, kind: Kind, model: CostModel, *, context: int = 8, tokens: int = 1
) -> list[tuple[Op, Cost]]:
    """Of a step's ops of one kind."""
    ops = ops_of(plan, [step_of(plan, context=context, tokens=tokens)])
    return [(op, model(op)) for op in ops if op.kind == kind]


def plan_on(tier: Tier, **knobs: Any) -> Plan:
    return tiny_plan(**{"micro_batch_size": 2, **knobs}, tier=tier)


# -- moves ----------------------------------------------------------------------------------------


def test_a_load_takes_its_bytes_over_the_links_rate_and_what_a_move_costs():
    plan = plan_on(Tier.GPU, **OFF_DEVICE)
    made = costs(plan, Kind.LOAD_WEIGHT, CostModel(plan, machine(overhead_s=OVERHEADS)))
    assert made
    for op, cost in made:
        num_bytes = plan.layers[op.layer].streamed.num_bytes
        assert (cost.num_bytes, cost.link) == (num_bytes, "h2d")
        assert cost.seconds == pytest.approx(OVERHEADS["move"] + num_bytes / 1e10)


def test_rows_of_a_cache_that_is_loaded_are_pieces_of_one_move():
    plan = plan_on(Tier.GPU, **OFF_DEVICE)
    model = CostModel(plan, machine(overhead_s=OVERHEADS))
    ((_, cost), *_) = costs(plan, Kind.LOAD_CACHE, model)
    num_bytes = 2 * 8 * plan.token_bytes  # two rows with eight tokens behind them
    assert cost.num_bytes == num_bytes
    overhead = OVERHEADS["move"] + OVERHEADS["copy"]
    assert cost.seconds == pytest.approx(overhead + num_bytes / 1e10)


def test_an_emulated_link_takes_its_own_time_and_copies_in_part_of_it():
    plan = plan_on(Tier.GPU, **OFF_DEVICE)
    slow = CostModel(plan, machine(), Emulation(h2d_bytes_per_s=1e9))
    fast = CostModel(plan, machine(), Emulation(h2d_bytes_per_s=1e12))
    (_, behind), *_ = costs(plan, Kind.LOAD_WEIGHT, slow)
    (_, ahead), *_ = costs(plan, Kind.LOAD_WEIGHT, fast)
    assert behind.seconds == pytest.approx(behind.num_bytes / 1e9)
    assert behind.duty == pytest.approx(0.1)  # the copy itself runs at 10 GB/s
    assert (ahead.seconds, ahead.duty) == (pytest.approx(ahead.num_bytes / 1e10), 1.0)


def test_a_transfer_has_no_more_in_flight_than_its_device_takes():
    plan = plan_on(Tier.CPU, weights=Shares(disk=1.0))
    ((read, cost), *_) = costs(plan, Kind.READ_WEIGHT, CostModel(plan, machine()))
    assert plan.layers[read.layer].streamed.read_bytes < DISK_QUEUE_BYTES
    assert cost.in_flight_s == cost.seconds
    slow = Emulation(disk_read_bytes_per_s=1e5)
    ((_, cost), *_) = costs(plan, Kind.READ_WEIGHT, CostModel(plan, machine(), slow))
    assert cost.seconds > cost.in_flight_s == EMULATED_TURN_S
    ((_, cost), *_) = costs(
        plan_on(Tier.GPU, **OFF_DEVICE), Kind.LOAD_WEIGHT, CostModel(plan, machine())
    )
    assert cost.in_flight_s == 0.0  # of a real link nothing is known


def test_a_kv_cache_on_disk_costs_calls_per_row_and_bytes_only_where_pages_are_whole():
    plan = plan_on(Tier.CPU, kv_cache=DISK)
    model = CostModel(plan, machine(overhead_s=OVERHEADS))
    beside_s = OVERHEADS["disk_cache"] + 2 * OVERHEADS["disk_cache_row"]
    of_a_page = KV_PAGE // plan.token_bytes
    known = (
        (Kind.READ_CACHE, "disk_read", 2e9, OVERHEADS["read"]),
        (Kind.WRITE_CACHE, "disk_write", 1e9, 0.0),
    )
    for kind, link, rate, latency_s in known:
        ((_, tails), *_) = costs(plan, kind, model, context=1)
        assert (tails.seconds, tails.calls, tails.link) == (pytest.approx(beside_s), 1.0, "")
        ((_, pages), *_) = costs(plan, kind, model, context=of_a_page, tokens=of_a_page)
        assert pages.link == link
        assert pages.num_bytes >= 2 * KV_PAGE  # of two rows; short gaps are read over
        link_s = max(latency_s, pages.num_bytes / rate)
        assert pages.seconds == pytest.approx(beside_s + link_s)


def test_what_an_op_costs_beside_its_work_is_calls():
    plan = plan_on(Tier.GPU, **OFF_DEVICE)
    model = CostModel(plan, machine(overhead_s=OVERHEADS))
    ((_, cost), *_) = costs(plan, Kind.STORE_CACHE, model)  # of two rows
    expected = (OVERHEADS["move"] + OVERHEADS["copy"]) / cost.seconds
    assert cost.calls == pytest.approx(expected, abs=0.01)
    for op, cost in costs(plan, Kind.COMPUTE, model):
        if plan.layers[op.layer].kind == LayerKind.DECODER:
            assert cost.calls == pytest.approx(OVERHEADS["layer"] / cost.seconds, abs=0.01)
        if plan.layers[op.layer].kind == LayerKind.EMBED:
            expected = OVERHEADS["embed"] + 2 * OVERHEADS["embed_row"]
            assert cost.calls == pytest.approx(expected / cost.seconds, abs=0.01)
    ((_, cost),) = costs(plan, Kind.COMMIT, model)
    assert cost.calls == 1.0


@given(data=st.data(), faster=st.floats(1.0, 100.0))
def test_no_op_takes_longer_on_a_machine_whose_links_are_faster(data, faster):
    plan = data.draw(plans())
    links = machine().links
    quicker = machine(links={name: curve.scaled(faster) for name, curve in links.items()})
    before, after = CostModel(plan, machine()), CostModel(plan, quicker)
    for op in ops_of(plan, data.draw(steps_for(plan))):
        assert after(op).seconds <= before(op).seconds * (1 + 1e-12)
        assert after(op).num_bytes == before(op).num_bytes


@given(data=st.data())
def test_every_op_has_a_finite_cost_and_only_moves_have_bytes(data):
    plan = data.draw(plans())
    model = CostModel(plan, machine(overhead_s=OVERHEADS))
    for op in ops_of(plan, data.draw(steps_for(plan))):
        cost = model(op)
        assert 0 <= cost.seconds < 1
        assert 0 < cost.duty <= 1
        assert bool(cost.link) >= bool(cost.num_bytes)


# -- compute --------------------------------------------------------------------------------------


def layer_s(plan: Plan, rates: Any = RATES, **step: int) -> float:
    """The first decoder layer's compute, without overheads and passes."""
    plain = replace(rates, elementwise={"float32": Curve.flat(1e30)})
    model = CostModel(plan, machine(compute=plain))
    ops = [(op, cost) for op, cost in costs(plan, Kind.COMPUTE, model, **step)]
    return next(cost.seconds for op, cost in ops if plan.layers[op.layer].layer == 0)


def product_flops(tokens: int) -> float:
    return float(decoder_flops(tiny_config(), tokens, 0))


def test_products_take_their_flops_over_the_rate_of_weights_that_lie_packed_at_home():
    plan = plan_on(Tier.CPU, **RESIDENT)
    attended = 2 * (8 + 1) * 2 * plan.config.num_kv_heads * plan.config.head_dim * 4
    expected = product_flops(2) / 2e11 + attended / 1e10
    assert layer_s(plan) == pytest.approx(expected)


def test_streamed_weights_meet_products_as_they_lie_on_the_wire():
    plan = plan_on(Tier.CPU, **{**RESIDENT, "weights": DISK})
    attended = 2 * (8 + 1) * 2 * plan.config.num_kv_heads * plan.config.head_dim * 4
    assert layer_s(plan) == pytest.approx(product_flops(2) / 1e11 + attended / 1e10)


def test_weights_of_another_dtype_are_converted_on_every_use():
    streamed = {**RESIDENT, "weights": DISK}
    plain = plan_on(Tier.CPU, **streamed)
    narrow = plan_on(Tier.CPU, **streamed, dtype="bfloat16")
    elements = product_flops(1) / 2
    assert layer_s(narrow) - layer_s(plain) == pytest.approx(elements / 1e10)


def test_prompts_attend_by_flops_and_decoding_rows_by_bytes():
    plan = plan_on(Tier.CPU, **RESIDENT)
    rows, new = 2, 5
    attended = rows * num_attended(8, new)
    expected = product_flops(rows * new) / 2e11 + attend_flops(plan.config, attended) / 5e10
    assert layer_s(plan, tokens=new) == pytest.approx(expected)


def test_decoding_attention_is_bound_by_arithmetic_where_that_is_slower():
    plan = plan_on(Tier.CPU, **RESIDENT)
    slow = replace(RATES, decode_attention_flops={"float32": 1e6})
    flops = attend_flops(plan.config, 2 * 9)
    assert layer_s(plan, slow) == pytest.approx(product_flops(2) / 2e11 + flops / 1e6)


def test_an_emulated_rate_of_compute_holds_for_its_flops():
    plan = plan_on(Tier.GPU, weights=GPU, kv_cache=GPU, hidden=GPU)
    model = CostModel(plan, machine(), Emulation(flops_per_s=1e6))
    for op, cost in costs(plan, Kind.COMPUTE, model):
        if plan.layers[op.layer].layer is not None:
            flops = decoder_flops(plan.config, 2, 2 * 9)
            assert cost.seconds == pytest.approx(flops / 1e6)
            assert cost.duty < 0.01


def test_segments_of_a_layer_add_up_to_the_layer():
    knobs = {**OFF_DEVICE, "hidden": GPU}
    apart = plan_on(Tier.GPU, **knobs, cpu_attention=True)
    whole = plan_on(Tier.GPU, **knobs)
    profile = machine(overhead_s={"layer": 1.0})
    model = CostModel(apart, profile)
    parts = [
        cost.seconds
        for op, cost in costs(apart, Kind.COMPUTE, model)
        if apart.layers[op.layer].layer == 0
    ]
    (one, *_) = [
        cost.seconds
        for op, cost in costs(whole, Kind.COMPUTE, CostModel(whole, profile))
        if whole.layers[op.layer].layer == 0
    ]
    assert len(parts) == 2  # no row attends on the device
    missing = 0.2 + 2 * 9 * 2 * 4 * 16 * 4 / 1e10  # the segment between them, and its attention
    assert sum(parts) == pytest.approx(one - missing)


def test_a_segment_that_only_attends_multiplies_no_weight():
    """Of a step in which some rows prefill, on the device, and others attend on the CPU."""
    plan = plan_on(Tier.GPU, **OFF_DEVICE, cpu_attention=True)
    rows = [Row(0, 0, 8, (3,), True), Row(1, 1, 0, (3, 4, 5), True)]
    op = next(
        op
        for op in ops_of(plan, [(MicroBatch(0, tuple(rows)),)])
        if op.kind == Kind.COMPUTE and op.segment == Segment.ATTEND
    )
    slow = {name: Surface.of({1.0: Curve.flat(1.0)}) for name in RATES.matmul}
    model = CostModel(plan, machine(compute=replace(RATES, matmul=slow, packed={})))
    assert model(op).seconds < 1e-3


def test_a_compressed_cache_is_widened_and_new_tokens_compressed():
    plain = plan_on(Tier.CPU, **RESIDENT)
    narrow = plan_on(Tier.CPU, **RESIDENT, compress_cache="8")
    width = 2 * plain.config.num_kv_heads * plain.config.head_dim
    expected = 2 * width / 1e9 + 2 * 9 * width / 5e9
    assert layer_s(narrow) - layer_s(plain) == pytest.approx(expected)


def test_a_commit_costs_its_rows():
    plan = plan_on(Tier.CPU, **RESIDENT)
    ((_, cost),) = costs(plan, Kind.COMMIT, CostModel(plan, machine(overhead_s=OVERHEADS)))
    assert cost.seconds == pytest.approx(OVERHEADS["commit"] + 2 * OVERHEADS["commit_row"])


# -- loading --------------------------------------------------------------------------------------


def test_loading_reads_the_checkpoint_and_brings_home_what_does_not_stay_on_disk():
    plan = plan_on(Tier.CPU, **RESIDENT)
    tensors = plan.placement.tensors.values()
    num_bytes = sum(placed.stored.num_bytes for placed in tensors)
    numbers = sum(placed.spec.num_elements for placed in tensors)
    expected = num_bytes / 2e9 + numbers / 5e8
    assert CostModel(plan, machine()).load_s == pytest.approx(expected)


def test_weights_that_stay_on_disk_are_not_loaded():
    on_disk = plan_on(Tier.CPU, **{**RESIDENT, "weights": DISK})
    resident = plan_on(Tier.CPU, **RESIDENT)
    assert CostModel(on_disk, machine()).load_s < CostModel(resident, machine()).load_s / 20


# -- what a machine lacks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacking", "knobs", "told"),
    [
        ({"matmul": {}}, {"weights": DISK}, "no matmul for float32"),
        ({"decode_attention": {}}, {}, "no decode_attention for float32"),
        ({"elementwise": {}}, {}, "no elementwise for float32"),
        ({"sample": {}}, {}, "no sample for float32"),
        ({"widen": {}}, {"compress_weight": "4"}, "no widen for 4>float32"),
        ({"compress": {}}, {"compress_cache": "8"}, "no compress for 8"),
    ],
)
def test_what_a_policy_needs_and_the_profile_lacks_is_named(
    lacking: dict[str, Any], knobs: dict[str, Any], told: str
):
    plan = plan_on(Tier.CPU, **{**RESIDENT, **knobs})
    model = CostModel(plan, machine(compute=replace(RATES, **lacking)))
    with pytest.raises(PolicyError) as caught:
        price(model, ops_of(plan, [step_of(plan)]))
    assert told in str(caught.value)
    assert "flexpipe profile" in str(caught.value)


def price(model: CostModel, ops: Sequence[Op]) -> None:
    for op in ops:
        model(op)


# -- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("doing", "calls"),
    [
        ([(8, 1), (9, 1), (20, 1)], 1),  # rows that decode attend together, whatever is behind them
        ([(0, 5), (0, 5), (0, 5)], 1),
        ([(0, 5), (0, 4), (0, 5)], 3),
        ([(8, 1), (0, 5), (8, 1)], 3),
        ([(8, 1), None, (8, 1)], 1),  # an empty place costs next to nothing
    ],
)
def test_neighbours_that_do_the_same_attend_in_one_call(
    doing: list[tuple[int, int] | None], calls: int
):
    plan = plan_on(Tier.CPU, **RESIDENT, micro_batch_size=3)
    rows = tuple(
        Row(place, place, what[0], (3,) * what[1], True)
        for place, what in enumerate(doing)
        if what is not None
    )
    batch = MicroBatch(0, rows)
    (op, *_) = [op for op in ops_of(plan, [(batch,)]) if is_layer(plan, op)]
    plain, dear = CostModel(plan, machine()), CostModel(plan, machine(overhead_s={"group": 1.0}))
    assert dear(op).seconds - plain(op).seconds == pytest.approx(calls - 1)


def is_layer(plan: Plan, op: Op) -> bool:
    return op.kind == Kind.COMPUTE and plan.layers[op.layer].layer is not None
