"""What layers compute in where nobody says: settled by the machine's products, before any plan.

It changes tokens, so it is no choice of the search: a resumed job must come to the same dtype,
whatever memory is free by then.
"""

from __future__ import annotations

from flexpipe.errors import PolicyError
from flexpipe.model.config import ModelConfig
from flexpipe.policy.profile import Profile

_TYPICAL = (4096.0 * 4096.0, 256.0)  # a weight's elements and the rows that meet it


def candidate_dtypes(asked: str, config: ModelConfig, on_cpu: bool) -> tuple[str, ...]:
    """The dtypes that "auto" is decided between. A CPU computes in float32, or in bfloat16 where
    the checkpoint has that; float16 has no fast kernels there."""
    if asked != "auto":
        return (asked,)
    if not on_cpu:
        return (config.dtype,)
    return ("float32", "bfloat16") if config.dtype == "bfloat16" else ("float32",)


def compute_dtype(asked: str, config: ModelConfig, on_cpu: bool, profile: Profile | None) -> str:
    """The fastest candidate by the profile's products of many rows; the first without a profile."""
    candidates = candidate_dtypes(asked, config, on_cpu)
    if profile is None:
        return candidates[0]
    known = profile.compute.matmul
    rates = {dtype: known[dtype].rate(*_TYPICAL) for dtype in candidates if dtype in known}
    if not rates:
        raise PolicyError(
            f"{profile.name} has no products in {' or '.join(candidates)}; give --dtype, one of "
            f"{', '.join(known)}"
        )
    return max(rates, key=lambda dtype: rates[dtype])
