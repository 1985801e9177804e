"""`python -m tests.runtime.thread_count MODEL FOLDER`: a run tells its threads and tokens as JSON.

In a process of its own, since torch's threads stay with a process.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import threading
from pathlib import Path

import torch

from flexpipe.job.probes import Probes
from flexpipe.plan.policy import percent_shares
from flexpipe.schedule.op import Op
from tests.hf import ragged_prompts
from tests.runtime.jobs import Runner

KNOBS = {
    **percent_shares([50, 50, 50, 50, 50, 50]),
    "micro_batch_size": 2,
    "num_micro_batches": 2,
}


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def num_foreign_threads() -> int:
    """Those that Python did not start: teams of torch's. A thread may come or go meanwhile."""
    known = {thread.native_id for thread in threading.enumerate()}
    there = {int(name) for name in os.listdir("/proc/self/task")}
    return len(there - known - {thread.native_id for thread in threading.enumerate()})


def main(model: str, folder: str) -> None:
    before, foreign_before = num_threads(), num_foreign_threads()  # imports start some
    during, foreign = [], []
    teams: dict[str, dict[str, int]] = {}

    def look(op: Op) -> None:
        during.append(num_threads())
        foreign.append(num_foreign_threads())
        if op.lane.value not in teams:
            told = torch.__config__.parallel_info()
            found = re.findall(r"(get_num|omp_get_max|mkl_get_max)_threads\(\)\s*:\s*(\d+)", told)
            teams[op.lane.value] = {name: int(number) for name, number in found}

    run = Runner(Path(model), Path(folder), ragged_prompts([100, 90, 80, 70]), 4)
    tokens = [run(KNOBS, probes=Probes(before_op=look)).tokens for _ in range(2)]
    told = {"before": before, "peak": max(during), "after": num_threads(), "teams": teams}
    # the most frequent count, for threads that have ended are listed for a moment longer
    team = statistics.mode(foreign) - foreign_before
    print(json.dumps({**told, "team": team, "tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
