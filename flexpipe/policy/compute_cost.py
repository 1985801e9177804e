"""Seconds that computing takes: FLOPs over the rate at so many rows, passes over numbers, overhead.

What is added up here is what `flexpipe.runtime.compute` does for the op. An emulated accelerator
computes on the CPU and takes what the CPU takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flexpipe.model.cost import CONVERT_ELEMENTS, attend_flops
from flexpipe.plan.layer import LayerKind, LayerPlan, Piece
from flexpipe.plan.layout import Part
from flexpipe.plan.plan import Plan
from flexpipe.policy.curve import Curve, Surface
from flexpipe.policy.profile import Profile, Rates, prefill_kind
from flexpipe.policy.shape import Attention, Shape
from flexpipe.schedule.op import Op, Segment, pieces_of

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


class ComputeCost:
    """Prices what the compute device and the CPU beside it compute, for one plan on one machine;
    raises PolicyError where the profile lacks what the plan needs."""

    def __init__(self, plan: Plan, profile: Profile) -> None:
        self._plan = plan
        self._profile = profile
        self._config = plan.config
        self._dtype = plan.compute_dtype
        self._products: dict[tuple[str, Segment | None, int], float] = {}

    def compute_s(self, op: Op, shape: Shape) -> float:
        """A COMPUTE: a layer or a segment of it."""
        layer = self._plan.layers[op.layer]
        if layer.kind == LayerKind.EMBED:
            return self._embed_s(op, shape)
        if layer.kind == LayerKind.HEAD:
            return self._head_s(op, layer, shape)
        return self._decoder_s(op, layer, shape)

    def calls_s(self, op: Op, shape: Shape) -> float:
        """What of a COMPUTE is calls beside the work in them."""
        layer = self._plan.layers[op.layer]
        if layer.kind == LayerKind.EMBED:
            return self._embed_calls_s(shape)
        if layer.kind == LayerKind.HEAD or not pieces_of(layer, op.segment):
            return self._profile.overhead("other")
        return self._layer_overhead_s(layer, op.segment)

    def attend_cpu_s(self, op: Op, shape: Shape) -> float:
        """Attention beside an accelerator, new keys and values appended."""
        rates, attention = self._profile.on_host, shape.on_cpu[self._window(op)]
        seconds = self._profile.overhead("other") + self._attention_s(rates, attention)
        return seconds + self._append_s(rates, shape.num_on_cpu)

    def sample_s(self, shape: Shape) -> float:
        logits = shape.num_sampled * self._config.vocab_size
        rate = self._rate(self._profile.compute.sample, self._dtype, "sample")
        return self._profile.overhead("other") + logits / rate

    def passes_s(self, numbers: float) -> float:
        """Norms and the like over so many numbers."""
        curve = self._curve(self._profile.compute.elementwise, "elementwise")
        return curve.seconds(numbers)

    def attended(self, op: Op, shape: Shape) -> int:
        """Keys that new tokens see on the device in a COMPUTE."""
        if Piece.ATTEND not in pieces_of(self._plan.layers[op.layer], op.segment):
            return 0
        return sum(rows.attended for rows in shape.here[self._window(op)])

    def _embed_s(self, op: Op, shape: Shape) -> float:
        looked_up = shape.num_new * self._config.input_size
        seconds = self._embed_calls_s(shape) + self.passes_s(_LOOKUP * looked_up)
        return seconds + self._products_s(op.layer, None, shape.num_new)

    def _embed_calls_s(self, shape: Shape) -> float:
        overhead = self._profile.overhead
        return overhead("embed") + shape.num_rows * overhead("embed_row")

    def _head_s(self, op: Op, layer: LayerPlan, shape: Shape) -> float:
        seconds = self._profile.overhead("other")
        seconds += self._products_s(op.layer, None, shape.num_sampled)
        if layer.takes_hidden:
            seconds += self.passes_s(shape.num_sampled * self._config.hidden_size)
        return seconds

    def _decoder_s(self, op: Op, layer: LayerPlan, shape: Shape) -> float:
        config, tokens, pieces = self._config, shape.num_new, pieces_of(layer, op.segment)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        if not pieces:  # a norm behind a sum
            return self._profile.overhead("other") + self.passes_s(config.hidden_size * tokens)
        seconds = self._layer_overhead_s(layer, op.segment)
        seconds += self._products_s(op.layer, op.segment, tokens)
        numbers = 0.0
        if Piece.QKV in pieces:
            numbers += config.hidden_size + config.head_dim * _APPEND * 2 * kv_heads
            turned = (heads + kv_heads) * config.head_dim if config.rope else 0
            seconds += self._numbers_s(self._profile.compute.rotary, turned * tokens, _ROPE)
            seconds += self._append_s(self._profile.compute, tokens - shape.num_on_cpu)
        if Piece.ATTEND in pieces:
            here = shape.here[self._window(op)]
            seconds += self._attention_s(self._profile.compute, here)
            seconds += max(0, shape.num_groups - 1) * self._profile.overhead("group")
        if Piece.MLP in pieces:
            numbers += config.hidden_size
            gated = config.ffn_size if config.gated_mlp else 0
            seconds += self._numbers_s(self._profile.compute.gating, gated * tokens, _GATE)
        return seconds + self.passes_s(numbers * tokens)

    def _layer_overhead_s(self, layer: LayerPlan, segment: Segment | None) -> float:
        """A layer costs one whole, whether it is a whole decoder layer or half of one."""
        share = 1.0
        if segment is not None:
            share = sum(_OVERHEAD_SHARE[piece] for piece in pieces_of(layer, segment))
        return share * self._profile.overhead("layer")

    def _numbers_s(self, curves: Mapping[str, Curve], numbers: float, as_norm: float) -> float:
        """Of a pass of its own kind; as so much of a norm where nothing is known of it."""
        curve = curves.get(self._dtype)
        return curve.seconds(numbers) if curve else self.passes_s(as_norm * numbers)

    def _append_s(self, rates: Rates, tokens: int) -> float:
        """Compressing new keys and values."""
        codec = self._plan.policy.cache_codec
        if codec is None or not tokens:
            return 0.0
        numbers = tokens * 2 * self._config.num_kv_heads * self._config.head_dim
        return numbers / self._rate(rates.compress, str(codec.bits), "compress")

    def _attention_s(self, rates: Rates, attention: tuple[Attention, ...]) -> float:
        config, seconds = self._config, 0.0
        codec = self._plan.policy.cache_codec
        width = 2 * config.num_kv_heads * config.head_dim
        for piece in attention:
            flops = attend_flops(config, piece.attended)
            if piece.num_new == 1:
                dense = rates.decode_attention_flops.get(self._dtype, math.inf)
                kernel = (
                    rates.decode_attention.get(f"{codec.bits}>{self._dtype}") if codec else None
                )
                if kernel is not None:  # it widens what it reads
                    num_bytes = piece.attended * self._plan.token_bytes
                    seconds += max(kernel.seconds(num_bytes), flops / dense)
                    continue
                curve = self._curve(rates.decode_attention, "decode_attention")
                num_bytes = piece.attended * width * self._plan.compute_bytes
                seconds += max(curve.seconds(num_bytes), flops / dense)
            else:
                curves = rates.prefill_attention
                narrow = curves.get(prefill_kind(self._dtype, config.head_dim))
                curve = narrow or self._curve(curves, "prefill_attention")
                seconds += curve.seconds(flops, piece.num_new)
            if codec is not None:
                keys = piece.attended if piece.num_new == 1 else piece.rows * piece.num_new
                kind = f"{codec.bits}>{self._dtype}"
                seconds += keys * width / self._rate(rates.widen, kind, "widen")
        return seconds

    def _products_s(self, position: int, segment: Segment | None, rows: int) -> float:
        """A layer's products with `rows` tokens, conversion of their weights included."""
        layer = self._plan.layers[position]
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
        placed, rates = part.tensor, self._profile.compute
        num_out, num_in = part.shape[0], placed.spec.shape[1]
        elements = num_out * num_in
        if not rows:
            return 0.0
        flops = 2.0 * elements * rows
        if placed.codec is None and placed.dtype == self._dtype:
            surface = rates.packed.get(self._dtype) if resident else None
            surface = surface or self._surface(rates.matmul)
            return flops / surface.rate(elements, rows)
        source = placed.dtype if placed.codec is None else placed.codec.bits
        kind = f"{source}>{self._dtype}"
        converted = rates.converted.get(kind)
        if converted is not None:
            return flops / converted.rate(elements, rows)
        if placed.codec is None:
            seconds = elements / self._rate(rates.convert, kind, "convert")
        else:
            seconds = elements / self._rate(rates.widen, kind, "widen")
        size = min(elements, CONVERT_ELEMENTS)
        return seconds + flops / self._surface(rates.matmul).rate(size, rows)

    def _window(self, op: Op) -> int | None:
        layer = self._plan.layers[op.layer].layer
        return None if layer is None else self._config.window(layer)

    def _surface(self, surfaces: Mapping[str, Surface]) -> Surface:
        if self._dtype not in surfaces:
            raise self._profile.lacking("matmul", self._dtype)
        return surfaces[self._dtype]

    def _curve(self, curves: Mapping[str, Curve], what: str) -> Curve:
        if self._dtype not in curves:
            raise self._profile.lacking(what, self._dtype)
        return curves[self._dtype]

    def _rate(self, rates: Mapping[str, float], key: str, what: str) -> float:
        if key not in rates:
            raise self._profile.lacking(what, key)
        return rates[key]
