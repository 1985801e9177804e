"""Order of work, claimed on ops: what must come before what, and what need not."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.plan.plan import Plan
from flexpipe.plan.policy import STRATEGIES, Shares
from flexpipe.plan.tier import Tier
from flexpipe.schedule.build import ScheduleBuilder, schedule
from flexpipe.schedule.check import Graph
from flexpipe.schedule.op import Kind, Op, Pool, Segment
from flexpipe.schedule.step import MicroBatch, Row
from tests.schedule.plans import (
    MicroBatches,
    ops_of,
    plans,
    step_of,
    steps_for,
    tiny_config,
    tiny_plan,
)

CPU, GPU, DISK = Shares(cpu=1.0), Shares(gpu=1.0), Shares(disk=1.0)
STREAMED = {"weights": CPU, "kv_cache": CPU, "hidden": GPU}


class Found:
    """Looks ops up by what they are."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops, self.graph = ops, Graph(ops)

    def op(
        self,
        kind: Kind,
        layer: int,
        mb: int | None = None,
        step: int | None = None,
        segment: Segment | None = None,
    ) -> Op:
        """The first such op."""
        return next(
            op
            for op in self.ops
            if (op.kind, op.layer, op.mb) == (kind, layer, mb)
            and step in (None, op.step)
            and segment in (None, op.segment)
        )

    def ordered(self, first: Op, second: Op) -> bool:
        return self.graph.must_precede(first, second)


def built(plan: Plan, num_steps: int = 2) -> Found:
    return Found(ops_of(plan, [step_of(plan)] * num_steps))


def kinds(ops: Sequence[Op], *, step: int, layer: int) -> list[Kind]:
    return [op.kind for op in ops if (op.step, op.layer) == (step, layer)]


# -- the issue order ------------------------------------------------------------------------------


@given(data=st.data())
def test_an_op_appears_after_everything_it_waits_for(data):
    plan = data.draw(plans())
    seen: set[int] = set()
    for op in ops_of(plan, data.draw(steps_for(plan))):
        assert op.id not in seen
        assert all(wait.op in seen for wait in op.waits_for)
        seen.add(op.id)


@given(data=st.data())
def test_every_layer_is_computed_once_for_every_micro_batch_that_has_rows(data):
    plan = data.draw(plans())
    steps = data.draw(steps_for(plan))
    computed = Counter(
        (op.step, op.layer, op.mb)
        for op in ops_of(plan, steps)
        if op.kind == Kind.COMPUTE and op.segment in (None, Segment.OUT)
    )
    expected = Counter(
        (index, layer.position, batch.index)
        for index, batches in enumerate(steps)
        for batch in batches
        for layer in plan.layers
        if layer.leaves_hidden or batch.num_sampled
    )
    assert computed == expected


@given(data=st.data())
def test_a_micro_batch_is_committed_once_a_step_and_sampled_if_it_asks_for_tokens(data):
    plan = data.draw(plans())
    steps = data.draw(steps_for(plan))
    ops = ops_of(plan, steps)
    for kind, wanted in ((Kind.COMMIT, False), (Kind.SAMPLE, True), (Kind.FETCH_TOKENS, True)):
        found = [(op.step, op.mb) for op in ops if op.kind == kind]
        assert found == [
            (index, batch.index)
            for index, batches in enumerate(steps)
            for batch in batches
            if batch.num_sampled or not wanted
        ]


@given(data=st.data(), strategy=st.sampled_from(STRATEGIES))
def test_strategies_add_edges_and_change_nothing_else(data, strategy):
    plan = data.draw(plans(strategy="event"))
    steps = data.draw(steps_for(plan))
    policy = dataclasses.replace(plan.policy, strategy=strategy)
    free = ops_of(plan, steps)
    graph = Graph(ops_of(dataclasses.replace(plan, policy=policy), steps))
    bound = [op for op in graph.ops if op.kind != Kind.BARRIER]
    assert [_what(op) for op in free] == [_what(op) for op in bound]
    twins = {op.id: twin for op, twin in zip(free, bound, strict=True)}
    for op in free:
        for wait in op.waits_for:
            assert graph.must_precede(twins[wait.op], twins[op.id])


def _what(op: Op) -> tuple[object, ...]:
    slots = (op.weight_slot, op.kv_slot, op.hidden_slot, op.embed_slot, op.stage_slot)
    what = (op.kind, op.segment, op.step, op.layer, op.mb)
    return (*what, op.reads, op.writes, slots, op.attention_slot)


# -- overlap --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "ordered"),
    [("none", True), ("single", False), ("multi", False), ("event", False)],
)
def test_the_next_layers_weights_are_loaded_beside_this_layers_compute(strategy, ordered):
    found = built(tiny_plan(**STREAMED, micro_batch_size=2, strategy=strategy))
    load, compute = found.op(Kind.LOAD_WEIGHT, 3, None), found.op(Kind.COMPUTE, 2, 0)
    assert found.ordered(load, compute) or found.ordered(compute, load) is ordered
    if not ordered:
        assert not found.ordered(load, compute)


@pytest.mark.parametrize(
    ("strategy", "ordered"),
    [("none", True), ("single", True), ("multi", True), ("event", False)],
)
def test_a_slow_load_holds_back_the_layer_before_its_own_only_with_barriers(strategy, ordered):
    """With one barrier per layer, layer j + 1 starts once the load of j + 2 is there as well."""
    found = built(tiny_plan(**STREAMED, micro_batch_size=2, prefetch_depth=2, strategy=strategy))
    ahead, compute = found.op(Kind.LOAD_WEIGHT, 4, None), found.op(Kind.COMPUTE, 3, 0)
    assert found.ordered(ahead, compute) is ordered


@pytest.mark.parametrize(
    ("strategy", "ordered"),
    [("none", True), ("single", False), ("multi", True), ("event", False)],
)
def test_a_cache_store_holds_back_the_compute_after_next_only_with_a_barrier(strategy, ordered):
    plan = tiny_plan(**STREAMED, micro_batch_size=2, num_micro_batches=3, strategy=strategy)
    found = built(plan)
    store, compute = found.op(Kind.STORE_CACHE, 1, 0), found.op(Kind.COMPUTE, 1, 2)
    assert found.ordered(store, compute) is ordered


@pytest.mark.parametrize(("strategy", "ordered"), [("none", True), ("multi", False)])
def test_loads_and_stores_run_beside_the_compute_of_another_micro_batch(strategy, ordered):
    plan = tiny_plan(**STREAMED, micro_batch_size=2, num_micro_batches=3, strategy=strategy)
    found = built(plan)
    compute = found.op(Kind.COMPUTE, 1, 1)
    for other in (found.op(Kind.LOAD_CACHE, 1, 2), found.op(Kind.STORE_CACHE, 1, 0)):
        assert (found.ordered(other, compute) or found.ordered(compute, other)) is ordered


def test_none_is_a_chain():
    plan = tiny_plan(**STREAMED, micro_batch_size=2, num_micro_batches=2, strategy="none")
    ops = ops_of(plan, [step_of(plan)] * 2)
    for before, op in itertools.pairwise(ops):
        assert [wait.op for wait in op.waits_for] == [before.id]


def test_only_barriers_and_chains_are_called_strategy():
    for strategy in STRATEGIES:
        ops = ops_of(plan := tiny_plan(**STREAMED, strategy=strategy), [step_of(plan)])
        barriers = [op for op in ops if op.kind == Kind.BARRIER]
        assert bool(barriers) is (strategy in ("single", "multi"))
        reasons = {wait.why for op in ops for wait in op.waits_for}
        assert ("strategy" in reasons) is (strategy != "event")


# -- attention on the CPU -------------------------------------------------------------------------

APART = {"weights": CPU, "hidden": GPU, "cpu_attention": True}


@pytest.mark.parametrize(("strategy", "ordered"), [("none", True), ("event", False)])
def test_the_cpu_attends_beside_the_device_and_the_next_layers_load(strategy, ordered):
    half = Shares(gpu=0.5, cpu=0.5)
    plan = tiny_plan(
        **APART, kv_cache=half, micro_batch_size=2, num_micro_batches=3, strategy=strategy
    )
    found = built(plan)
    there = found.op(Kind.ATTEND_CPU, 1, 0)
    for other in (
        found.op(Kind.COMPUTE, 1, 0, segment=Segment.ATTEND),
        found.op(Kind.LOAD_WEIGHT, 2, None),
        found.op(Kind.COMPUTE, 1, 1, segment=Segment.QKV),
    ):
        assert (found.ordered(there, other) or found.ordered(other, there)) is ordered


def test_a_layer_whose_rows_attend_on_the_cpu_moves_queries_and_no_cache():
    plan = tiny_plan(**APART, kv_cache=CPU, micro_batch_size=7)
    found = built(plan, num_steps=1)
    made = [(op.kind, op.segment) for op in found.ops if op.layer == 2 and op.batch is not None]
    assert made == [
        (Kind.COMPUTE, Segment.QKV),
        (Kind.MOVE_QUERY, None),
        (Kind.ATTEND_CPU, None),
        (Kind.MOVE_OUTPUT, None),
        (Kind.COMPUTE, Segment.OUT),
    ]
    before, after = (
        found.op(Kind.COMPUTE, 2, 0, segment=part) for part in (Segment.QKV, Segment.OUT)
    )
    path = [before, *(found.op(kind, 2, 0) for kind, part in made if part is None), after]
    assert all(found.ordered(*pair) for pair in itertools.pairwise(path))


def test_prompts_attend_on_the_device_whatever_decodes_beside_them():
    plan = tiny_plan(**APART, kv_cache=CPU, micro_batch_size=7)
    rows = [Row(0, 0, 8, (3,), True), Row(1, 1, 8, (3, 4, 5), False)]
    ops = ops_of(plan, [(MicroBatch(0, tuple(rows)),)])
    kinds = [op.kind for op in ops if op.layer == 1]
    assert {Kind.LOAD_CACHE, Kind.STORE_CACHE, Kind.ATTEND_CPU} <= set(kinds)


@pytest.mark.parametrize(
    "knobs", [{"tier": Tier.CPU, "weights": CPU, "hidden": CPU}, {"kv_cache": GPU}]
)
def test_attention_stays_where_the_cache_is_beside_the_device_anyway(knobs):
    plan = tiny_plan(**{**APART, "kv_cache": CPU, **knobs})
    assert not plan.attends_on_cpu
    assert Kind.ATTEND_CPU not in {op.kind for op in ops_of(plan, [step_of(plan)])}


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prefetch_crosses_steps(strategy):
    """The next step's first weights are issued before this step's tokens are known."""
    found = built(tiny_plan(**STREAMED, micro_batch_size=7, strategy=strategy))
    commit = found.op(Kind.COMMIT, found.ops[-1].layer, 0, step=0)
    loads = [op for op in found.ops if op.kind == Kind.LOAD_WEIGHT and op.layer == 1]
    assert len(loads) == 3  # before the first step, and in both for the one after
    assert loads[1].id < commit.id
    if strategy == "event":
        assert not found.ordered(commit, loads[1])


@given(
    depth=st.integers(1, 12),
    layers=st.integers(1, 5),
    weights=st.sampled_from([CPU, DISK, Shares(gpu=0.5, disk=0.5), Shares(gpu=0.8, cpu=0.2)]),
    separate=st.booleans(),
)
def test_weights_of_a_layer_are_in_its_slot_whatever_the_prefetch_depth(
    depth, layers, weights, separate
):
    """Also when all layers fit in the slots, and when it asks for more than there are."""
    config = tiny_config(num_hidden_layers=layers)
    plan = tiny_plan(config=config, weights=weights, prefetch_depth=depth, separate_layers=separate)
    in_slot: dict[int, int] = {}
    loads = computes = 0
    for op in ops_of(plan, [step_of(plan)] * 3):
        if op.kind == Kind.LOAD_WEIGHT:
            in_slot[op.weight_slot] = op.layer
            loads += 1
        if op.kind == Kind.COMPUTE and op.weight_slot is not None:
            assert in_slot[op.weight_slot] == op.layer
            computes += 1
    assert len(in_slot) <= plan.num_weight_slots <= depth + 1
    assert 0 <= loads - computes <= plan.num_weight_slots


def test_a_load_is_issued_as_many_layers_ahead_as_the_prefetch_depth():
    for depth in (1, 2):
        plan = tiny_plan(weights=CPU, prefetch_depth=depth)
        ops = ops_of(plan, [step_of(plan)] * 2)
        for op in ops:
            if op.kind == Kind.LOAD_WEIGHT and op.step == 1:
                computed = [o.layer for o in ops if o.kind == Kind.COMPUTE and o.id < op.id]
                streamed = [layer.position for layer in plan.streamed_layers]
                last = max(range(len(computed)), key=lambda i: (computed[i] in streamed, i))
                ahead = streamed.index(op.layer) - streamed.index(computed[last])
                assert ahead % len(streamed) == (depth + 1) % len(streamed)


def test_disk_weights_are_two_hops_to_an_accelerator_and_one_on_the_cpu():
    ops = ops_of(plan := tiny_plan(weights=DISK), [step_of(plan)])
    reads = [op for op in ops if op.kind == Kind.READ_WEIGHT]
    loads = [op for op in ops if op.kind == Kind.LOAD_WEIGHT]
    assert [op.layer for op in reads] == [op.layer for op in loads]
    assert all(op.stage_slot is not None and op.weight_slot is None for op in reads)
    on_cpu = ops_of(plan := tiny_plan(weights=DISK, tier=Tier.CPU), [step_of(plan)])
    assert Kind.LOAD_WEIGHT not in {op.kind for op in on_cpu}
    assert all(op.weight_slot is not None for op in on_cpu if op.kind == Kind.READ_WEIGHT)


def test_resident_weights_are_never_loaded():
    ops = ops_of(plan := tiny_plan(weights=GPU), [step_of(plan)] * 2)
    moved = {Kind.READ_WEIGHT, Kind.LOAD_WEIGHT, Kind.READ_EMBED, Kind.LOAD_EMBED}
    assert not moved & {op.kind for op in ops}


# -- KV cache and hidden --------------------------------------------------------------------------


def test_nothing_is_loaded_for_rows_without_a_past():
    plan = tiny_plan(kv_cache=Shares(cpu=0.5, disk=0.5), hidden=GPU, micro_batch_size=7)
    prefill, decode = step_of(plan, context=0, tokens=3), step_of(plan, context=3)
    ops = ops_of(plan, [prefill, decode])
    loads = {Kind.READ_CACHE, Kind.LOAD_CACHE}
    assert not [op for op in ops if op.step == 0 and op.kind in loads]
    for layer in (1, 2, 3):
        assert loads < set(kinds(ops, step=1, layer=layer))


@pytest.mark.parametrize(
    ("tier", "kv", "expected"),
    [
        (Tier.GPU, GPU, []),
        (Tier.GPU, CPU, [Kind.LOAD_CACHE, Kind.COMPUTE, Kind.STORE_CACHE]),
        (
            Tier.GPU,
            DISK,
            [Kind.READ_CACHE, Kind.LOAD_CACHE, Kind.COMPUTE, Kind.STORE_CACHE, Kind.WRITE_CACHE],
        ),
        (Tier.CPU, CPU, []),
        (Tier.CPU, DISK, [Kind.READ_CACHE, Kind.COMPUTE, Kind.WRITE_CACHE]),
    ],
)
def test_the_kv_cache_takes_one_hop_per_link_in_order(tier, kv, expected):
    home = Shares(**{tier.value: 1.0})
    found = built(tiny_plan(tier=tier, weights=home, kv_cache=kv, hidden=home))
    ops = [op for op in found.ops if op.layer == 2 and op.step == 1]
    if not expected:
        assert [op.kind for op in ops] == [Kind.COMPUTE]
        return
    assert [op.kind for op in sorted(ops, key=lambda op: op.id)] == expected
    for before, after in itertools.pairwise(ops):
        assert found.ordered(before, after)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("tier", "hidden", "loads", "stores"),
    [
        (Tier.GPU, GPU, 0, 0),
        (Tier.GPU, CPU, 1, 1),
        (Tier.GPU, DISK, 2, 2),
        (Tier.CPU, CPU, 0, 0),
        (Tier.CPU, DISK, 1, 1),
    ],
)
def test_hidden_off_the_device_is_loaded_before_and_stored_after_every_layer(
    count, tier, hidden, loads, stores
):
    near = Shares(**{tier.value: 1.0})
    plan = tiny_plan(
        tier=tier,
        weights=near,
        kv_cache=near,
        hidden=hidden,
        micro_batch_size=1,
        num_micro_batches=count,
    )
    ops = ops_of(plan, [step_of(plan)])
    moves_in = {Kind.READ_HIDDEN, Kind.LOAD_HIDDEN}
    moves_out = {Kind.STORE_HIDDEN, Kind.WRITE_HIDDEN}
    for layer in plan.layers:
        there = kinds(ops, step=0, layer=layer.position)
        assert sum(kind in moves_in for kind in there) == loads * count * layer.takes_hidden
        assert sum(kind in moves_out for kind in there) == stores * count * layer.leaves_hidden


@pytest.mark.parametrize("count", [2, 3])
def test_hidden_of_the_next_micro_batch_is_loaded_before_this_one_is_computed(count):
    plan = tiny_plan(
        weights=GPU, kv_cache=GPU, hidden=CPU, micro_batch_size=1, num_micro_batches=count
    )
    found = built(plan)
    compute = found.op(Kind.COMPUTE, 2, 0)
    ahead = found.op(Kind.LOAD_HIDDEN, 2, 1)
    assert ahead.id < compute.id
    assert not found.ordered(compute, ahead)


def test_a_single_micro_batch_loads_its_hidden_after_it_was_stored():
    plan = tiny_plan(weights=GPU, kv_cache=GPU, hidden=CPU, micro_batch_size=7)
    found = built(plan)
    assert found.ordered(found.op(Kind.STORE_HIDDEN, 1, 0), found.op(Kind.LOAD_HIDDEN, 2, 0))


# -- tokens ---------------------------------------------------------------------------------------


def test_a_micro_batchs_next_step_waits_only_for_its_own_commit():
    plan = tiny_plan(weights=GPU, kv_cache=GPU, hidden=GPU, micro_batch_size=1, num_micro_batches=3)
    found = built(plan)
    head = len(plan.layers) - 1
    for mb in range(3):
        begins = found.op(Kind.COMPUTE, 0, mb, step=1)
        for other in range(3):
            commit = found.op(Kind.COMMIT, head, other, step=0)
            assert found.ordered(commit, begins) is (mb == other)


def test_a_step_that_samples_nothing_skips_the_head_but_is_committed():
    plan = tiny_plan(weights=GPU, kv_cache=GPU, hidden=GPU, micro_batch_size=7)
    found = Found(ops_of(plan, [step_of(plan, context=0, tokens=5, sampled=False)]))
    head = len(plan.layers) - 1
    assert kinds(found.ops, step=0, layer=head) == [Kind.COMMIT]
    commit = found.op(Kind.COMMIT, head, 0)
    assert found.ordered(found.op(Kind.COMPUTE, head - 1, 0), commit)


def test_a_sliced_head_is_computed_slice_by_slice_before_it_is_sampled():
    plan = tiny_plan(config=tiny_config(vocab_size=2000), weights=CPU, micro_batch_size=7)
    heads = [layer.position for layer in plan.layers if not layer.leaves_hidden]
    assert len(heads) > 2
    found = built(plan)
    sample = found.op(Kind.SAMPLE, heads[-1], 0)
    for head in heads:
        assert found.ordered(found.op(Kind.COMPUTE, head, 0), sample)
    fetches = [op for op in found.ops if op.kind == Kind.LOAD_HIDDEN and op.layer in heads[1:]]
    assert not fetches


# -- as a stream ----------------------------------------------------------------------------------


def batch(index: int) -> MicroBatch:
    return MicroBatch(index, (Row(0, 0, 4, (3,), True),))


def test_weights_are_issued_before_the_first_step_is_known():
    plan = tiny_plan(weights=CPU, micro_batch_size=7)
    asked: list[int] = []

    def steps(index: int) -> MicroBatches | None:
        asked.append(index)
        return None

    first = list(schedule(plan, steps))
    assert asked == [0]
    assert {op.kind for op in first if op} == {Kind.LOAD_WEIGHT}


def test_not_yet_is_passed_on_and_delays_only_what_needs_it():
    plan = tiny_plan(weights=GPU, micro_batch_size=1, num_micro_batches=2)
    builder = ScheduleBuilder(plan)
    stream = list(builder.visit(0, 0, iter([batch(0), None, None, batch(1)])))
    blanks = [index for index, op in enumerate(stream) if op is None]
    assert len(blanks) == 2
    assert {op.mb for op in stream[: blanks[0]] if op} == {0}
    assert {op.mb for op in stream[blanks[-1] :] if op} == {0, 1}


def test_a_step_without_rows_leaves_its_load_to_the_next():
    """Loads are issued before the rows are known, but never twice for one layer."""
    plan = tiny_plan(weights=CPU, micro_batch_size=7)
    ops = ops_of(plan, [(), step_of(plan), (), (), step_of(plan)])
    plain = ops_of(plan, [step_of(plan), step_of(plan)])
    assert [(op.kind, op.layer) for op in ops][: len(plain)] == [
        (op.kind, op.layer) for op in plain
    ]
    assert not list(ScheduleBuilder(tiny_plan(weights=GPU)).visit(0, 0, iter([])))


def test_slots_stay_within_their_pools():
    plan = tiny_plan(
        weights=DISK, kv_cache=DISK, hidden=DISK, micro_batch_size=1, num_micro_batches=5
    )
    limits = {pool.name: pool.num_slots for pool in plan.pools}
    for op in ops_of(plan, [step_of(plan)] * 2):
        assert (op.weight_slot or 0) < limits["weight slots"]
        assert (op.kv_slot or 0) < limits["KV slots"]
        assert (op.hidden_slot or 0) < limits["hidden slots"]
        assert (op.embed_slot or 0) < limits["embedding slots"]
        assert (op.stage_slot or 0) < 2


def test_edges_that_others_imply_are_left_out():
    plan = tiny_plan(weights=DISK, kv_cache=DISK, hidden=DISK, micro_batch_size=2)
    ops = ops_of(plan, [step_of(plan)] * 3)
    for op in ops:
        waits = [wait.op for wait in op.waits_for]
        assert len(waits) == len(set(waits))
        graph = Graph(ops)
        by_id = {other.id: other for other in ops}
        for one in waits:
            for other in waits:
                assert one == other or not graph.must_precede(by_id[one], by_id[other])
        if op.id > 150:
            break


def test_a_slot_is_refilled_only_after_its_last_reader():
    plan = tiny_plan(**STREAMED, micro_batch_size=2, num_micro_batches=3)
    found = built(plan, 3)
    last_use: dict[int, list[Op]] = {}
    for op in found.ops:
        if op.kind == Kind.COMPUTE and op.weight_slot is not None:
            last_use.setdefault(op.weight_slot, []).append(op)
        if op.kind == Kind.LOAD_WEIGHT:
            for reader in last_use.pop(op.weight_slot, []):
                assert found.ordered(reader, op)
    assert any((Pool.WEIGHT_SLOT, 0, 0, 0) in op.writes for op in found.ops)
