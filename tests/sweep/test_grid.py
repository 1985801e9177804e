"""Values are written one way everywhere; typos are refused, contradictions become points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from flexpipe.errors import InputError, PolicyError
from flexpipe.plan.policy import OPTION_NAMES, Policy, Shares
from flexpipe.sweep.grid import MAX_POINTS, parse_vary, read_grid
from flexpipe.sweep.setting import knobs_of, read_value, setting_name, shown
from flexpipe.units import GIB


def values(text: str) -> Sequence[Any]:
    (axis,) = parse_vary([text]).axes.values()
    return axis


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("micro_batch_size=16,32,64", (16, 32, 64)),
        ("num_micro_batches=1:8", (1, 2, 3, 4, 5, 6, 7, 8)),
        ("num_micro_batches=1:8:2", (1, 3, 5, 7)),
        ("gen_len=32:256:*2", (32, 64, 128, 256)),
        ("prompt_len=8,1:3,2", (8, 1, 2, 3)),
        ("weights.gpu=0:1:0.1", tuple(n / 10 for n in range(11))),
        ("weights=gpu:0.5/cpu:0.5,cpu:1", (Shares(gpu=0.5, cpu=0.5), Shares(cpu=1.0))),
        ("percent=20/80/0/50/100/0", ((20, 80, 0, 50, 100, 0),)),
        ("cpu_mem=1GiB:4GiB:*2,none", (GIB, 2 * GIB, 4 * GIB, None)),
        ("strategy=none, event", ("none", "event")),
        ("pin_weights=true,no", (True, False)),
        ("compress_cache=4,none", ("4", "none")),
    ],
)
def test_values_are_lists_and_ranges(text: str, read: tuple[Any, ...]) -> None:
    assert values(text) == read


def test_every_knob_can_be_varied_under_its_field_and_its_option() -> None:
    for name in get_type_hints(Policy):
        assert setting_name(name) == name
        option = OPTION_NAMES[name]
        assert setting_name(option.lstrip("-")) == ("percent" if option == "--percent" else name)


def test_every_value_reads_back_as_it_is_shown() -> None:
    policy = Policy(weights=Shares(gpu=0.25, disk=0.75), gpu_mem=GIB)
    for name in get_type_hints(Policy):
        value = getattr(policy, name)
        assert read_value(name, shown(value)) == value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("micro_batch_size", "'micro_batch_size' is not NAME=VALUES"),
        ("micro_batch_sizes=4", "did you mean micro_batch_size?"),
        ("gpu_batch_sizes=4", "did you mean gpu_batch_size?"),
        ("xyzzy=4", "known are weights, kv_cache"),
        ("micro_batch_size=", "micro_batch_size: '' is not a whole number"),
        ("micro_batch_size=4,-8", "'-8' is not a whole number"),
        ("micro_batch_size=8:4", "'8:4' must rise"),
        ("micro_batch_size=8:64:*1", "'8:64:*1' never ends"),
        ("weights.gpu=0:1:0", "'0:1:0' never ends"),
        ("weights.gpu=0:1:*2", "'0:1:*2' never ends"),
        ("micro_batch_size=1:2:3:4", "'1:2:3:4' is no range"),
        ("gen_len=1:1000000", "more than 10000 values"),
        ("weights.gpu=50", "a share lies between 0 and 1, got 50"),
        ("weights.gpu=half", "'half' is not a number"),
        ("weights.tape=1", "cannot vary 'weights.tape'"),
        ("weights=gpu:0.5/cpu:0.6", "weights: shares must add up to 1"),
        ("weights=0.5", "shares are written like gpu:0.5/cpu:0.5"),
        ("percent=100/0", "--percent takes six numbers, got 2"),
        ("percent=90/20/0/100/0/100", "together at most 100"),
        ("strategy=evnt", "'evnt' is none of none, single, multi, event"),
        ("pin_weights=maybe", "'maybe' is neither true nor false"),
        ("cpu_mem=lots", "cannot read 'lots' as a size"),
        ("cpu_mem=none:4GiB", "'none:4GiB' must rise"),
    ],
)
def test_what_no_point_could_have_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(InputError) as error:
        parse_vary([text])
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["gen_len=1", "gen-len=2"], "gen_len is given twice"),
        (["weights=cpu:1", "weights.gpu=0"], "weights and weights.gpu both place weights"),
        (["percent=0/100/0/100/0/100", "hidden=cpu:1"], "percent and hidden both place hidden"),
        (["gen_len=1:1000", "prompt_len=1:1000"], f"1000000 points, more than {MAX_POINTS}"),
    ],
)
def test_names_that_do_not_go_together_are_refused(texts: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        parse_vary(texts)


def test_a_grid_is_every_combination_the_last_name_changing_fastest() -> None:
    points = list(parse_vary(["gen_len=1,2", "strategy=none,event"]).points())
    assert [tuple(point.values()) for point in points] == [
        (1, "none"),
        (1, "event"),
        (2, "none"),
        (2, "event"),
    ]


def test_a_file_has_the_same_notation_and_points_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(
        "micro_batch_size: [16, 32]\nnum-gpu-batches: 1:2\nhidden: [{cpu: 1}, gpu:1]\n"
        "points:\n  - {strategy: none, percent: [0, 100, 0, 50, 100, 0]}\n  - {}\n"
    )
    grid = read_grid(file)
    assert grid.axes == {
        "micro_batch_size": (16, 32),
        "num_micro_batches": (1, 2),
        "hidden": (Shares(cpu=1.0), Shares(gpu=1.0)),
    }
    assert list(grid.extra) == [{"strategy": "none", "percent": (0, 100, 0, 50, 100, 0)}, {}]
    assert len(list(grid.points())) == grid.num_points == 10
    assert grid.updated(parse_vary(["hidden=cpu:1"])).num_points == 6


def test_a_file_of_points_alone_has_no_other_points(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("points: [{gen_len: 4}]\n")
    assert list(read_grid(file).points()) == [{"gen_len": 4}]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- 1\n", "a grid maps names to values"),
        ("micro_batch_sizes: 4\n", "did you mean micro_batch_size?"),
        ("gen_len: [4, four]\n", "gen_len: 'four' is not a whole number"),
        ("points: {gen_len: 4}\n", "points must be a list"),
        ("points: [{gen_len: 1:4}]\n", "'1:4' is not a whole number"),
        ("points: [{weights: {cpu: 1}, percent: 0/100/0/100/0/100}]\n", "both place weights"),
        ("gen_len: [4\n", "is not a YAML file"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_grid(file)
    assert named in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the grid .*/none\.yaml: No such file"):
        read_grid(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("parts", "shares"),
    [
        ({"gpu": 0.25}, Shares(gpu=0.25, cpu=0.75)),
        ({"cpu": 0.7}, Shares(cpu=0.7, disk=0.3)),
        ({"disk": 0.7}, Shares(cpu=0.3, disk=0.7)),
        ({"gpu": 0.1, "cpu": 0.2}, Shares(gpu=0.1, cpu=0.2, disk=0.7)),
        ({"cpu": 0.5, "disk": 0.25}, Shares(gpu=0.25, cpu=0.5, disk=0.25)),
        ({"gpu": 0.5, "cpu": 0.25, "disk": 0.25}, Shares(gpu=0.5, cpu=0.25, disk=0.25)),
    ],
)
def test_the_rest_of_a_share_lies_on_the_next_slower_tier(
    parts: dict[str, float], shares: Shares
) -> None:
    settings = {f"weights.{tier}": share for tier, share in parts.items()}
    assert knobs_of(settings, {"weights": Shares(gpu=1.0)}) == {"weights": shares}


def test_a_point_overrides_what_is_fixed_and_keeps_the_rest() -> None:
    fixed = {"strategy": "none", "kv_cache": Shares(disk=1.0), "prefetch_depth": 2}
    knobs = knobs_of({"percent": (0, 100, 0, 50, 100, 0), "strategy": "multi"}, fixed)
    assert knobs["kv_cache"] == Shares(cpu=0.5, disk=0.5) and knobs["hidden"] == Shares(gpu=1.0)
    assert (knobs["strategy"], knobs["prefetch_depth"]) == ("multi", 2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"weights.gpu": 0.75, "weights.cpu": 0.5}, "add up to 1.25, more than 1"),
        ({"weights.gpu": 0.5, "weights.cpu": 0.2, "weights.disk": 0.2}, "must add up to 1"),
        ({"micro_batch_size": 64, "max_batch_tokens": 32}, "--max-batch-tokens is 32"),
    ],
)
def test_values_that_contradict_each_other_say_so(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        knobs_of(settings, {})
