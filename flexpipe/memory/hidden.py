"""Hidden states between layers: one buffer per micro-batch, at home on its tier.

Where the home is not beside the compute device, COMPUTE works in a slot, and loads and stores carry
the rows of this step's new tokens, no more.

Shapes: T new tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flexpipe.memory.disk import DiskFile
from flexpipe.memory.tier import POISON, TierMemory, spoil, torch_dtype, typed
from flexpipe.plan.layout import ALIGN, round_up
from flexpipe.plan.plan import Plan
from flexpipe.plan.pools import NUM_HIDDEN_SLOTS, NUM_STAGES
from flexpipe.plan.tier import Tier
from flexpipe.schedule.step import MicroBatch

Copy = Callable[[Tensor, Tensor], None]


class HiddenStore:
    """Homes, slots and staging of the micro-batches' hidden."""

    def __init__(self, plan: Plan, memory: TierMemory, disk: DiskFile | None) -> None:
        self._plan = plan
        self._disk = disk
        self._dtype = torch_dtype(plan.compute_dtype)
        self._homes: dict[int, Tensor] = {}
        self._offsets: dict[int, int] = {}
        offset = 0
        for mb in plan.micro_batches:
            num_bytes = plan.hidden_bytes(mb)
            if mb.hidden_home == Tier.DISK:
                self._offsets[mb.index] = offset
                offset += num_bytes
            elif mb.hidden_home == plan.device_tier:
                self._homes[mb.index] = memory.take_on_device(num_bytes, "hidden")
            else:
                self._homes[mb.index] = memory.take_on_host(num_bytes, "hidden")
        pools = {pool.name: pool for pool in plan.pools}
        slots, staging = pools.get("hidden slots"), pools.get("hidden staging")
        self._slots = [
            memory.take_on_device(slots.slot_bytes, slots.name)
            for _ in range(NUM_HIDDEN_SLOTS)
            if slots
        ]
        stages = [
            memory.take_on_host(staging.slot_bytes, staging.name)
            for _ in range(2 * NUM_STAGES)
            if staging
        ]
        self._read_stages, self._write_stages = stages[:NUM_STAGES], stages[NUM_STAGES:]

    def view(self, batch: MicroBatch, slot: int | None) -> Tensor:
        """What COMPUTE works on, [T, H] in the compute dtype."""
        slab = self._homes[batch.index] if slot is None else self._slots[slot]
        return typed(slab, self._dtype, (batch.num_new, self._plan.config.hidden_size))

    def num_bytes(self, batch: MicroBatch) -> int:
        """Bytes of this step's hidden."""
        return batch.num_new * self._plan.config.hidden_size * self._dtype.itemsize

    def read(self, batch: MicroBatch, *, slot: int | None, stage: int | None) -> int:
        """READ_HIDDEN: from disk into a slot or a stage. Bytes read."""
        assert self._disk is not None
        target = self._pick(slot, self._read_stages, stage)
        size = round_up(self.num_bytes(batch), ALIGN)
        self._disk.read(target[:size].numpy(), self._offsets[batch.index], needed=size)
        return size

    def write(self, batch: MicroBatch, *, slot: int | None, stage: int | None) -> int:
        """WRITE_HIDDEN: from a slot or a stage to disk."""
        assert self._disk is not None
        source = self._pick(slot, self._write_stages, stage)
        size = round_up(self.num_bytes(batch), ALIGN)
        self._disk.write(source[:size].numpy(), self._offsets[batch.index])
        return size

    def load(self, batch: MicroBatch, *, slot: int, stage: int | None, copy: Copy) -> int:
        """LOAD_HIDDEN: from host memory into a slot."""
        size = self.num_bytes(batch)
        source = self._homes[batch.index] if stage is None else self._read_stages[stage]
        copy(self._slots[slot][:size], source[:size])
        return size

    def store(self, batch: MicroBatch, *, slot: int, stage: int | None, copy: Copy) -> int:
        """STORE_HIDDEN: from a slot to host memory."""
        size = self.num_bytes(batch)
        target = self._homes[batch.index] if stage is None else self._write_stages[stage]
        copy(target[:size], self._slots[slot][:size])
        return size

    def poison(
        self,
        *,
        slot: int | None = None,
        read_stage: int | None = None,
        write_stage: int | None = None,
    ) -> None:
        """Overwrite a slot or a stage with finite rubbish."""
        stages = (self._read_stages, read_stage), (self._write_stages, write_stage)
        spoil((self._slots, slot), *stages)

    def poison_all(self) -> None:
        stages = (*self._read_stages, *self._write_stages)
        for slab in (*self._homes.values(), *self._slots, *stages):
            slab.fill_(POISON)

    def _pick(self, slot: int | None, stages: list[Tensor], stage: int | None) -> Tensor:
        if stage is not None:
            return stages[stage]
        assert slot is not None
        return self._slots[slot]
