"""A policy as a file: complete, readable, and the same when it is read back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe.errors import PolicyError
from flexpipe.plan.policy import (
    COMPRESSIONS,
    COMPUTE_DTYPES,
    RESIDENT_DTYPES,
    STRATEGIES,
    Policy,
    Shares,
)
from flexpipe.plan.policy_file import (
    COMMON,
    MadeFor,
    PolicyFile,
    render_policy,
    render_stages,
    write_whole,
)
from flexpipe.policy.shares import tidy
from tests.schedule.plans import tiny_config

TINY = MadeFor.of("a tiny: model", tiny_config())
PARTS = st.tuples(*[st.floats(0, 1)] * 3).filter(any)


def parted(parts: tuple[float, float, float]) -> Shares:
    gpu, cpu, disk = (part / sum(parts) for part in parts)
    return Shares(gpu=gpu, cpu=cpu, disk=disk)


SHARES = PARTS.map(parted)
SIZES = st.none() | st.integers(0, 2**45) | st.integers(0, 500).map(lambda number: number * 2**20)
POLICIES = st.builds(
    Policy,
    weights=SHARES,
    kv_cache=SHARES,
    hidden=SHARES,
    micro_batch_size=st.integers(1, 128),
    num_micro_batches=st.integers(1, 99),
    strategy=st.sampled_from(STRATEGIES),
    separate_layers=st.booleans(),
    pin_weights=st.booleans(),
    prefetch_depth=st.integers(1, 9),
    compute_dtype=st.sampled_from(COMPUTE_DTYPES),
    resident_dtype=st.sampled_from(RESIDENT_DTYPES),
    compress_weight=st.sampled_from(COMPRESSIONS),
    compress_vocabulary=st.sampled_from(COMPRESSIONS),
    compress_cache=st.sampled_from(COMPRESSIONS),
    compress_group=st.sampled_from([32, 64, 256]),
    cpu_attention=st.booleans(),
    max_batch_tokens=st.integers(128, 9999),
    gpu_mem=SIZES,
    cpu_mem=SIZES,
    disk_mem=SIZES,
)


@settings(max_examples=30)
@given(policy=POLICIES)
def test_what_is_written_reads_back_to_the_same_policy(policy: Policy) -> None:
    text = render_policy(policy, TINY, ["Found somewhere", "", "# odd: words"])
    read = PolicyFile.of(yaml.safe_load(text))
    assert Policy(**read.knobs) == policy
    assert read.made_for == TINY
    assert set(read.knobs) == set(Policy.__dataclass_fields__)


@given(parts=PARTS)
def test_tidy_shares_are_the_same_to_a_millionth_and_stay_short_in_a_file(parts: Any) -> None:
    shares = parted(parts)
    neat = tidy({tier: shares.of(tier) for tier in shares.tiers})
    assert all(abs(neat.of(tier) - shares.of(tier)) < 2e-6 for tier in shares.tiers)
    assert all(len(repr(neat.of(tier))) <= len("0.123456") for tier in neat.tiers)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_values_make_a_policy_file(tmp_path: Path, strategy: str) -> None:
    policy = Policy(strategy=strategy, weights=Shares(gpu=0.3, cpu=0.7), gpu_mem=2**30)  # type: ignore[arg-type]
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(policy.to_dict()))
    assert Policy(**PolicyFile.read(path).knobs) == policy
    assert PolicyFile.read(path).made_for is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("micro_batch_sise: 4", "did you mean micro_batch_size"),
        ("weights: {gpu: 0.5, cpu: 0.6}", "add up to 1"),
        ("weights: {gpu: 1.5, cpu: -0.5}", "a share lies between 0 and 1"),
        ("weights: 0.5", "weights maps gpu, cpu and disk"),
        ("weights: {gpu: 1.0, ram: 0.0}", "weights maps gpu, cpu and disk"),
        ("separate_layers: 1", "separate_layers is true or false"),
        ("gpu_mem: lots", "lots"),
        ("gpu_mem: 3 GB/s", "as a size; write it like 22GiB"),
        ("cpu_mem: -4", "a size cannot be negative"),
        ("cpu_mem: -4GiB", "as a size"),
        ("made_for: opt-30b", "made_for holds model, num_layers, hidden_size"),
        ("made_for: {model: opt-30b}", "made_for holds model, num_layers, hidden_size"),
        ("- 1", "must map field names"),
        ("a: [", "is not a YAML file"),
        ("a: b: c", "is not a YAML file"),
    ],
)
def test_a_wrong_policy_file_is_refused_in_a_line_with_its_name_and_the_field(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message) as error:
        PolicyFile.read(path)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_policy_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"cannot read the policy file .*none\.yaml"):
        PolicyFile.read(tmp_path / "none.yaml")


def test_a_policy_made_for_another_shape_is_refused_with_both_shapes() -> None:
    TINY.check("the same shape by another name", tiny_config())
    for change in ({"num_hidden_layers": 4}, {"hidden_size": 128}):
        with pytest.raises(PolicyError, match=r"this is other .*take made_for out") as told:
            TINY.check("other", tiny_config(**change))
        assert "made for a tiny: model (3 layers of 64)" in str(told.value)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "policy.yaml"
    write_whole(path, "before")

    def refuse(*names: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_whole(path, "after")
    assert path.read_text() == "before" and os.listdir(path.parent) == ["policy.yaml"]


# -- stages ---------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(policies=st.lists(POLICIES, min_size=2, max_size=4), num_chunks=st.integers(1, 3))
def test_the_stages_of_a_pipeline_read_back_to_the_same_policies(policies, num_chunks) -> None:
    shared = {name: getattr(policies[0], name) for name in COMMON}
    policies = [replace(policy, **shared) for policy in policies]
    layers = [[3 + stage + chunk for chunk in range(num_chunks)] for stage in range(len(policies))]
    read = PolicyFile.of(yaml.safe_load(render_stages(policies, layers, TINY, ["Found"])))
    assert [Policy(**{**read.knobs, **stage.knobs}) for stage in read.stages] == policies
    assert [[*(stage.layers or ())] for stage in read.stages] == layers
    in_order = [layers[stage][chunk] for chunk in range(num_chunks) for stage in range(len(layers))]
    assert read.cut == tuple(in_order)


def test_a_stage_may_say_little_and_the_cut_is_then_for_the_search() -> None:
    content = {"prefetch_depth": 2, "stages": [{"layers": 5}, {"weights": {"cpu": 1.0}}]}
    read = PolicyFile.of(content)
    assert read.knobs == {"prefetch_depth": 2}
    assert read.stages[1].knobs == {"weights": Shares(cpu=1.0)}
    assert read.cut is None


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"strategy": "none"}], r"stages\[0\].strategy is the same for all stages"),
        ([{}, {"micro_batch_size": 4}], r"stages\[1\].micro_batch_size is the same"),
        ([{"weight": 1}], r"stages\[0\]: unknown field 'weight'; did you mean weights"),
        ([{"layers": 0}], r"stages\[0\].layers is a whole number from 1"),
        ([{"layers": [4, "5"]}], r"stages\[0\].layers is a whole number from 1"),
        ([3], r"stages\[0\] must map field names"),
        ({"a": 1}, "stages is a list"),
    ],
)
def test_a_wrong_stage_is_refused_by_its_number(stages: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        PolicyFile.of({"stages": stages})
