"""What computing needs beside weights, KV cache and hidden: logits, embedding rows, tokens.

Shapes: T new tokens, E embedding width, H hidden size, R sampled rows, V vocabulary.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from flexpipe.memory.tier import POISON, TierMemory, torch_dtype, typed
from flexpipe.model.workspace import Workspace
from flexpipe.plan.plan import Plan
from flexpipe.plan.pools import PoolPlan
from flexpipe.plan.tier import Tier


class Buffers:
    """Pools of a plan that ops fill and read within a step.

    `fetched` are the sampled rows' tokens on the host, and whether their logits were finite, by
    micro-batch.
    """

    def __init__(self, plan: Plan, memory: TierMemory, *, pin_tokens: bool) -> None:
        self._plan = plan
        self._memory = memory
        self._dtype = torch_dtype(plan.compute_dtype)
        device = plan.device_tier
        self.workspace = Workspace(self._slots("workspace", device)[0])
        self._logits = self._slots("logits", device)
        self._head_inputs = self._slots("head input", device)
        self._embed_slots = self._slots("embedding slots", device)
        self._embed_stages = self._slots("embedding staging", Tier.CPU)
        self._messages = self._slots("messages", device)
        self._partials = self._slots("partial sums", device)
        none = torch.empty(0, dtype=torch.uint8)
        on_cpu = self._slots("attention workspace", Tier.CPU) or [none]
        self.cpu_workspace = Workspace(on_cpu[0])
        self.fetched = [
            (
                torch.zeros(mb.num_places, dtype=torch.int64, pin_memory=pin_tokens),
                torch.zeros(mb.num_places, dtype=torch.bool, pin_memory=pin_tokens),
            )
            for mb in plan.micro_batches
        ]

    def embed_rows(self, num_tokens: int, slot: int | None) -> Tensor:
        """Rows of the embedding beside the device, as they travel, [T, ...]."""
        assert slot is not None
        return self._rows_in(self._embed_slots[slot], num_tokens)

    def staged_embed_rows(self, num_tokens: int, stage: int | None) -> Tensor:
        """The same on the host, on their way to the device."""
        assert stage is not None
        return self._rows_in(self._embed_stages[stage], num_tokens)

    def partial(self, num_tokens: int, slot: int | None) -> Tensor:
        """This shard's part of what is added to hidden, [T, H]."""
        assert slot is not None
        shape = (num_tokens, self._plan.config.hidden_size)
        return typed(self._partials[slot], self._dtype, shape)

    def head_input(self, mb: int, num_rows: int) -> Tensor:
        """What a micro-batch's slices of the head multiply, [R, E]."""
        slab = self._head_inputs[self._plan.ranks_in_block[mb]]
        return typed(slab, self._dtype, (num_rows, self._plan.config.input_size))

    def logits(self, mb: int, num_rows: int) -> Tensor:
        """[R, V] of a micro-batch's sampled rows."""
        slab = self._logits[0 if len(self._logits) == 1 else self._plan.ranks_in_block[mb]]
        return typed(slab, self._dtype, (num_rows, self._plan.config.vocab_size))

    def leaving(self, num_tokens: int) -> Tensor:
        """Hidden in the order of a message to be sent, [T, H]."""
        return self._message(0, num_tokens)

    def arriving(self, num_tokens: int) -> Tensor:
        """Hidden in the order of a message received, [T, H]."""
        return self._message(1, num_tokens)

    def poison_all(self) -> None:
        for slab in chain(
            self._embed_slots,
            self._embed_stages,
            self._head_inputs,
            self._logits,
            self._messages,
            self._partials,
            *self.fetched,
        ):
            slab.fill_(POISON)

    def poison_partial(self, slot: int | None) -> None:
        assert slot is not None
        self._partials[slot].fill_(POISON)

    def _message(self, index: int, num_tokens: int) -> Tensor:
        shape = (num_tokens, self._plan.config.hidden_size)
        return typed(self._messages[index], self._dtype, shape)

    def _rows_in(self, slab: Tensor, num_tokens: int) -> Tensor:
        table = self._plan.embedding
        return typed(slab, torch_dtype(table.dtype), (num_tokens, table.shape[1]))

    def _slots(self, name: str, tier: Tier) -> list[Tensor]:
        return [
            self._take(pool)
            for pool in self._plan.pools
            if (pool.name, pool.tier) == (name, tier)
            for _ in range(pool.num_slots)
        ]

    def _take(self, pool: PoolPlan) -> Tensor:
        if pool.tier == self._plan.device_tier:
            return self._memory.take_on_device(pool.slot_bytes, pool.name)
        return self._memory.take_on_host(pool.slot_bytes, pool.name)
