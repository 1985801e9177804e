"""Policies in the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from flexpipe.plan.policy import OPTION_NAMES, Policy

_SHARES = ("weights", "kv_cache", "hidden")
_ALWAYS = {*_SHARES, "micro_batch_size", "num_micro_batches", "strategy"}
_DEFAULTS = Policy().to_dict()


def as_options(policy: Mapping[str, Any]) -> str:
    """The options that ask for the policy again: shares, block and strategy, and whatever else is
    not the default."""
    return spelled(policy, _ALWAYS | {name for name in policy if policy[name] != _DEFAULTS[name]})


def difference(policy: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The options of the knobs in which a policy differs from another one."""
    return spelled(policy, {name for name in policy if policy[name] != other[name]})


def spelled(policy: Mapping[str, Any], names: AbstractSet[str]) -> str:
    """The options of these knobs; all shares are one option."""
    words = []
    if names & set(_SHARES):
        shares = (policy[kind][tier] for kind in _SHARES for tier in ("gpu", "cpu"))
        words += ["--percent", *(f"{100 * share:g}" for share in shares)]
    for name, option in OPTION_NAMES.items():
        if name in names and name not in _SHARES:
            words += [option, _word(policy[name])]
    return " ".join(words)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
