"""What an op costs: bytes over a link's rate, what computing takes, and overhead.

Every figure comes from a `Profile`; nothing is fitted. What is added up here is what
`flexpipe.runtime` does for the op, and the bytes are those it moves. An emulated accelerator
computes and copies on the CPU: its ops take what the CPU takes, or what the emulated rate makes of
them where that is longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from flexpipe.plan.hardware import DISK_QUEUE_BYTES, EMULATED_TURN_S, Emulation
from flexpipe.plan.layer import LayerKind, LayerPlan
from flexpipe.plan.layout import ALIGN, round_up
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.policy.compute_cost import ComputeCost
from flexpipe.policy.curve import Curve
from flexpipe.policy.profile import Profile
from flexpipe.policy.shape import Shape, shape_of
from flexpipe.schedule.flops import compute_flops
from flexpipe.schedule.op import Kind, Op
from flexpipe.schedule.simulate import Cost
from flexpipe.schedule.step import MicroBatch

FETCHED_BYTES = 8 + 1  # of a sampled row: its token, and whether its logits were finite
TOKEN_BYTES = 2 * 8  # the same in a message between ranks


@dataclass(frozen=True, slots=True)
class _Known:
    """A micro-batch's shape and what its ops cost, found once per step."""

    batch: MicroBatch
    shape: Shape
    costs: dict[object, Cost] = field(default_factory=dict)


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
        self._computing = ComputeCost(plan, profile)
        self._windows = tuple(dict.fromkeys(plan.config.windows or (None,)))
        self._known: dict[int, _Known] = {}  # by micro-batch
        self._costs: dict[object, Cost] = {}  # of ops that are of none
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
        if op.batches:
            return self._price[op.kind](op)
        costs = self._costs if op.batch is None else self._known_of(op.batch).costs
        key = op.kind, op.segment, self._likes[op.layer]
        cost = costs.get(key)
        if cost is None:
            cost = costs[key] = self._price[op.kind](op)
        return cost

    @cached_property
    def load_s(self) -> float:
        """Seconds to take the pools and to bring the weights home, from the checkpoint to the last
        byte packed; kernels are compiled beside."""
        computes_on_host = self.emulation is not None or self.plan.device_tier == Tier.CPU
        compiles = computes_on_host or self.plan.policy.cpu_attention
        kernels_s = self.profile.overhead("kernels") if compiles else 0.0
        return self._pools_s + max(self._weights_s, kernels_s)

    @property
    def new_rows_s(self) -> float:
        """Seconds more that a step takes in which products meet a number of rows for the first
        time."""
        return self.profile.overhead("first") * self.plan.num_product_shapes

    @property
    def _weights_s(self) -> float:
        seconds = 0.0
        disk = self.profile.links["disk_read"].capped(self.profile.load.get("read", inf))
        for placed in self.plan.placement.tensors.values():
            if placed.home == Tier.DISK:
                continue
            stored = placed.stored
            seconds += disk.seconds(stored.num_bytes)
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
        return self._known_of(batch).shape

    def _known_of(self, batch: MicroBatch) -> _Known:
        known = self._known.get(batch.index)
        if known is None or known.batch is not batch:
            shape = shape_of(batch, self.plan, self._windows, averaged=self._averaged)
            known = self._known[batch.index] = _Known(batch, shape)
        return known

    @cached_property
    def alike(self) -> list[tuple[LayerPlan, int]]:
        """Layers that cost the same: the first of each kind, and their number."""
        first: dict[object, LayerPlan] = {}
        for layer, like in zip(self.plan.layers, self._likes, strict=True):
            first.setdefault(like, layer)
        counts = Counter(self._likes)
        return [(layer, counts[like]) for like, layer in first.items()]

    @cached_property
    def _likes(self) -> list[object]:
        """By layer: the same for layers whose ops cost the same."""
        last = self.plan.layers[-1]
        return [
            (
                layer.likeness,
                None if layer.layer is None else self._config.window(layer.layer),
                layer is last,
            )
            for layer in self.plan.layers
        ]

    def know(self, batch: MicroBatch, shape: Shape) -> None:
        """Take `batch` for one of this shape, whatever its rows."""
        self._known[batch.index] = _Known(batch, shape)

    # moves

    def _move(self, link: str, num_bytes: int, pieces: int = 1) -> Cost:
        calls_s = self._calls_s(pieces)
        work = calls_s + self._link_s(link, num_bytes, pieces)
        return self._over(link, num_bytes, work, "copy", calls_s)

    def _calls_s(self, pieces: int) -> float:
        overhead = self.profile.overhead
        return overhead("move") + max(0, pieces - 1) * overhead("copy")

    def _disk(self, link: str, num_bytes: int, extents: int = 1, beside_s: float = 0.0) -> Cost:
        """Pieces are in flight together: their latencies bound them, or their bytes. `beside_s`
        pass in calls on top."""
        kind = link.removeprefix("disk_")
        latency = self.profile.overhead(kind)
        latency += max(0, extents - 1) * self.profile.overhead(f"{kind}_span")
        work = beside_s + max(latency, self._link_s(link, num_bytes))
        in_flight_s = work * min(1.0, DISK_QUEUE_BYTES / max(1, num_bytes))
        calls_s = beside_s + self._calls_s(extents)
        return self._over(link, num_bytes, work, link, calls_s, in_flight_s)

    def _disk_cache(self, link: str, num_bytes: int, extents: int, rows: int) -> Cost:
        """Whole pages of some rows, and what their tails in memory take in any case."""
        overhead = self.profile.overhead
        beside_s = overhead("disk_cache") + rows * overhead("disk_cache_row")
        if num_bytes:
            return self._disk(link, num_bytes, extents, beside_s)
        return Cost(beside_s, calls=1.0)

    def _link_s(self, link: str, num_bytes: int, pieces: int = 1) -> float:
        curve = self._link(link)
        return curve.seconds(num_bytes, max(num_bytes / max(1, pieces), 1.0)) if curve else 0.0

    def _over(
        self,
        link: str,
        num_bytes: int,
        work: float,
        activity: str,
        calls_s: float,
        in_flight_s: float = 0.0,
    ) -> Cost:
        """Bytes over a link; an emulated one takes its own time where that is longer."""
        rate = getattr(self.emulation, f"{link}_bytes_per_s") if self.emulation else None
        seconds = max(work, num_bytes / rate) if rate else work
        if rate:
            in_flight_s = min(seconds, EMULATED_TURN_S)
        duty = work / seconds if seconds else 1.0
        calls = _share(calls_s, seconds)
        return Cost(seconds, activity, duty, link, num_bytes, in_flight_s, calls)

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
        return self._disk_cache("disk_read", shape.read_bytes, shape.read_extents, shape.disk_rows)

    def _load_cache(self, op: Op) -> Cost:
        shape = self._shape(op)
        return self._move("h2d", shape.load_tokens * self.plan.token_bytes, shape.load_rows)

    def _store_cache(self, op: Op) -> Cost:
        shape = self._shape(op)
        return self._move("d2h", shape.store_tokens * self.plan.token_bytes, shape.store_rows)

    def _write_cache(self, op: Op) -> Cost:
        shape = self._shape(op)
        return self._disk_cache(
            "disk_write", shape.write_bytes, shape.write_extents, shape.disk_rows
        )

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
            adds = self._computing.passes_s(numbers) if layer.kind != LayerKind.EMBED else 0.0
        moved = 2 * (size - 1) * numbers * self.plan.compute_bytes // size
        return Cost(self._message_s(moved) + adds, "copy", 1.0, "comm", moved)

    def _message_s(self, num_bytes: int) -> float:
        curve = self.profile.links.get("comm")
        if curve is None:
            raise self.profile.lacking("link", "comm")
        return self.profile.overhead("move") + curve.seconds(num_bytes)

    def _tokens_bytes(self, op: Op) -> int:
        """Those of a step come in one message, which is there without any too."""
        return max(1, sum(self.shape(batch).num_sampled for batch in op.batches)) * TOKEN_BYTES

    # computing

    def _attend_cpu(self, op: Op) -> Cost:
        return Cost(self._computing.attend_cpu_s(op, self._shape(op)), "attend")

    def _compute(self, op: Op) -> Cost:
        work = self._computing.compute_s(op, self._shape(op))
        rate = self.emulation.flops_per_s if self.emulation else None
        seconds = max(work, self._flops(op) / rate) if rate else work
        rows = self._shape(op).num_new
        calls = _share(self._computing.calls_s(op, self._shape(op)), seconds)
        return Cost(seconds, self.profile.computing(rows), work / seconds, calls=calls)

    def _flops(self, op: Op) -> int:
        shape = self._shape(op)
        return compute_flops(
            self.plan,
            op,
            num_new=shape.num_new,
            num_sampled=shape.num_sampled,
            attended=self._computing.attended(op, shape),
        )

    def _sample(self, op: Op) -> Cost:
        return Cost(self._computing.sample_s(self._shape(op)), "compute")

    def _fetch(self, op: Op) -> Cost:
        if self.plan.streams_to_device:
            return self._move("d2h", self._shape(op).num_sampled * FETCHED_BYTES)
        return Cost(self.profile.overhead("move"), "copy")

    def _commit(self, op: Op) -> Cost:
        rows = self._shape(op).num_rows
        overhead = self.profile.overhead
        return Cost(overhead("commit") + rows * overhead("commit_row"), calls=1.0)

    # lookups

    def _shape(self, op: Op) -> Shape:
        assert op.batch is not None
        return self.shape(op.batch)


def _share(part_s: float, seconds: float) -> float:
    """Of an op's time, in steps of a hundredth: how ops disturb each other is kept by it."""
    return round(min(1.0, part_s / seconds), 2) if seconds else 0.0
