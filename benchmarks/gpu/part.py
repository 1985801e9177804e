"""What the parts of the GPU check share: where they run, and what each of them says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexpipe.plan.hardware import Emulation

FAST = Emulation(h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12)  # links that never hold an op back


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The device to check, whether with small shapes, and a folder for what the part writes."""

    device: str
    small: bool
    directory: Path

    @property
    def is_emulated(self) -> bool:
        return self.device == "emulated"

    def emulation(self, rates: Emulation = FAST) -> Emulation | None:
        """`rates` on an emulated device, nothing on a real one."""
        return rates if self.is_emulated else None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A part's verdict in one line, its figures, and what lies behind it.

    `passed` is None where the part does not apply here.
    """

    passed: bool | None
    summary: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    details: Sequence[str] = ()
