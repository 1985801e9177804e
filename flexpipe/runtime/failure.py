"""The first failure of a gang of ranks, written where all of them look.

Many ranks fail when one does: their connections break, they are told to stop. Only what happened
first is told to people, so whatever may merely be a consequence waits for a better reason.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torch.distributed import Store

from flexpipe.errors import RunError
from flexpipe.memory.disk import Stopped
from flexpipe.runtime.board import StoreLost

OVER = "over"  # the key of the first failure; it holds nothing once all went well
INTERRUPTED, INTERRUPTED_CODE = "interrupted", 130


class PeerLost(RunError):
    """A neighbour's connection broke: here the failure shows, but it is elsewhere."""


class Terminated(KeyboardInterrupt):
    """The process was told to end by SIGTERM; what heeds Ctrl-C heeds this."""


# who saw a peer die tells it better than who lost its connection; seconds to wait for that
PATIENCE_S = {PeerLost: 2.0, Terminated: 3.0, Stopped: 3.0, StoreLost: 3.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The first failure of a gang: whose, what is told of it, and the exit code of all."""

    rank: int
    reason: str
    exit_code: int = RunError.exit_code

    @classmethod
    def read(cls, store: Store) -> Failure | None:
        """The one that was recorded; None where all went well."""
        text = store.get(OVER)
        return cls(**json.loads(text)) if text else None

    def record(self, store: Store) -> Failure:
        """Write it where all look, unless there is one; the first one is returned."""
        return Failure(**json.loads(store.compare_set(OVER, "", json.dumps(asdict(self)))))

    def error(self) -> BaseException:
        """What a rank raises for it."""
        if self.reason == INTERRUPTED:
            return KeyboardInterrupt()
        error = RunError(self.reason)
        error.exit_code = self.exit_code
        return error
