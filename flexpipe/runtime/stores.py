"""The memory of one stage: every pool of its plan, taken at start, by what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flexpipe.memory.buffers import Buffers
from flexpipe.memory.disk import DiskCounter, DiskFile, DiskReader
from flexpipe.memory.hidden import HiddenStore
from flexpipe.memory.kv_cache import KvCache
from flexpipe.memory.queries import QueryStore
from flexpipe.memory.tier import TierMemory
from flexpipe.memory.weights import WeightStore
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.runtime.device import Device


@contextmanager
def reserved_files(plan: Plan, directory: Path, device: Device) -> Iterator[Mapping[str, DiskFile]]:
    """A file in `directory` for every pool on disk, by the pool's name, with all its room taken."""
    with ExitStack() as stack:
        files = {}
        for pool in plan.pools:
            if pool.tier == Tier.DISK:
                file = DiskFile(directory / f"{pool.name}.bin", "rw", stop=device.stop)
                files[pool.name] = stack.enter_context(file)
                file.reserve(pool.num_bytes)
        yield files


class Stores:
    """Where the tensors of a stage rest, and where they pass."""

    def __init__(self, plan: Plan, device: Device, files: Mapping[str, DiskFile]) -> None:
        self.memory = TierMemory(device.torch_device, pin=plan.policy.pin_weights)
        self._reader = DiskReader(counter=DiskCounter(), stop=device.stop)
        self.weights = WeightStore(plan, self.memory, self._reader)
        self.kv_cache = KvCache(plan, self.memory, files.get("KV cache"))
        self.hidden = HiddenStore(plan, self.memory, files.get("hidden"))
        self.queries = QueryStore(plan, self.memory)
        self.buffers = Buffers(plan, self.memory, pin_tokens=device.has_streams)

    def close(self) -> None:
        self._reader.close()
        self.memory.close()
