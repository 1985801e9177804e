"""How far a job is, on stderr, from loading on.

A terminal gets a bar. A log gets one line per interval, so that a job that runs for a night leaves
a page and not a book.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from flexpipe.closing import Closing

INTERVAL_S = 10.0


class Progress(Closing):
    """Requests done, the phase, and useful tokens per second; threads may share it."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        """`done` of `total` requests were finished by an earlier run of the job."""
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=done,
            unit="request",
            file=sys.stderr,
            disable=not enabled or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._writes_lines = enabled and not sys.stderr.isatty()
        self._total, self._done, self._first_done = total, done, done
        self._phase = "start"
        self._num_tokens = 0
        self._start_s = self._told_s = time.perf_counter()
        self._lock = threading.Lock()

    def phase(self, name: str) -> None:
        """What the job does from now on."""
        with self._lock:
            self._phase = name
            self._num_tokens = 0
            self._first_done = self._done
            self._start_s = time.perf_counter()
            self._bar.set_postfix_str(name)
            if self._writes_lines:
                self._tell()

    def tokens(self, count: int) -> None:
        """So many more useful tokens."""
        self._num_tokens += count
        if self._writes_lines and time.perf_counter() - self._told_s >= INTERVAL_S:
            with self._lock:
                self._tell()

    def request(self) -> None:
        """One more request is done."""
        with self._lock:
            self._done += 1
            self._bar.set_postfix_str(f"{self._phase}, {self._rate():.1f} tokens/s", refresh=False)
            self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def _rate(self) -> float:
        return self._num_tokens / max(1e-9, time.perf_counter() - self._start_s)

    def _tell(self) -> None:
        now = time.perf_counter()
        done, left = self._done - self._first_done, self._total - self._done
        eta = f", {left * (now - self._start_s) / done:.0f} s to go" if done else ""
        rate = f", {self._rate():.1f} tokens/s{eta}" if self._num_tokens else ""
        so_far = f"{self._done}/{self._total} requests"
        print(f"flexpipe: {self._phase}: {so_far}{rate}", file=sys.stderr)
        self._told_s = now
