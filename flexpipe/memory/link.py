"""Links: what bytes cross them, and how fast they may.

A real link only counts. An emulated one is a clock of its own: a move copies its bytes and is done
no sooner than bytes ÷ bandwidth after the link was free. Lanes on one link take turns of
`EMULATED_TURN_S`, so that a short move does not wait for the whole of a long one.
"""

from __future__ import annotations

import threading
import time

from flexpipe.plan.hardware import EMULATED_TURN_S


class Link:
    """One resource with a bandwidth; any lane may use it."""

    def __init__(self, name: str, stop: threading.Event, bytes_per_s: float | None = None) -> None:
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.num_bytes = 0
        self._stop = stop
        self._free_at = 0.0
        self._lock = threading.Lock()

    def deliver(self, num_bytes: int, started: float) -> None:
        """Account for bytes whose copy began at `started`; return when the link has moved them."""
        if self.bytes_per_s is not None:
            self._take_turns(num_bytes / self.bytes_per_s, started)
        with self._lock:
            self.num_bytes += num_bytes

    def _take_turns(self, left_s: float, done_at: float) -> None:
        while left_s > 0 and not self._stop.is_set():
            turn_s = min(left_s, EMULATED_TURN_S)
            with self._lock:
                self._free_at = done_at = max(self._free_at, done_at) + turn_s
            wait_until(done_at, self._stop)
            left_s -= turn_s


def wait_until(moment: float, stop: threading.Event) -> None:
    """Sleep until `moment` on the performance counter's clock; a set `stop` ends it early."""
    while (left := moment - time.perf_counter()) > 0 and not stop.is_set():
        # short sleeps are more exact than waits on the event, long ones would not be interruptible
        time.sleep(min(left, 0.05))
