"""What all layers of one step share about a micro-batch: positions, masks, who sits where.

Tokens are packed without padding: the new tokens of a micro-batch's rows, one row behind another.
Rows come in *runs*, whose KV regions are adjacent, so that one tensor per run and layer reaches
them all. Attention is cut into *pieces*, one kernel call each: rows that decode side by side are
one piece, with a mask where the kernel reads all up to the longest; new rows of equal length are
one, and a chunk behind a context or under a window is cut into blocks of queries, which share one
mask however long the context is.

Invariant: every new token that attends here is a query of exactly one piece per window, and no
piece attends past what `append_kv` has written.

Shapes: T new tokens, R rows, L keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from flexpipe.kernels.attend import KvRows, runs_here
from flexpipe.model.config import ModelConfig, RopeConfig
from flexpipe.model.cost import MASK_BLOCK, distinct_windows
from flexpipe.model.rope import inverse_frequencies
from flexpipe.plan.codec import Codec

__all__ = ["Batch", "Piece", "RopeTable", "RowSpan", "Write"]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One row's part in a step: tokens behind it, tokens to compute, whether one is sampled."""

    num_context: int
    num_new: int
    samples: bool = True

    @property
    def length(self) -> int:
        return self.num_context + self.num_new


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary frequencies on the compute device."""

    frequencies_d: Tensor
    scale: float

    @classmethod
    def build(cls, rope: RopeConfig, head_dim: int, device: torch.device | str) -> RopeTable:
        return cls(inverse_frequencies(rope, head_dim).to(device), rope.attention_factor or 1.0)

    def turns(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for each position, [T, 1, D]; sin carries the sign of rotate-half."""
        angles = torch.outer(positions_T.to(torch.float32), self.frequencies_d)
        cos, sin = angles.cos().mul_(self.scale), angles.sin_().mul_(self.scale)
        return (
            torch.cat((cos, cos), -1).to(dtype).unsqueeze(1),
            torch.cat((sin.neg(), sin), -1).to(dtype).unsqueeze(1),
        )


@dataclass(frozen=True, slots=True)
class Write:
    """Where the keys and values of some rows' new tokens go."""

    run: int
    rows: slice
    tokens: slice
    num_context: int | None  # of each row, or None where they differ; then each has one new token
    num_new: int
    row_index_R: Tensor | None = None
    position_R: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One attention call: which queries, which keys, which mask."""

    run: int
    rows: slice
    tokens: slice  # all new tokens of those rows
    num_new: int  # per row; 1 means the rows decode together
    queries: slice  # of each row's new tokens
    keys: slice
    causal: bool = False
    mask: Tensor | None = None
    ragged: KvRows | None = None  # decoding rows, each read as far as it goes

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of a run with equal work, or which all decode."""

    run: int
    first_row: int
    first_token: int
    spans: tuple[RowSpan, ...]

    @property
    def num_new(self) -> int:
        return self.spans[0].num_new

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + len(self.spans))

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + len(self.spans) * self.num_new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch as its layers see it in one step."""

    num_tokens: int
    num_rows: int
    num_sampled: int
    dtype: torch.dtype
    positions_T: Tensor
    sample_index_S: Tensor  # packed place of each sampled row's last new token
    cos_T1D: Tensor | None
    sin_T1D: Tensor | None
    writes: tuple[Write, ...]
    pieces: Mapping[int | None, tuple[Piece, ...]]  # by attention window
    kv_codec: Codec | None = None  # of a compressed KV cache

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        runs: Sequence[Sequence[RowSpan]],
        rope: RopeTable | None,
        to_device: Callable[[Tensor], Tensor],
        compute_dtype: torch.dtype,
        *,
        kv_codec: Codec | None = None,
        num_elsewhere: int = 0,
    ) -> Batch:
        """Lays out `runs`; its indices reach the device in one `to_device` call.

        The last `num_elsewhere` runs attend, and keep what they attend to, somewhere else.
        """
        spans = [span for run in runs for span in run]
        num_tokens = sum(span.num_new for span in spans)
        sampled = _sampled_tokens(spans)
        most_rows = max(map(len, runs), default=0)
        index = to_device(_index(spans, sampled, most_rows))
        positions, sample_index, arange = torch.split(index, [num_tokens, len(sampled), most_rows])
        _check_positions(config, spans)
        merge = index.device.type == "cpu" or config.num_heads == config.num_kv_heads
        groups = tuple(_groups(runs[: len(runs) - num_elsewhere], merge))
        cos, sin = rope.turns(positions, compute_dtype) if rope else (None, None)
        cutter = _Cutter(positions, compute_dtype)
        return cls(
            num_tokens=num_tokens,
            num_rows=len(spans),
            num_sampled=len(sampled),
            dtype=compute_dtype,
            positions_T=positions,
            sample_index_S=sample_index,
            cos_T1D=cos,
            sin_T1D=sin,
            writes=tuple(_write(group, positions, arange) for group in groups),
            pieces={w: tuple(cutter.pieces(groups, w)) for w in distinct_windows(config)},
            kv_codec=kv_codec,
        )


def _sampled_tokens(spans: Sequence[RowSpan]) -> list[int]:
    places, end = [], 0
    for span in spans:
        end += span.num_new
        if span.num_new and span.samples:
            places.append(end - 1)
    return places


def _index(spans: Sequence[RowSpan], sampled: Sequence[int], most_rows: int) -> Tensor:
    """Positions, sampled places and 0, 1, 2, … behind one another, for one transfer."""
    positions = [torch.arange(span.num_context, span.length) for span in spans if span.num_new > 1]
    if len(positions) < len(spans):  # decoding rows are many: one list beats many tensors
        positions = [
            torch.tensor([p for span in spans for p in range(span.num_context, span.length)])
        ]
    return torch.cat([*positions, torch.tensor(sampled), torch.arange(most_rows)]).to(torch.int64)


def _check_positions(config: ModelConfig, spans: Sequence[RowSpan]) -> None:
    if config.learned_positions is not None:
        last = max((span.length for span in spans), default=0) + config.position_offset
        assert last <= config.learned_positions, (
            f"position {last} is outside a table of {config.learned_positions}"
        )


def _groups(runs: Sequence[Sequence[RowSpan]], merge: bool) -> Iterator[Group]:
    """Rows that share a call: those that decode, with `merge` also equal chunks; none idle."""
    token = 0
    for run, spans in enumerate(runs):
        row = 0
        for key, members in groupby(enumerate(spans), lambda item: _kind(*item, merge=merge)):
            rows = tuple(span for _, span in members)
            if key != "idle":
                yield Group(run, row, token, rows)
            row += len(rows)
            token += sum(span.num_new for span in rows)


def _kind(row: int, span: RowSpan, *, merge: bool) -> object:
    if span.num_new == 0:
        return "idle"
    if span.num_new == 1:
        return "decode"
    return (span.num_context, span.num_new) if merge else row


def _write(group: Group, positions_T: Tensor, arange_R: Tensor) -> Write:
    first = group.spans[0].num_context
    if all(span.num_context == first for span in group.spans):
        return Write(group.run, group.rows, group.tokens, first, group.num_new)
    return Write(
        group.run,
        group.rows,
        group.tokens,
        None,
        1,
        arange_R[: len(group.spans)],
        positions_T[group.tokens],
    )


class _Cutter:
    """Cuts groups into pieces; blocks under one window share their mask."""

    def __init__(self, positions_T: Tensor, dtype: torch.dtype) -> None:
        self._positions_T = positions_T
        self._dtype = dtype
        self._ragged = runs_here(positions_T.device)

    def pieces(self, groups: Sequence[Group], window: int | None) -> Iterator[Piece]:
        cut = [piece for group in groups for piece in self._cut(group, window)]
        banded = [piece for piece in cut if _needs_band(piece)]
        band = self._band(banded, window) if banded else None
        for piece in cut:
            yield _masked(piece, band) if _needs_band(piece) else piece

    def _cut(self, group: Group, window: int | None) -> Iterator[Piece]:
        if group.num_new == 1:
            yield self._decode(group, window)
            return
        context, num_new = group.spans[0].num_context, group.num_new
        start = 0
        if context == 0:  # the plain triangle, as far as the window lets all keys be seen
            start = num_new if window is None else min(num_new, window)
            yield Piece(
                group.run,
                group.rows,
                group.tokens,
                num_new,
                slice(0, start),
                slice(0, start),
                causal=True,
            )
        for first in range(start, num_new, MASK_BLOCK):
            last = min(first + MASK_BLOCK, num_new)
            oldest = 0 if window is None else max(0, context + first - window + 1)
            yield Piece(
                group.run,
                group.rows,
                group.tokens,
                num_new,
                slice(first, last),
                slice(oldest, context + last),
            )

    def _decode(self, group: Group, window: int | None) -> Piece:
        lengths = [span.length for span in group.spans]
        shortest, longest = min(lengths), max(lengths)
        oldest = 0 if window is None else max(0, shortest - window)
        mask = ragged = None
        if self._ragged:
            ragged = _ragged(lengths, window)
        elif shortest != longest:
            last_R1 = self._positions_T[group.tokens].unsqueeze(1)
            keys_L = torch.arange(oldest, longest, device=last_R1.device)
            hidden_RL = keys_L > last_R1
            if window is not None:
                hidden_RL |= keys_L <= last_R1 - window
            mask = self._mask(hidden_RL)[:, None, None, :]
        return Piece(
            group.run,
            group.rows,
            group.tokens,
            1,
            slice(0, 1),
            slice(oldest, longest),
            mask=mask,
            ragged=ragged,
        )

    def _band(self, pieces: Sequence[Piece], window: int | None) -> Tensor:
        """Covers every piece from its lower right, where the last query sees the last key."""
        device = self._positions_T.device
        queries = torch.arange(-max(map(_num_queries, pieces)), 0, device=device).unsqueeze(1)
        keys = torch.arange(-max(map(_num_keys, pieces)), 0, device=device)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return self._mask(hidden)

    def _mask(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))


def _ragged(lengths: Sequence[int], window: int | None) -> KvRows:
    length_R = torch.tensor(lengths)
    count_R = length_R if window is None else length_R.clamp(max=window)
    return KvRows(length_R - count_R, count_R, count_R.argsort(descending=True))


def _num_queries(piece: Piece) -> int:
    return int(piece.queries.stop - piece.queries.start)


def _num_keys(piece: Piece) -> int:
    return int(piece.keys.stop - piece.keys.start)


def _needs_band(piece: Piece) -> bool:
    return piece.num_new > 1 and not piece.causal


def _masked(piece: Piece, band: Tensor | None) -> Piece:
    assert band is not None
    first_query, first_key = band.shape[0] - _num_queries(piece), band.shape[1] - _num_keys(piece)
    return replace(piece, mask=band[first_query:, first_key:])
