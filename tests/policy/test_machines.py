"""Machines on paper: what the files in policies/hardware say is possible, complete and sourced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from flexpipe.model.families import read_config
from flexpipe.plan.block import Need
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy, Shares
from flexpipe.plan.policy_file import PolicyFile
from flexpipe.plan.tier import Tier
from flexpipe.policy.profile import OVERHEADS, Profile, Rates, read_profile
from flexpipe.preset import find_preset, hardware_file, policy_file, preset_names
from flexpipe.units import GIB
from tests.schedule.plans import stored_tensors


@dataclass(frozen=True)
class DataSheet:
    """What the vendor claims: GB of memory, GB/s of it and of the host link, TFLOP/s."""

    memory: float
    memory_rate: float
    link: float
    half: float
    single: float


DATA_SHEETS = {
    "t4-gcp": DataSheet(16, 320, 15.8, 65, 8.1),
    "rtx-3090": DataSheet(25.8, 936, 31.5, 71, 35.6),  # 24 GiB
    "rtx-4090": DataSheet(25.8, 1008, 31.5, 165, 82.6),
    "a100-80g": DataSheet(85.9, 1935, 31.5, 312, 19.5),  # 80 GiB
    "h100": DataSheet(85.9, 3350, 63, 989, 67),
    "h200": DataSheet(151, 4800, 63, 989, 67),
    "8xh100": DataSheet(85.9, 3350, 63, 989, 67),
}
NUMBER_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@pytest.fixture(params=list(DATA_SHEETS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(name: str) -> Profile:
    return read_profile(hardware_file(name))


def test_every_accelerator_on_paper_is_checked_against_its_data_sheet() -> None:
    profiles = {name: read_profile(hardware_file(name)) for name in preset_names("hardware")}
    assert {name for name, profile in profiles.items() if not profile.is_cpu} == set(DATA_SHEETS)
    assert all(profile.name == name for name, profile in profiles.items())


def test_no_rate_exceeds_the_data_sheet(name: str, machine: Profile) -> None:
    sheet, rates = DATA_SHEETS[name], machine.compute
    for dtype, surface in rates.matmul.items():
        peak = sheet.single if dtype == "float32" else sheet.half
        assert surface.rate(1e8, 1) <= 2 / NUMBER_BYTES[dtype] * sheet.memory_rate * 1e9
        assert 0.2 * peak * 1e12 < surface.rate(1e8, 4096) < peak * 1e12
        assert rates.prefill_attention[dtype].rate(4096) < surface.rate(1e8, 4096)
        assert rates.decode_attention[dtype].rate(1e9) < sheet.memory_rate * 1e9
        passed = rates.elementwise[dtype].rate(1e9) * 2 * NUMBER_BYTES[dtype]
        assert passed < sheet.memory_rate * 1e9
    for link in ("h2d", "d2h"):
        assert machine.links[link].rate(1e9) < sheet.link * 1e9


def test_each_memory_is_larger_and_each_way_to_it_slower_than_the_one_before(
    name: str, machine: Profile
) -> None:
    sheet, memory, links = DATA_SHEETS[name], machine.memory, machine.links
    assert 0.8 * sheet.memory * 1e9 < memory[Tier.GPU] < 0.97 * sheet.memory * 1e9
    assert memory[Tier.GPU] < memory[Tier.CPU] < memory[Tier.DISK]
    device = machine.compute.decode_attention["float16"].rate(1e9)
    host = machine.on_host.decode_attention["float16"].rate(1e9)
    assert device > 3 * host
    assert device > links["h2d"].rate(1e9) > links["disk_read"].rate(1e9)
    assert links["disk_read"].rate(1e9) > links["disk_write"].rate(1e9)


def test_a_roofline_is_bound_by_memory_at_few_rows_and_flat_at_many(machine: Profile) -> None:
    for surface in machine.compute.matmul.values():
        few = [surface.rate(1e8, rows) for rows in (1, 2, 8)]
        assert few == pytest.approx([few[0], 2 * few[0], 8 * few[0]], rel=0.02)
        assert surface.rate(1e8, 1024) == surface.rate(1e8, 65536)


def test_every_dtype_a_machine_multiplies_is_priced_throughout(machine: Profile) -> None:
    rates = machine.compute
    dtypes = set(rates.matmul)
    for of_dtype in (
        rates.prefill_attention,
        rates.decode_attention,
        rates.elementwise,
        rates.sample,
        machine.on_host.decode_attention,
        machine.load,
    ):
        assert set(of_dtype) == dtypes
    assert set(rates.widen) == {f"{bits}>{dtype}" for bits in (4, 8) for dtype in dtypes}
    assert set(rates.convert) == {f"{a}>{b}" for a in dtypes for b in dtypes if a != b}
    assert set(rates.compress) == {"4", "8"}
    assert set(machine.overhead_s) == set(OVERHEADS)
    assert isinstance(machine.host, Rates)


def test_every_figure_on_paper_tells_its_source(name: str) -> None:
    lines = hardware_file(name).read_text(encoding="utf-8").splitlines()
    figures = [line for line in lines if line.startswith("  ") and not line.rstrip().endswith(":")]
    assert len(figures) > 20
    assert [line for line in figures if " # " not in line] == []


PUBLISHED: Mapping[str, tuple[str, str, int]] = {  # model, throughput, prompts of one block
    "flexgen-opt-30b-t4": ("opt-30b", "7.32", 144),
    "flexgen-opt-30b-t4-no-overlap": ("opt-30b", "5.86", 144),
    "flexgen-opt-30b-t4-no-cpu-attention": ("opt-30b", "4.03", 144),
    "flexgen-opt-175b-t4": ("opt-175b", "0.69", 256),
}


@pytest.mark.parametrize("name", preset_names(""))
def test_every_policy_preset_is_a_legal_policy(name: str) -> None:
    Policy(**PolicyFile.read(policy_file(name)).knobs)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_flexgens_policies_fit_the_machine_they_were_published_for(name: str) -> None:
    model, throughput, prompts = PUBLISHED[name]
    text = policy_file(name).read_text(encoding="utf-8")
    policy = Policy(**PolicyFile.read(policy_file(name)).knobs)
    assert throughput in text.partition("weights:")[0] and "2303.06865" in text
    assert policy.micro_batch_size * policy.num_micro_batches == prompts
    assert _plan(model, policy, prompts).shortfalls() == {}


def test_the_twenty_percent_flexgen_was_asked_for_do_not_fit_its_machine() -> None:
    given = PolicyFile.read(policy_file("flexgen-opt-30b-t4")).knobs
    asked = given | {"weights": Shares(gpu=0.2, cpu=0.8), "max_batch_tokens": 2048}
    missing = _plan("opt-30b", Policy(**asked), 144).shortfalls()
    assert set(missing) == {Tier.GPU} and GIB < missing[Tier.GPU] < 3 * GIB


def test_the_ablations_change_what_they_say_of_flexgens_policy() -> None:
    full, none, on_gpu = (
        PolicyFile.read(policy_file(f"flexgen-opt-30b-t4{ending}")).knobs
        for ending in ("", "-no-overlap", "-no-cpu-attention")
    )
    assert none == full | {"strategy": "none"}
    assert on_gpu == full | {"cpu_attention": False, "pin_weights": False}


def _plan(model: str, policy: Policy, prompts: int) -> Plan:
    memory = read_profile(hardware_file("t4-gcp")).memory
    config = read_config(json.loads(find_preset("models", model).read_text(encoding="utf-8")))
    budgets = Budgets(gpu=memory[Tier.GPU], cpu=memory[Tier.CPU], disk=memory[Tier.DISK])
    planner = Planner(
        config,
        [Need(512, 32)] * prompts,
        stored_tensors(config),
        budgets,
        device_tier=Tier.GPU,
        compute_dtype="float16",
    )
    return planner(policy)
