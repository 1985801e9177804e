"""A machine of round numbers, so that a test can say what something takes."""

from __future__ import annotations

from typing import Any

from flexpipe.plan.tier import Tier
from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.profile import Profile, Rates

GIB = 2**30
DTYPES = ("float32", "bfloat16", "float16")
RATES = Rates(
    matmul={dtype: Surface.of({1.0: Curve.flat(1e11)}) for dtype in DTYPES},
    packed={dtype: Surface.of({1.0: Curve.flat(2e11)}) for dtype in DTYPES},
    prefill_attention={dtype: Curve.flat(5e10) for dtype in DTYPES},
    decode_attention={dtype: Curve.flat(1e10) for dtype in DTYPES},
    elementwise={dtype: Curve.flat(1e9) for dtype in DTYPES},
    convert={f"{one}>{other}": 1e10 for one in DTYPES for other in DTYPES if one != other},
    widen={f"{bits}>{dtype}": 5e9 for bits in (4, 8) for dtype in DTYPES},
    compress={"4": 1e9, "8": 1e9},
    sample=dict.fromkeys(DTYPES, 1e9),
)


def machine(**changes: Any) -> Profile:
    """Links of 10 GB/s, a disk of 2, 100 GFLOP/s; overheads and slowdowns only where given."""
    fields: dict[str, Any] = {
        "name": "round",
        "date": "2026-11-21",
        "source": "made up",
        "device": "cpu",
        "memory": {Tier.CPU: 8 * GIB, Tier.DISK: 64 * GIB},
        "links": {
            "h2d": Curve.flat(1e10),
            "d2h": Curve.flat(1e10),
            "disk_read": Curve.flat(2e9),
            "disk_write": Curve.flat(1e9),
        },
        "compute": RATES,
        "load": {"float32": 5e8},
        **changes,
    }
    return Profile(**fields)


OVERHEADS = {
    "layer": 200e-6,
    "embed": 150e-6,
    "embed_row": 5e-6,
    "other": 90e-6,
    "move": 25e-6,
    "copy": 5e-6,
    "read": 180e-6,
    "disk_cache": 85e-6,
    "disk_cache_row": 4e-6,
    "hop": 70e-6,
    "commit": 600e-6,
    "commit_row": 20e-6,
}
SLOWDOWN = {("compute", "copy"): 1.5, ("compute", "disk_read"): 1.1, ("copy", "disk_read"): 1.2}
