"""How much a profile measures: sizes, and the time that each of them gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flexpipe.units import MIB

KIB = 1024
_WIDEST = 4  # bytes of a number


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Sizes to measure at, seconds per window (longer ones for a disk, which may be quicker in a
    burst than it stays), and rounds.

    `weights` are out and in features, the smallest first, `rows` what meets them, as far as a
    product stays within `most_flops`, `converted` and `converted_rows` the same of those that are
    converted on the way. `prefill` is new tokens per row, `decode` bytes of KV cache,
    `compressed_tokens` tokens of a compressed one, `norm` tokens of 2048 numbers. `copies` and
    `transfers` are bytes that links move at once, `file_bytes` the file on disk they move from and
    to, `held_bytes` what is rotated over so that nothing comes from a processor's caches. Pairs of
    activities have windows of their own, so many a round; `op_steps` are steps of the model that
    shows what ops cost, `wakes` how often a lane is left idle.
    """

    quick: bool
    rounds: int
    window_s: float
    disk_window_s: float
    weights: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    converted: tuple[tuple[int, int], ...]
    converted_rows: tuple[int, ...]
    most_flops: float
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    compressed_tokens: tuple[int, ...]
    norm: tuple[int, ...]
    copies: tuple[int, ...]
    transfers: tuple[int, ...]
    file_bytes: int
    held_bytes: int
    pair_windows: int
    pair_s: float
    op_steps: int
    wakes: int

    def within(self, memory_bytes: int) -> Effort:
        """The same with nothing larger than a sixteenth of the memory, but for the least sizes."""
        most = memory_bytes // 16

        def few(sizes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(size for size in sizes if size <= most) or sizes[:1]

        held_bytes = self.held_bytes
        while held_bytes > max(most, KIB * KIB):
            held_bytes //= 2
        weights = [shape for shape in self.weights if math.prod(shape) * _WIDEST <= most]
        return replace(
            self,
            weights=tuple(weights) if len(weights) > 1 else self.weights[:2],
            decode=few(self.decode),
            copies=few(self.copies),
            transfers=few(self.transfers),
            held_bytes=held_bytes,
        )


FULL = Effort(
    quick=False,
    rounds=3,
    window_s=0.034,
    disk_window_s=0.25,
    weights=((512, 512), (1024, 1536), (4096, 4096), (14336, 4096)),
    rows=(1, 8, 32, 64, 128, 256, 1024, 4096),
    converted=((512, 512), (1024, 1536)),
    converted_rows=(1, 16, 128, 1024),
    most_flops=1.6e10,
    prefill=(64, 256, 1024, 2048),
    decode=(256 * KIB, 2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
    compressed_tokens=(128, 1024, 8192),
    norm=(1, 16, 128, 1024, 4096),
    copies=(64 * KIB, MIB, 16 * MIB, 256 * MIB),
    transfers=(64 * KIB, MIB, 16 * MIB, 128 * MIB),
    file_bytes=2048 * MIB,
    held_bytes=256 * MIB,
    pair_windows=3,
    pair_s=0.05,
    op_steps=60,
    wakes=20,
)
QUICK = Effort(
    quick=True,
    rounds=1,
    window_s=0.013,
    disk_window_s=0.08,
    weights=((512, 512), (1024, 1536), (4096, 4096)),
    rows=(1, 8, 64, 256, 1024),
    converted=((1024, 1536),),
    converted_rows=(1, 16, 256),
    most_flops=1e10,
    prefill=(64, 512),
    decode=(256 * KIB, 16 * MIB, 128 * MIB),
    compressed_tokens=(1024,),
    norm=(1, 128, 1024),
    copies=(64 * KIB, MIB, 16 * MIB, 128 * MIB),
    transfers=(64 * KIB, MIB, 16 * MIB, 128 * MIB),
    file_bytes=512 * MIB,
    held_bytes=128 * MIB,
    pair_windows=2,
    pair_s=0.03,
    op_steps=12,
    wakes=5,
)
