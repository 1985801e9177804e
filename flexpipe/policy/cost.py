"""What an op costs: bytes over a link's rate, FLOPs over the rate at so many rows, and overhead.

Every figure comes from a `Profile`; nothing is fitted. What is added up here is what
`flexpipe.runtime.stage` does for the op, and the bytes are those it moves. An emulated accelerator
computes and copies on the CPU: its ops take what the CPU takes, or what the emulated rate makes of
them where that is longer.

Tokens: T new ones of a micro-batch. Attended: keys that new tokens see, summed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from flexpipe.errors import PolicyError
from flexpipe.model.cost import CONVERT_ELEMENTS, attend_flops, num_attended
from flexpipe.plan.block import KV_PAGE, MicroBatchPlan, page_extents
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.layer import LayerKind, LayerPlan, Piece
from flexpipe.plan.layout import ALIGN, Part, round_up
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.profile import Profile, Rates
from flexpipe.schedule.flops import compute_flops
from flexpipe.schedule.op import Kind, Op, Segment, pieces_of
from flexpipe.schedule.simulate import Cost
from flexpipe.schedule.step import MicroBatch, Row

IN_FLIGHT = 8  # scattered reads and writes of one op at a time
FETCHED_BYTES = 8 + 1  # of a sampled row: its token, and whether its logits were finite
TOKEN_BYTES = 2 * 8  # the same in a message between ranks
# numbers that go through a norm's worth of work, relative to one of the hidden's
_ROPE, _APPEND, _GATE, _LOOKUP = 1.0, 0.4, 0.5, 0.3
# how a layer's fixed cost falls on its pieces
_OVERHEAD_SHARE = {Piece.QKV: 0.4, Piece.ATTEND: 0.2, Piece.OUT: 0.1, Piece.MLP: 0.3}
_ROLES: Mapping[Piece, tuple[str, ...]] = {
    Piece.QKV: ("q_proj", "k_proj", "v_proj"),
    Piece.ATTEND: (),
    Piece.OUT: ("o_proj",),
    Piece.MLP: ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, slots=True)
class Attention:
    """Rows that attend together: their number, new tokens each, and the keys those see in all."""

    rows: int
    num_new: int
    attended: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a micro-batch costs anything.

    Attention of rows here and on the CPU is by window, then by new tokens. Moves are tokens: those
    behind rows whose KV cache must be loaded or read, and the new ones that go home; `extents` are
    the pieces that reads and writes come in.
    """

    num_new: int
    num_rows: int
    num_sampled: int
    num_on_cpu: int
    here: Mapping[int | None, tuple[Attention, ...]]
    on_cpu: Mapping[int | None, tuple[Attention, ...]]
    load_tokens: int
    load_rows: int
    store_tokens: int
    store_rows: int
    read_bytes: int
    read_extents: int
    write_bytes: int
    write_extents: int
    disk_rows: int  # whose new tokens go to disk, or wait for their page to fill
    num_groups: int = 1  # of rows beside each other that attend here in one call


class CostModel:
    """Prices the ops of one plan on one machine; raises PolicyError where the profile lacks what
    the plan needs.

    Some ops have work in some steps only: a page of the KV cache goes to disk when it is full.
    With `averaged` they cost what such an op does on average, for steps that stand for others.
    """

    def __init__(
        self,
        plan: Plan,
        profile: Profile,
        emulation: Emulation | None = None,
        *,
        averaged: bool = False,
    ) -> None:
        self.plan = plan
        self._averaged = averaged
        self.profile = profile
        self.emulation = emulation
        self._config = plan.config
        self._dtype = plan.compute_dtype
        self._windows = tuple(dict.fromkeys(plan.config.windows or (None,)))
        self._shapes: dict[int, tuple[MicroBatch, Shape]] = {}
        self._products: dict[tuple[str, Segment | None, int], float] = {}
        self._costs: dict[object, Cost] = {}
        self._price: Mapping[Kind, Callable[[Op], Cost]] = {
            Kind.READ_WEIGHT: self._read_weight,
            Kind.LOAD_WEIGHT: self._load_weight,
            Kind.READ_EMBED: self._read_embed,
            Kind.LOAD_EMBED: self._load_embed,
            Kind.READ_CACHE: self._read_cache,
            Kind.LOAD_CACHE: self._load_cache,
            Kind.STORE_CACHE: self._store_cache,
            Kind.WRITE_CACHE: self._write_cache,
            Kind.READ_HIDDEN: lambda op: self._disk("disk_read", self._hidden_bytes(op, ALIGN)),
            Kind.LOAD_HIDDEN: lambda op: self._move("h2d", self._hidden_bytes(op)),
            Kind.STORE_HIDDEN: lambda op: self._move("d2h", self._hidden_bytes(op)),
            Kind.WRITE_HIDDEN: lambda op: self._disk("disk_write", self._hidden_bytes(op, ALIGN)),
            Kind.MOVE_QUERY: self._move_query,
            Kind.ATTEND_CPU: self._attend_cpu,
            Kind.MOVE_OUTPUT: self._move_output,
            Kind.COMPUTE: self._compute,
            Kind.SAMPLE: self._sample,
            Kind.FETCH_TOKENS: self._fetch,
            Kind.ALL_REDUCE: self._all_reduce,
            Kind.COMMIT: self._commit,
            Kind.SEND_HIDDEN: lambda op: self._send(self._hidden_bytes(op)),
            Kind.RECEIVE_HIDDEN: lambda op: self._receive(self._hidden_bytes(op)),
            Kind.SEND_TOKENS: lambda op: self._send(self._tokens_bytes(op)),
            Kind.RECEIVE_TOKENS: lambda op: self._receive(self._tokens_bytes(op)),
            Kind.BARRIER: lambda op: Cost(0.0),
        }

    def __call__(self, op: Op) -> Cost:
        if op.batch is not None or op.batches:
            return self._price[op.kind](op)
        key = op.kind, op.layer
        cost = self._costs.get(key)
        if cost is None:
            cost = self._costs[key] = self._price[op.kind](op)
        return cost

    @cached_property
    def load_s(self) -> float:
        """Seconds to take the pools and to bring the weights home, from the checkpoint to the last
        byte packed."""
        seconds = self._pools_s
        for placed in self.plan.placement.tensors.values():
            if placed.home == Tier.DISK:
                continue
            stored = placed.stored
            seconds += stored.num_bytes / self.profile.links["disk_read"].rate(stored.num_bytes)
            same = stored.dtype == placed.dtype and placed.home != self.plan.device_tier
            rate = self.profile.load.get(placed.dtype)
            if rate is not None and not same and placed.codec is None:
                seconds += placed.spec.num_elements / rate
        return seconds

    @property
    def _pools_s(self) -> float:
        """Host memory is populated when it is taken; packed weights are taken as they come."""
        rate = self.profile.load.get("pools")
        if rate is None:
            return 0.0
        device = self.plan.device_tier
        on_host = {Tier.CPU, device} if self.emulation or device == Tier.CPU else {Tier.CPU}
        taken = [
            pool.num_bytes
            for pool in self.plan.pools
            if pool.tier in on_host and (pool.name, pool.tier) != ("weights", device)
        ]
        return sum(taken) / rate

    def shape(self, batch: MicroBatch) -> Shape:
        """The micro-batch's shape, found once per step."""
        known = self._shapes.get(batch.index)
        if known is None or known[0] is not batch:
            shape = _shape(batch, self.plan, self._windows, averaged=self._averaged)
            known = self._shapes[batch.index] = (batch, shape)
        return known[1]

    @cached_property
    def alike(self) -> list[tuple[LayerPlan, int]]:
        """Layers that cost the same: the first of each kind, and their number."""
        counts: dict[tuple[str, int | None, bool], int] = defaultdict(int)
        first: dict[tuple[str, int | None, bool], LayerPlan] = {}
        last = self.plan.layers[-1]
        for layer in self.plan.layers:
            window = None if layer.layer is None else self._config.window(layer.layer)
            key = layer.likeness, window, layer is last
            counts[key] += 1
            first.setdefault(key, layer)
        return [(layer, counts[key]) for key, layer in first.items()]

    def know(self, batch: MicroBatch, shape: Shape) -> None:
        """Take `batch` for one of this shape, whatever its rows."""
        self._shapes[batch.index] = (batch, shape)

    # moves

    def _move(self, link: str, num_bytes: int, pieces: int = 1) -> Cost:
        overhead = self.profile.overhead("move")
        overhead += max(0, pieces - 1) * self.profile.overhead("copy")
        return self._over(link, num_bytes, num_bytes / max(1, pieces), overhead, "copy")

    def _disk(self, link: str, num_bytes: int, extents: int = 1) -> Cost:
        overhead = self.profile.overhead("read") * max(1.0, extents / IN_FLIGHT)
        return self._over(link, num_bytes, num_bytes, overhead, link)

    def _over(
        self, link: str, num_bytes: int, size: float, overhead_s: float, activity: str
    ) -> Cost:
        """Bytes over a link; an emulated one takes its own time where that is longer."""
        curve = self._link(link)
        work = overhead_s + (curve.seconds(num_bytes, max(size, 1.0)) if curve else 0.0)
        rate = getattr(self.emulation, f"{link}_bytes_per_s") if self.emulation else None
        seconds = max(work, num_bytes / rate) if rate else work
        return Cost(seconds, activity, work / seconds if seconds else 1.0, link, num_bytes)

    def _link(self, name: str) -> Curve | None:
        """A host link's rate depends on whether the host's side is page-locked."""
        pageable = self.profile.details.get(f"{name}_pageable")
        if pageable is not None and not self.plan.policy.pin_weights:
            return pageable
        return self.profile.links.get(name)

    def _read_weight(self, op: Op) -> Cost:
        layout = self.plan.layers[op.layer].streamed
        return self._disk("disk_read", layout.read_bytes, len(layout.extents))

    def _load_weight(self, op: Op) -> Cost:
        layout = self.plan.layers[op.layer].streamed
        return self._move("h2d", layout.num_bytes, 1 + bool(layout.extents and layout.pack_bytes))

    def _read_embed(self, op: Op) -> Cost:
        """Every token as if it were the micro-batch's only one like it; the engine reads equal ones
        once."""
        num_bytes = self._shape(op).num_new * self.plan.embedding.row_bytes
        if self.plan.embed_home == Tier.DISK:
            return self._disk("disk_read", num_bytes, self._shape(op).num_new)
        return Cost(self.profile.overhead("move") + self._host_copy(num_bytes), "copy")

    def _host_copy(self, num_bytes: int) -> float:
        """Seconds to copy bytes within host memory, as good as is known."""
        curve = self.profile.links.get("h2d")
        return curve.seconds(num_bytes) if curve else 0.0

    def _load_embed(self, op: Op) -> Cost:
        return self._move("h2d", self._shape(op).num_new * self.plan.embedding.row_bytes)

    def _read_cache(self, op: Op) -> Cost:
        shape = self._shape(op)
        return self._disk("disk_read", shape.read_bytes, shape.read_extents)

    def _load_cache(self, op: Op) -> Cost:
        shape = self._shape(op)
        return self._move("h2d", shape.load_tokens * self.plan.token_bytes, shape.load_rows)

    def _store_cache(self, op: Op) -> Cost:
        shape = self._shape(op)
        return self._move("d2h", shape.store_tokens * self.plan.token_bytes, shape.store_rows)

    def _write_cache(self, op: Op) -> Cost:
        shape = self._shape(op)
        cost = self._disk("disk_write", shape.write_bytes, shape.write_extents)
        if shape.write_bytes:
            return cost
        # nothing but tails that stay in memory
        return Cost(self.profile.overhead("move"), "copy")

    def _hidden_bytes(self, op: Op, unit: int = 1) -> int:
        tokens = self._shape(op).num_new
        return round_up(tokens * self._config.hidden_size * self.plan.compute_bytes, unit)

    def _move_query(self, op: Op) -> Cost:
        return self._move("d2h", self._shape(op).num_on_cpu * self.plan.query_bytes)

    def _move_output(self, op: Op) -> Cost:
        width = self._config.num_heads * self._config.head_dim * self.plan.compute_bytes
        return self._move("h2d", self._shape(op).num_on_cpu * width)

    # messages

    def _send(self, num_bytes: int) -> Cost:
        """A message counts on the link of the rank that sends it."""
        return Cost(self._message_s(num_bytes), "copy", 1.0, "comm", num_bytes)

    def _receive(self, num_bytes: int) -> Cost:
        return Cost(self._message_s(num_bytes), "copy")

    def _all_reduce(self, op: Op) -> Cost:
        """Every shard sends and receives a part of the bytes twice, less its own; the sum of what
        half a layer adds is then added to hidden."""
        shape, layer, size = self._shape(op), self.plan.layers[op.layer], self._config.shard.size
        adds = 0.0
        if layer.kind == LayerKind.HEAD:
            numbers = shape.num_sampled * self._config.vocab_size
        else:
            numbers = shape.num_new * self._config.hidden_size
            adds = self._passes_s(numbers) if layer.kind != LayerKind.EMBED else 0.0
        moved = 2 * (size - 1) * numbers * self.plan.compute_bytes // size
        return Cost(self._message_s(moved) + adds, "copy", 1.0, "comm", moved)

    def _message_s(self, num_bytes: int) -> float:
        curve = self.profile.links.get("comm")
        if curve is None:
            raise self._lacking("link", "comm")
        return self.profile.overhead("move") + curve.seconds(num_bytes)

    def _tokens_bytes(self, op: Op) -> int:
        """Those of a step come in one message, which is there without any too."""
        return max(1, sum(self.shape(batch).num_sampled for batch in op.batches)) * TOKEN_BYTES

    # computing

    def _attend_cpu(self, op: Op) -> Cost:
        shape, rates = self._shape(op), self.profile.on_host
        attention = shape.on_cpu[self._window(op)]
        seconds = self.profile.overhead("other") + self._attention_s(rates, attention)
        return Cost(seconds + self._append_s(rates, shape.num_on_cpu), "attend")

    def _compute(self, op: Op) -> Cost:
        layer, shape = self.plan.layers[op.layer], self._shape(op)
        if layer.kind == LayerKind.EMBED:
            work = self._embed_s(op, shape)
        elif layer.kind == LayerKind.HEAD:
            work = self._head_s(op, layer, shape)
        else:
            work = self._decoder_s(op, layer, shape)
        rate = self.emulation.flops_per_s if self.emulation else None
        seconds = max(work, self._flops(op, shape) / rate) if rate else work
        return Cost(seconds, "compute", work / seconds)

    def _flops(self, op: Op, shape: Shape) -> int:
        attends = Piece.ATTEND in pieces_of(self.plan.layers[op.layer], op.segment)
        here = shape.here[self._window(op)] if attends else ()
        return compute_flops(
            self.plan,
            op,
            num_new=shape.num_new,
            num_sampled=shape.num_sampled,
            attended=sum(rows.attended for rows in here),
        )

    def _embed_s(self, op: Op, shape: Shape) -> float:
        looked_up = shape.num_new * self._config.input_size
        seconds = self.profile.overhead("layer") + self._passes_s(_LOOKUP * looked_up)
        return seconds + self._products_s(op.layer, None, shape.num_new)

    def _head_s(self, op: Op, layer: LayerPlan, shape: Shape) -> float:
        seconds = self.profile.overhead("other")
        seconds += self._products_s(op.layer, None, shape.num_sampled)
        if layer.takes_hidden:
            seconds += self._passes_s(shape.num_sampled * self._config.hidden_size)
        return seconds

    def _decoder_s(self, op: Op, layer: LayerPlan, shape: Shape) -> float:
        config, tokens, pieces = self._config, shape.num_new, pieces_of(layer, op.segment)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        if not pieces:  # a norm behind a sum
            return self.profile.overhead("other") + self._passes_s(config.hidden_size * tokens)
        seconds = self._layer_overhead_s(layer, op.segment)
        seconds += self._products_s(op.layer, op.segment, tokens)
        numbers = 0.0
        if Piece.QKV in pieces:
            numbers += config.hidden_size + config.head_dim * _APPEND * 2 * kv_heads
            turned = (heads + kv_heads) * config.head_dim if config.rope else 0
            seconds += self._numbers_s(self.profile.compute.rotary, turned * tokens, _ROPE)
            seconds += self._append_s(self.profile.compute, tokens - shape.num_on_cpu)
        if Piece.ATTEND in pieces:
            here = shape.here[self._window(op)]
            seconds += self._attention_s(self.profile.compute, here)
            seconds += max(0, shape.num_groups - 1) * self.profile.overhead("group")
        if Piece.MLP in pieces:
            numbers += config.hidden_size
            gated = config.ffn_size if config.gated_mlp else 0
            seconds += self._numbers_s(self.profile.compute.gating, gated * tokens, _GATE)
        return seconds + self._passes_s(numbers * tokens)

    def _layer_overhead_s(self, layer: LayerPlan, segment: Segment | None) -> float:
        """A layer costs one whole, whether it is a whole decoder layer or half of one."""
        share = 1.0
        if segment is not None:
            share = sum(_OVERHEAD_SHARE[piece] for piece in pieces_of(layer, segment))
        return share * self.profile.overhead("layer")

    def _sample(self, op: Op) -> Cost:
        logits = self._shape(op).num_sampled * self._config.vocab_size
        rate = self._rate(self.profile.compute.sample, self._dtype, "sample")
        return Cost(self.profile.overhead("other") + logits / rate, "compute")

    def _fetch(self, op: Op) -> Cost:
        if self.plan.streams_to_device:
            return self._move("d2h", self._shape(op).num_sampled * FETCHED_BYTES)
        return Cost(self.profile.overhead("move"), "copy")

    def _commit(self, op: Op) -> Cost:
        rows = self._shape(op).num_rows
        overhead = self.profile.overhead
        return Cost(overhead("commit") + rows * overhead("commit_row"))

    def _passes_s(self, numbers: float) -> float:
        """Norms and the like over so many numbers."""
        curve = self._curve(self.profile.compute.elementwise, "elementwise")
        return curve.seconds(numbers)

    def _numbers_s(self, curves: Mapping[str, Curve], numbers: float, as_norm: float) -> float:
        """Of a pass of its own kind; as so much of a norm where nothing is known of it."""
        curve = curves.get(self._dtype)
        return curve.seconds(numbers) if curve else self._passes_s(as_norm * numbers)

    def _append_s(self, rates: Rates, tokens: int) -> float:
        """Compressing new keys and values."""
        codec = self.plan.policy.cache_codec
        if codec is None or not tokens:
            return 0.0
        numbers = tokens * 2 * self._config.num_kv_heads * self._config.head_dim
        return numbers / self._rate(rates.compress, str(codec.bits), "compress")

    def _attention_s(self, rates: Rates, attention: tuple[Attention, ...]) -> float:
        config, seconds = self._config, 0.0
        codec = self.plan.policy.cache_codec
        width = 2 * config.num_kv_heads * config.head_dim
        for piece in attention:
            flops = attend_flops(config, piece.attended)
            if piece.num_new == 1:
                dense = rates.decode_attention_flops.get(self._dtype, math.inf)
                kernel = (
                    rates.decode_attention.get(f"{codec.bits}>{self._dtype}") if codec else None
                )
                if kernel is not None:  # it widens what it reads
                    num_bytes = piece.attended * self.plan.token_bytes
                    seconds += max(kernel.seconds(num_bytes), flops / dense)
                    continue
                curve = self._curve(rates.decode_attention, "decode_attention")
                num_bytes = piece.attended * width * self.plan.compute_bytes
                seconds += max(curve.seconds(num_bytes), flops / dense)
            else:
                curve = self._curve(rates.prefill_attention, "prefill_attention")
                seconds += curve.seconds(flops, piece.num_new)
            if codec is not None:
                keys = piece.attended if piece.num_new == 1 else piece.rows * piece.num_new
                kind = f"{codec.bits}>{self._dtype}"
                seconds += keys * width / self._rate(rates.widen, kind, "widen")
        return seconds

    def _products_s(self, position: int, segment: Segment | None, rows: int) -> float:
        """A layer's products with `rows` tokens, conversion of their weights included."""
        layer = self.plan.layers[position]
        key = layer.likeness, segment, rows
        seconds = self._products.get(key)
        if seconds is None:
            pieces = pieces_of(layer, segment)
            roles = {role for piece in pieces for role in _ROLES[piece]} if segment else None
            parts = [
                (part, resident)
                for some, resident in ((layer.resident, True), (layer.streamed.parts, False))
                for part in some
                if len(part.shape) == 2 and part.tensor.spec.role != "embed_positions"
                if roles is None or part.tensor.spec.role in roles
                if layer.kind != LayerKind.EMBED or part.tensor.spec.role != "embed_tokens"
            ]
            seconds = sum(self._product_s(part, resident, rows) for part, resident in parts)
            self._products[key] = seconds
        return seconds

    def _product_s(self, part: Part, resident: bool, rows: int) -> float:
        placed, rates = part.tensor, self.profile.compute
        num_out, num_in = part.shape[0], placed.spec.shape[1]
        elements = num_out * num_in
        if not rows:
            return 0.0
        flops = 2.0 * elements * rows
        if placed.codec is None and placed.dtype == self._dtype:
            surface = rates.packed.get(self._dtype) if resident else None
            surface = surface or self._surface(rates.matmul)
            return flops / surface.rate(elements, rows)
        if placed.codec is None:
            kind = f"{placed.dtype}>{self._dtype}"
            seconds = elements / self._rate(rates.convert, kind, "convert")
        else:
            kind = f"{placed.codec.bits}>{self._dtype}"
            seconds = elements / self._rate(rates.widen, kind, "widen")
        converted = rates.converted.get(self._dtype)
        if converted is not None:
            return seconds + flops / converted.rate(rows)
        size = min(elements, CONVERT_ELEMENTS)
        return seconds + flops / self._surface(rates.matmul).rate(size, rows)

    # lookups

    def _shape(self, op: Op) -> Shape:
        assert op.batch is not None
        return self.shape(op.batch)

    def _window(self, op: Op) -> int | None:
        layer = self.plan.layers[op.layer].layer
        return None if layer is None else self._config.window(layer)

    def _surface(self, surfaces: Mapping[str, Surface]) -> Surface:
        if self._dtype not in surfaces:
            raise self._lacking("matmul", self._dtype)
        return surfaces[self._dtype]

    def _curve(self, curves: Mapping[str, Curve], what: str) -> Curve:
        if self._dtype not in curves:
            raise self._lacking(what, self._dtype)
        return curves[self._dtype]

    def _rate(self, rates: Mapping[str, float], key: str, what: str) -> float:
        if key not in rates:
            raise self._lacking(what, key)
        return rates[key]

    def _lacking(self, what: str, key: str) -> PolicyError:
        return PolicyError(
            f"the profile {self.profile.name} has no {what} for {key}, which this policy needs; "
            "measure it with flexpipe profile, or add it to the hardware file"
        )


def _shape(
    batch: MicroBatch, plan: Plan, windows: tuple[int | None, ...], *, averaged: bool
) -> Shape:
    """Sort a micro-batch's rows by what they cost."""
    mb = plan.micro_batches[batch.index]
    here: list[Row] = []
    on_cpu: list[Row] = []
    moving: list[Row] = []
    disk: list[Row] = []
    for row in batch.rows:
        home = mb.kv_homes[row.place]
        away = plan.row_attends_on_cpu(batch.index, row.place, row.num_new)
        (on_cpu if away else here).append(row)
        if home != plan.device_tier and not away:
            moving.append(row)
        if home == Tier.DISK:
            disk.append(row)
    read, write = _reads(disk, plan, mb), (_mean_writes if averaged else _writes)(disk, plan)
    loaded = [row for row in moving if row.num_context]
    return Shape(
        num_new=batch.num_new,
        num_rows=len(batch.rows),
        num_sampled=batch.num_sampled,
        num_on_cpu=len(on_cpu),
        here={window: _attention(here, window) for window in windows},
        on_cpu={window: _attention(on_cpu, window) for window in windows},
        load_tokens=sum(row.num_context for row in loaded),
        load_rows=len(loaded),
        store_tokens=sum(row.num_new for row in moving),
        store_rows=len(moving),
        read_bytes=read[0],
        read_extents=read[1],
        write_bytes=write[0],
        write_extents=write[1],
        disk_rows=len(disk),
        num_groups=_num_groups(here, plan, mb),
    )


def _num_groups(rows: list[Row], plan: Plan, mb: MicroBatchPlan) -> int:
    """Calls that these rows attend in: neighbours at home, or in a slot, that do the same.

    An empty place between rows that do the same parts them too, but that call is not counted: with
    it a job with refill, whose tail is full of empty places, was told to decode a quarter too long.
    """
    at_home = [row for row in rows if mb.kv_homes[row.place] == plan.device_tier]
    in_slot = [row for row in rows if mb.kv_homes[row.place] != plan.device_tier]
    return sum(1 for some in (at_home, in_slot) for _ in groupby(map(_doing, some)))


def _doing(row: Row) -> tuple[int, int] | None:
    """Rows that decode attend together whatever is behind them, others only if equal."""
    return None if row.num_new == 1 else (row.num_context, row.num_new)


def _attention(rows: list[Row], window: int | None) -> tuple[Attention, ...]:
    """Decoding rows are one call; others by their new tokens."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        into = sums[row.num_new]
        into[0] += 1
        into[1] += num_attended(row.num_context, row.num_new, window)
    return tuple(Attention(count, new, attended) for new, (count, attended) in sums.items())


def _reads(rows: list[Row], plan: Plan, mb: MicroBatchPlan) -> tuple[int, int]:
    """Bytes and pieces of whole pages behind rows whose KV cache is on disk."""
    ranks = {place: rank for rank, place in enumerate(mb.places(Tier.DISK))} if rows else {}
    sizes = [row.num_context * plan.token_bytes // KV_PAGE * KV_PAGE for row in rows]
    extents = page_extents([ranks[row.place] for row in rows], sizes, plan.slot_region_bytes(mb))
    read = [num_bytes for _, num_bytes in extents]
    return sum(read), len(read)


def _writes(rows: list[Row], plan: Plan) -> tuple[int, int]:
    """Bytes and pieces of the pages that new tokens fill."""
    total = pieces = 0
    for row in rows:
        begin = row.num_context * plan.token_bytes // KV_PAGE
        end = (row.num_context + row.num_new) * plan.token_bytes // KV_PAGE
        total += (end - begin) * KV_PAGE
        pieces += end > begin
    return total, pieces


def _mean_writes(rows: list[Row], plan: Plan) -> tuple[int, int]:
    """The same where rows that decode are at any place of a page."""
    decoding = [row for row in rows if row.num_new == 1]
    total, pieces = _writes([row for row in rows if row.num_new > 1], plan)
    share = min(1.0, plan.token_bytes / KV_PAGE)
    return total + len(decoding) * plan.token_bytes, pieces + round(len(decoding) * share)
