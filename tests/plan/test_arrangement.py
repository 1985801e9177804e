"""What a user may ask of a pipeline, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from flexpipe.errors import PolicyError
from flexpipe.plan.arrangement import Arrangement


def test_as_many_blocks_as_stages_are_in_flight_unless_told_otherwise():
    assert Arrangement(num_stages=4).num_blocks_in_flight == 4
    assert Arrangement(num_stages=4, num_blocks=9).num_blocks_in_flight == 9


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_stages": 0}, "start at 1"),
        ({"partition": "odd"}, "--partition is one of balanced, even"),
        ({"num_stages": 2, "layers": (3, 3), "partition": "even"}, "exclude each other"),
        ({"layers": (3, 3)}, "names 2 stages, but --pipeline-parallel-size is 1"),
        ({"num_chunks": 2}, "--virtual-stages needs --pipeline-parallel-size 2"),
    ],
)
def test_what_contradicts_itself_is_refused(asked: dict[str, Any], said: str):
    with pytest.raises(PolicyError, match=said):
        Arrangement(**asked)


def test_a_policy_file_of_stages_says_how_many_and_where_to_cut():
    asked = Arrangement().of_stages(2, (5, 3, 2, 2))
    assert (asked.num_stages, asked.num_chunks, asked.layers) == (2, 2, (5, 3, 2, 2))
    assert Arrangement(partition="even").of_stages(2, (5, 3)).layers is None
    with pytest.raises(PolicyError, match="is 3, but the policy file has 2 stages"):
        Arrangement(num_stages=3).of_stages(2, None)


def test_layers_per_stage_are_read_as_written():
    assert Arrangement.parse_layers("10,14,8") == (10, 14, 8)
    with pytest.raises(PolicyError, match="write it like 10,14,8"):
        Arrangement.parse_layers("10;14")
