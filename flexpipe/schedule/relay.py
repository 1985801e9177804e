"""Steps that rank 0 forms, told to the other ranks of a pipeline in the same process.

Rank 0 is the only one that knows which rows come next. Whatever it gives its schedule, the others
give theirs: the same micro-batches of the same steps, no sooner than it had them. A run between
processes has a channel for that; here they are queues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from flexpipe.schedule.build import MicroBatches, Steps
from flexpipe.schedule.step import MicroBatch


class Relay:
    """The steps of a job for `num_ranks` ranks: `steps[rank]` goes to that rank's schedule."""

    def __init__(self, formed: Steps, num_ranks: int) -> None:
        self._formed = formed
        # a micro-batch, or that there is no further one in the step
        self._told: list[deque[MicroBatch | None]] = [deque() for _ in range(1, num_ranks)]
        self._is_over = False
        self.steps: list[Steps] = [self._lead, *map(self._follower, self._told)]

    def _lead(self, index: int) -> Iterator[MicroBatch | None] | None:
        formed = self._formed(index)
        self._is_over = formed is None
        return None if formed is None else self._passed_on(formed)

    def _passed_on(self, formed: MicroBatches) -> Iterator[MicroBatch | None]:
        for batch in formed:
            if batch is not None:
                self._tell(batch)
            yield batch
        self._tell(None)

    def _tell(self, news: MicroBatch | None) -> None:
        for told in self._told:
            told.append(news)

    def _follower(self, told: deque[MicroBatch | None]) -> Steps:
        def step() -> Iterator[MicroBatch | None]:
            while not (self._is_over and not told):
                if not told:
                    yield None
                    continue
                batch = told.popleft()
                if batch is None:
                    return
                yield batch

        return lambda index: None if self._is_over and not told else step()
