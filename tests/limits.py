"""Limits that a test puts on its own process, only around what it tests."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def file_size(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`: what a full disk looks like.

    It holds for the whole process, also for a log that pytest writes: leave before a test ends.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
