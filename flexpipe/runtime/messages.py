"""What SEND, RECEIVE and ALL_REDUCE do: messages packed, handed to the transport, and unpacked.

A message carries rows by ascending place, whatever order either end keeps them in.

Shapes: T new tokens, H hidden size, R sampled rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from flexpipe.plan.layer import LayerKind
from flexpipe.plan.plan import Plan
from flexpipe.runtime.device import Device
from flexpipe.runtime.layout import Layout, Layouts, rows_of
from flexpipe.runtime.stores import Stores
from flexpipe.runtime.transport import Transport
from flexpipe.schedule.op import Op


class Messages:
    """A stage's talk with its neighbours and among its shards."""

    def __init__(
        self,
        plan: Plan,
        device: Device,
        transport: Transport,
        stores: Stores,
        layouts: Layouts,
    ) -> None:
        self._plan = plan
        self._device = device
        self._transport = transport
        self._hidden = stores.hidden
        self._buffers = stores.buffers
        self._layouts = layouts

    def receive_hidden(self, op: Op) -> None:
        """Rows come by ascending place and go where they lie here."""
        hidden_TH, order_T = self._hidden.view(rows_of(op), op.hidden_slot), self._order(op)
        if order_T is None:
            self._transport.receive(hidden_TH)
            return
        came_TH = self._buffers.arriving(len(hidden_TH))
        self._transport.receive(came_TH)
        hidden_TH.index_copy_(0, self._device.upload(order_T), came_TH)
        self._wait_for_stream()

    def send_hidden(self, op: Op) -> None:
        hidden_TH, order_T = self._hidden.view(rows_of(op), op.hidden_slot), self._order(op)
        if order_T is not None:
            leaving_TH = self._buffers.leaving(len(hidden_TH))
            torch.index_select(hidden_TH, 0, self._device.upload(order_T), out=leaving_TH)
            hidden_TH = leaving_TH
        self._send(hidden_TH)

    def receive_tokens(self, op: Op) -> None:
        """Sampled rows of all micro-batches, by ascending place: tokens and whether they mean
        something."""
        came = _token_message(op)
        self._transport.receive(came)
        for layout, where in self._sampled_in(op):
            fetched = self._buffers.fetched[layout.source.index]
            for target, source in zip(fetched, came, strict=True):
                target[: len(where)].copy_(source[where])

    def send_tokens(self, op: Op) -> None:
        leaving = _token_message(op)
        for layout, where in self._sampled_in(op):
            fetched = self._buffers.fetched[layout.source.index]
            for target, source in zip(leaving, fetched, strict=True):
                target[where] = source[: len(where)].to(target.dtype)
        self._send(leaving)

    def all_reduce(self, op: Op) -> None:
        """What the shards have computed of the first hidden, of the logits, or of what a half of a
        layer adds to hidden."""
        rows, kind = rows_of(op), self._plan.layers[op.layer].kind
        if kind == LayerKind.HEAD:
            self._sum(self._buffers.logits(rows.index, rows.num_sampled))
            return
        hidden_TH = self._hidden.view(rows, op.hidden_slot)
        if kind == LayerKind.EMBED:
            self._sum(hidden_TH)
            return
        partial_TH = self._buffers.partial(rows.num_new, op.partial_slot)
        self._sum(partial_TH)
        hidden_TH.add_(partial_TH)
        self._wait_for_stream()

    def _send(self, message: Tensor) -> None:
        """A message counts on the link of the rank that sends it."""
        start = time.perf_counter()
        self._transport.send(message)
        self._device.comm.deliver(message.nbytes, start)

    def _sum(self, parts: Tensor) -> None:
        """Each shard sends and receives a part of the bytes twice, less its own."""
        start, size = time.perf_counter(), self._plan.config.shard.size
        self._transport.all_reduce(parts)
        self._device.comm.deliver(2 * (size - 1) * parts.nbytes // size, start)

    def _wait_for_stream(self) -> None:
        if self._device.has_streams:
            torch.accelerator.current_stream().synchronize()

    def _order(self, op: Op) -> Tensor | None:
        """Where the tokens of a message lie in hidden; None where they lie in that order."""
        if not self._plan.reorders_messages:
            return None
        return self._layouts.of(rows_of(op)).ascending()

    def _sampled_in(self, op: Op) -> Iterator[tuple[Layout, list[int]]]:
        """The micro-batches of a message of tokens, and each sampled row's place in it."""
        first = 0
        for source in op.batches:
            layout = self._layouts.of(source)
            places = sorted(row.place for row in layout.sampled)
            yield layout, [first + places.index(row.place) for row in layout.sampled]
            first += len(places)


def _token_message(op: Op) -> Tensor:
    """[2, R]: tokens of a step's R sampled rows, and 1 where the logits were finite."""
    num_rows = sum(batch.num_sampled for batch in op.batches)
    return torch.zeros((2, max(1, num_rows)), dtype=torch.int64)
