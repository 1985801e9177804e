"""What is known before a byte moves: layers, pools, budgets, and words for what does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PlanError
from flexpipe.model.config import DTYPE_BYTES
from flexpipe.model.families import read_config
from flexpipe.plan.block import Need
from flexpipe.plan.layer import LayerKind
from flexpipe.plan.plan import PROCESS_SLACK, Budgets, Plan, check_fits
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import OPTION_NAMES, Policy, Shares, percent_shares
from flexpipe.plan.rule import advice, choose_plan
from flexpipe.plan.tier import Tier
from flexpipe.units import GIB, MIB, parse_bytes
from tests.schedule.plans import NEEDS, plans, stored_tensors, tiny_config, tiny_plan

KIB = 1024
EVERYWHERE = percent_shares([20, 40, 30, 30, 30, 30])


def test_layers_come_in_the_order_of_use():
    names = [layer.name for layer in tiny_plan().layers]
    assert names == ["embed", "decoder 0", "decoder 1", "decoder 2", "head [0:320]"]


def test_separate_layers_are_attention_and_mlp():
    kinds = [
        layer.kind for layer in tiny_plan(weights=Shares(gpu=1.0), separate_layers=True).layers
    ]
    halves = [LayerKind.ATTENTION, LayerKind.MLP] * 3
    assert kinds == [LayerKind.EMBED, *halves, LayerKind.HEAD]


@given(plan=plans())
def test_every_tensor_is_used_from_its_home_by_exactly_its_layers(plan):
    resident = {part.tensor.spec.name for layer in plan.layers for part in layer.resident}
    streamed = {part.tensor.spec.name for layer in plan.layers for part in layer.streamed.parts}
    fetched = {plan.config.tensor_names["embed_tokens"]} if plan.embed_streams else set()
    assert resident | streamed | fetched == set(plan.placement.tensors)
    for name, tensor in plan.placement.tensors.items():
        assert (name in resident) == (tensor.home == plan.device_tier)


@given(plan=plans())
def test_the_slices_of_the_head_cover_the_vocabulary_and_fit_beside_the_layers(plan):
    slices = [layer for layer in plan.layers if layer.kind == LayerKind.HEAD]
    ends = [end for layer in slices for end in layer.vocab]
    assert ends[0] == 0 and ends[-1] == plan.config.vocab_size
    assert ends[1:-1:2] == ends[2::2]
    assert [layer.takes_hidden for layer in slices] == [True] + [False] * (len(slices) - 1)
    sizes = [layer.vocab[1] - layer.vocab[0] for layer in slices]
    assert max(sizes) - min(sizes) < len(sizes) or len(sizes) == 1  # no crumbs


def test_a_streamed_head_is_cut_to_the_size_of_a_layer_even_beside_a_large_embedding():
    for tied in (False, True):
        config = tiny_config(vocab_size=2000, tie_word_embeddings=tied)
        plan = tiny_plan(config=config, weights=Shares(disk=1.0))
        heads = [layer for layer in plan.layers if layer.kind == LayerKind.HEAD]
        layer = next(item for item in plan.layers if item.kind == LayerKind.DECODER)
        assert len(heads) > 1
        for head in heads:  # the blocks at its ends and the final norm come on top
            assert head.streamed.num_bytes <= layer.streamed.num_bytes + 2 * 4096


@given(plan=plans())
def test_slots_hold_what_their_largest_user_brings(plan):
    pools = {(pool.name, pool.tier): pool for pool in plan.pools}
    device = plan.device_tier
    for layer in plan.layers:
        if layer.is_streamed:
            assert layer.streamed.num_bytes <= pools["weight slots", device].slot_bytes
        if layer.reads_disk and plan.streams_to_device:
            assert layer.streamed.read_bytes <= pools["weight staging", Tier.CPU].slot_bytes
    for mb in plan.micro_batches:
        if plan.slot_places(mb):
            rows = len(plan.slot_places(mb))
            assert (
                rows * mb.region_tokens * plan.token_bytes <= pools["KV slots", device].slot_bytes
            )
        if mb.hidden_home != device:
            assert plan.hidden_bytes(mb) <= pools["hidden slots", device].slot_bytes


@given(plan=plans())
def test_homes_hold_every_row_and_every_hidden_to_the_byte(plan):
    homes = {pool.tier: pool.num_bytes for pool in plan.pools if pool.name == "KV cache"}
    hidden = {pool.tier: pool.num_bytes for pool in plan.pools if pool.name == "hidden"}
    for tier in Tier:
        rooms = sum(
            len(mb.places(tier)) * mb.region_bytes(tier, plan.token_bytes)
            for mb in plan.micro_batches
        )
        assert homes.get(tier, 0) == plan.config.num_layers * rooms
        mine = [plan.hidden_bytes(mb) for mb in plan.micro_batches if mb.hidden_home == tier]
        assert hidden.get(tier, 0) == sum(mine)


@given(plan=plans())
def test_a_tier_counts_its_pools_the_temporaries_and_the_process(plan):
    for tier in Tier:
        pools = sum(pool.num_bytes for pool in plan.pools if pool.tier == tier)
        extra = plan.tier_bytes(tier) - pools
        process = PROCESS_SLACK if tier == Tier.CPU else 0
        process += plan.placement.new_bytes if tier == Tier.DISK else 0
        assert extra == process + (plan.transient_bytes if tier == plan.device_tier else 0)
    if plan.device_tier == Tier.CPU:
        assert plan.tier_bytes(Tier.GPU) == 0


@pytest.mark.parametrize(("tier", "keeps"), [(Tier.CPU, True), (Tier.GPU, False)])
def test_a_cpu_keeps_kernels_for_the_numbers_of_rows_that_unlike_requests_bring(
    monkeypatch, tier, keeps
):
    monkeypatch.setattr("flexpipe.plan.stage.ONEDNN_ELEMENTS", 1)

    def process_bytes(needs: list[Need], *, never_stops: bool = False) -> int:
        plan = tiny_plan(tier=tier, needs=needs, micro_batch_size=4, never_stops=never_stops)
        pools = sum(pool.num_bytes for pool in plan.pools if pool.tier == Tier.CPU)
        own = plan.transient_bytes if tier == Tier.CPU else 0
        return plan.tier_bytes(Tier.CPU) - pools - own

    alike = [Need(8, 4)] * 20
    even = process_bytes(alike)
    few, many = (process_bytes([Need(9, 4), *alike[:count]]) for count in (7, 15))
    assert (even < few < many) if keeps else (even == few == many)
    prompts = [Need(count, 4) for count in range(5, 9)]  # that begin and end together
    stopping, full = (process_bytes(prompts, never_stops=flag) for flag in (False, True))
    assert (even < full < stopping) if keeps else (full == stopping)


def test_weights_that_stay_take_their_bytes_and_no_slots():
    config = tiny_config()
    plan = tiny_plan(config=config, weights=Shares(gpu=1.0))
    pools = {(pool.name, pool.tier): pool for pool in plan.pools}
    total = sum(
        t.spec.num_elements * DTYPE_BYTES["float32"] for t in plan.placement.tensors.values()
    )
    assert pools["weights", Tier.GPU].num_bytes == total
    assert not [name for name, _ in pools if "slot" in name and "weight" in name]


@pytest.mark.parametrize(("depth", "slots"), [(1, 2), (2, 3), (3, 4), (50, 4)])
def test_weight_slots_are_one_more_than_the_prefetch_depth_but_never_more_than_layers(depth, slots):
    plan = tiny_plan(weights=Shares(cpu=1.0), prefetch_depth=depth)
    assert len(plan.streamed_layers) == 4  # three decoders and the head
    assert plan.num_weight_slots == slots


# -- what does not fit ----------------------------------------------------------------------------


def planner(budgets: Budgets, tier: Tier = Tier.GPU, **changes: Any) -> Callable[[Policy], Plan]:
    config = tiny_config(**changes)
    return Planner(
        config,
        NEEDS,
        stored_tensors(config),
        budgets,
        device_tier=tier,
        compute_dtype="float32",
    )


def test_a_plan_that_fits_is_let_through():
    check_fits(tiny_plan(), "no advice needed")


def test_a_shortfall_names_the_tier_and_the_bytes_and_what_takes_them():
    budgets = Budgets(gpu=100 * KIB, cpu=GIB, disk=10 * KIB)
    plan = tiny_plan(percent_shares([20, 40, 30, 30, 100, 0]), budgets=budgets)
    needs = {tier: plan.tier_bytes(tier) for tier in Tier}
    assert plan.shortfalls() == {
        Tier.GPU: needs[Tier.GPU] - 100 * KIB,
        Tier.DISK: needs[Tier.DISK] - 10 * KIB,
    }
    with pytest.raises(PlanError) as error:
        check_fits(plan, "Buy more.")
    text = str(error.value)
    assert re.search(
        r"gpu needs [\d.]+ [KM]iB, [\d.]+ [KM]iB more than its budget of 100 KiB", text
    )
    assert re.search(
        r"disk needs [\d.]+ [KM]iB, [\d.]+ [KM]iB more than its budget of 10 KiB", text
    )
    assert "cpu needs" not in text
    assert "workspace" in text and "KV cache" in text and text.endswith("Buy more.")


def read_advice(text: str) -> dict[str, Any]:
    """The knobs that an advice spells, as the command line would read them."""
    found = re.fullmatch(r"This would fit: (.*)\.", text)
    assert found, text
    words = found.group(1).split()
    fields = {option: name for name, option in OPTION_NAMES.items() if option != "--percent"}
    knobs: dict[str, Any] = {}
    while words:
        option = words.pop(0)
        if option == "--percent":
            knobs |= percent_shares([float(words.pop(0)) for _ in range(6)])
        else:
            word = words.pop(0)
            knobs[fields[option]] = int(word) if word.isdigit() else word
    return knobs


BIG_BLOCK = {"micro_batch_size": 7, "num_micro_batches": 1, "max_batch_tokens": 2048}
ALL_ON_GPU = percent_shares([100, 0, 100, 0, 100, 0])


@settings(max_examples=25)
@given(
    gpu=st.integers(150 * KIB, 3 * MIB),
    cpu=st.integers(97 * MIB, 99 * MIB),
    asked=st.sampled_from([BIG_BLOCK, ALL_ON_GPU, {**BIG_BLOCK, **ALL_ON_GPU}, EVERYWHERE]),
    vocab=st.sampled_from([96, 2000]),
)
def test_advice_taken_fits(gpu, cpu, asked, vocab):
    make = planner(Budgets(gpu=gpu, cpu=cpu, disk=MIB), vocab_size=vocab)
    if not choose_plan(asked, make, Tier.GPU, len(NEEDS)).shortfalls():
        return
    text = advice(asked, make, Tier.GPU, len(NEEDS))
    if text.startswith("Nothing smaller would fit"):
        assert choose_plan({}, make, Tier.GPU, len(NEEDS)).shortfalls()
        return
    taken = {**asked, **read_advice(text)}
    assert not choose_plan(taken, make, Tier.GPU, len(NEEDS)).shortfalls(), text


def test_advice_changes_only_the_block_where_that_is_enough():
    roomy = planner(Budgets(gpu=GIB, cpu=GIB, disk=GIB), Tier.GPU)
    whole = roomy(Policy(**BIG_BLOCK, **ALL_ON_GPU)).tier_bytes(Tier.GPU)
    make = planner(Budgets(gpu=whole - 100 * KIB, cpu=GIB, disk=GIB), Tier.GPU)
    text = advice({**BIG_BLOCK, **ALL_ON_GPU}, make, Tier.GPU, len(NEEDS))
    assert "--gpu-batch-size" in text and "--percent" not in text


def test_advice_admits_that_nothing_fits():
    make = planner(Budgets(gpu=10 * KIB, cpu=MIB, disk=MIB))
    assert advice({}, make, Tier.GPU, 7).startswith("Nothing smaller would fit either; raise")


def test_bytes_are_those_of_the_real_shape(repo):
    """OPT-175B in fp16: 96 layers of 12 · 12288² parameters, 2 bytes each, and an embedding."""
    config = read_config(json.loads((repo / "policies/models/opt-175b.json").read_text()))
    make = Planner(
        config,
        [Need(512, 32)] * 8,
        stored_tensors(config),
        Budgets(gpu=2**50, cpu=2**50, disk=2**50),
        device_tier=Tier.GPU,
        compute_dtype="float16",
    )
    plan = make(Policy(weights=Shares(cpu=1.0), kv_cache=Shares(gpu=1.0), hidden=Shares(gpu=1.0)))
    pools = {(pool.name, pool.tier): pool.num_bytes for pool in plan.pools}
    matrices = (96 * 12 * 12288**2 + 50272 * 12288) * 2
    assert 1 <= pools["weights", Tier.CPU] / matrices < 1.001
    assert pools["KV cache", Tier.GPU] == 96 * 8 * 544 * 2 * 12288 * 2
    slot = 12 * 12288**2 * 2
    assert 2 <= pools["weight slots", Tier.GPU] / slot < 2.001


def test_sizes_in_messages_can_be_given_back_as_budgets():
    assert parse_bytes("10KiB") == 10 * KIB
