"""The memory of one stage: every pool of its plan, taken at start, by what it holds."""

from __future__ import annotations

from flexpipe.memory.buffers import Buffers
from flexpipe.memory.disk import DiskCounter, DiskFile, DiskReader
from flexpipe.memory.hidden import HiddenStore
from flexpipe.memory.kv_cache import KvCache
from flexpipe.memory.queries import QueryStore
from flexpipe.memory.tier import TierMemory
from flexpipe.memory.weights import WeightStore
from flexpipe.plan.plan import Plan
from flexpipe.runtime.device import Device


class Stores:
    """Where the tensors of a stage rest, and where they pass."""

    def __init__(
        self, plan: Plan, device: Device, *, kv_file: DiskFile | None, hidden_file: DiskFile | None
    ) -> None:
        self.memory = TierMemory(device.torch_device, pin=plan.policy.pin_weights)
        self._reader = DiskReader(counter=DiskCounter(), stop=device.stop)
        self.weights = WeightStore(plan, self.memory, self._reader)
        self.kv_cache = KvCache(plan, self.memory, kv_file)
        self.hidden = HiddenStore(plan, self.memory, hidden_file)
        self.queries = QueryStore(plan, self.memory)
        self.buffers = Buffers(plan, self.memory, pin_tokens=device.has_streams)

    def close(self) -> None:
        self._reader.close()
        self.memory.close()
