"""Params that cannot be are refused by the name of the field, whoever gives them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe.errors import InputError
from flexpipe.job.params import SamplingParams, shown


def test_default_is_greedy_and_ends_at_eos() -> None:
    params = SamplingParams()
    assert params.is_greedy
    assert (params.temperature, params.stop, params.ignore_eos) == (0.0, (), False)


def test_one_choice_is_greedy_at_any_temperature() -> None:
    assert SamplingParams(temperature=5, top_k=1).is_greedy
    assert SamplingParams(temperature=1e-9).is_greedy
    assert not SamplingParams(temperature=0.5, top_k=-1).is_greedy


def test_the_two_ways_to_say_all_tokens_are_one() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


@pytest.mark.parametrize("stop", ["\n", ["\n"], ("\n",)])
def test_stop_may_be_one_text_or_several(stop: Any) -> None:
    assert SamplingParams(stop=stop).stop == ("\n",)


def test_params_can_be_a_key() -> None:
    assert len({SamplingParams(stop=["a"]), SamplingParams(stop=["a"])}) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0 to 100, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 100, got NaN"),
        ({"temperature": float("inf")}, "got Infinity"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"temperature": True}, "temperature must be a number from 0 to 100, got true"),
        ({"temperature": None}, "got null"),
        ({"temperature": "1"}, 'got "1"'),
        ({"top_p": 0}, "top_p must be a number above 0 and up to 1, got 0"),
        ({"top_p": 1.01}, "top_p must be"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"top_k": -2}, "top_k must be a whole number from -1 to 2147483647, got -2"),
        ({"top_k": 4.0}, "top_k must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 2147483647, got 0"),
        ({"max_tokens": False}, "max_tokens must be"),
        ({"max_tokens": 10**4000}, "max_tokens must be"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"stop": 3}, "stop must be a text or a list of texts, got 3"),
        ({"stop": ["a", 3]}, "stop must be a text, got 3"),
        ({"stop": ""}, "stop must hold texts of 1 to 1024 characters"),
        ({"stop": "a" * 1025}, "got one of 1025"),
        ({"stop": ["a"] * 65}, "stop takes up to 64 texts, got 65"),
        ({"stop": "\ud800"}, "stop holds half of a surrogate pair"),
        ({"stop": "a�"}, "U+FFFD"),
    ],
)
def test_refusal_names_field_range_and_value(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as refusal:
        SamplingParams(**given)
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < 160


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(value=JSON)
def test_any_value_can_be_shown_in_a_message(value: Any) -> None:
    text = shown(value)
    assert len(text.encode()) > 0 and len(text) <= 300
    if isinstance(value, str) and len(value) <= 40:
        assert json.loads(text) == value


@given(value=JSON, field=st.sampled_from(sorted(SamplingParams.__dataclass_fields__)))
def test_any_value_makes_params_or_an_input_error(value: Any, field: str) -> None:
    try:
        SamplingParams(**{field: value})
    except InputError as error:
        assert str(error).startswith(field)
