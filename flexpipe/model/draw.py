"""Sampling as data: what one token's draw depends on, and nothing else.

No torch here: draws are made where steps are formed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be sampled: how the distribution is cut, and the uniform number in [0, 1).

    `top_k` 0 keeps all tokens; `top_p` 1 keeps all probability.
    """

    temperature: float
    top_k: int
    top_p: float
    uniform: float


def uniform(seed: int, request_id: str | int, position: int) -> float:
    """A number in [0, 1) that these three alone decide (53 bits of a BLAKE2 hash)."""
    text = f"{seed}\x1f{type(request_id).__name__}\x1f{request_id}\x1f{position}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
