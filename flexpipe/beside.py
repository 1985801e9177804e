"""Work on a second core, for what is thinking in Python and would wait for one interpreter."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from flexpipe.closing import Closing

T = TypeVar("T")


class Beside(Closing, Generic[T]):
    """Does `work` in a forked process while this one goes on; `result` waits for it.

    The child sees everything as it is now, at no cost, but must not compute with torch, whose
    threads it lacks. Where processes cannot be forked or have one core, or if the child dies,
    `result` does the work here. What `work` returns or raises must be picklable.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._process = None
        if sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1:
            context = multiprocessing.get_context("fork")
            self._answer, writer = context.Pipe(duplex=False)
            self._process = context.Process(target=_do, args=(work, writer), daemon=True)
            self._process.start()
            writer.close()

    def result(self) -> T:
        if self._process is not None:
            try:
                value, error = self._answer.recv()
            except EOFError:
                pass  # it was killed
            else:
                if error is not None:
                    raise error
                done: T = value
                return done
        return self._work()

    def close(self) -> None:
        """Give up what is not done."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._answer.close()


def _do(work: Callable[[], T], answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends this
    try:
        answer.send((work(), None))
    except Exception as error:
        answer.send((None, error))
