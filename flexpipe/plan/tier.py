"""The memories that hold bytes, fastest first."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """Where bytes live: accelerator memory, host memory, disk."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"
