"""Whatever fails, wherever: the run ends at once with one text and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from flexpipe.errors import PlanError, RunError
from flexpipe.job.probes import Probes
from flexpipe.plan.policy import percent_shares
from flexpipe.schedule.op import Kind, Op
from tests.hf import CheckpointFactory, ragged_prompts
from tests.runtime.jobs import EVERYWHERE, EVERYWHERE_ON_CPU, FAST, Runner
from tests.schedule.plans import OF_ONE_STAGE
from tests.warm import Finished

PROMPTS = ragged_prompts([5, 9, 30, 70, 12, 40, 8, 20, 33])  # three rows for each micro-batch
PROMPT_S = 5.0  # the claim is a second; a loaded machine may take a little longer
ON_CPU = {Kind.READ_WEIGHT, Kind.READ_EMBED, Kind.READ_CACHE, Kind.WRITE_CACHE, Kind.READ_HIDDEN}
ON_CPU |= {Kind.WRITE_HIDDEN, Kind.COMPUTE, Kind.SAMPLE, Kind.FETCH_TOKENS, Kind.COMMIT}
POLICIES: Mapping[str, Mapping[str, Any]] = {"emulated": EVERYWHERE, "cpu": EVERYWHERE_ON_CPU}
FAULTS = [
    *(("emulated", "event", kind) for kind in OF_ONE_STAGE if kind != Kind.BARRIER),
    *(("cpu", "event", kind) for kind in Kind if kind in ON_CPU),
    ("emulated", "single", Kind.BARRIER),
    ("emulated", "multi", Kind.BARRIER),
]


class Fault(Exception):
    """Something that nobody foresaw."""


@dataclass
class FailAt:
    """Fails the `n`-th op of a kind; remembers which, and when."""

    kind: Kind
    n: int = 2
    error: BaseException = field(default_factory=lambda: Fault("the magic smoke came out"))
    op: Op | None = None
    failed_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, op: Op) -> None:
        if op.kind != self.kind:
            return
        with self._lock:
            self.n -= 1
            if self.n:
                return
        self.op, self.failed_at = op, time.perf_counter()
        raise self.error

    def seconds_since(self) -> float:
        assert self.failed_at, "the fault was never reached"
        return time.perf_counter() - self.failed_at


@pytest.fixture
def runner(hf_checkpoint: CheckpointFactory, tmp_path: Path) -> Runner:
    return Runner(hf_checkpoint("llama2"), tmp_path, PROMPTS)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No lane's thread, no job's folder."""
    yield
    assert not [thread.name for thread in threading.enumerate() if "flexpipe" in thread.name]
    assert list(tmp_path.glob("offload/jobs/*")) == []


@pytest.mark.parametrize(("device", "strategy", "kind"), FAULTS)
def test_a_fault_in_any_op_ends_the_run_and_names_it(
    runner: Runner, device: str, strategy: str, kind: Kind
) -> None:
    fail = FailAt(kind)
    given = {**POLICIES[device], "strategy": strategy}
    with pytest.raises(RunError) as caught:
        runner(given, device=device, probes=Probes(before_op=fail))
    took_s = fail.seconds_since()
    print(f"{device}, {kind}: ended {took_s * 1e3:.1f} ms after the fault")
    assert took_s < PROMPT_S
    assert fail.op is not None
    text = str(caught.value)
    assert text.endswith("failed: Fault: the magic smoke came out")
    mb = "" if fail.op.mb is None else f", micro-batch {fail.op.mb}"
    where = rf"{kind} of (embed|decoder \d|head \[\d+:\d+\]) \(step {fail.op.step}{mb}\) failed"
    assert re.match(where, text), text


@pytest.mark.parametrize("device", POLICIES)
def test_the_kinds_above_are_all_there_are(runner: Runner, device: str) -> None:
    seen: set[Kind] = set()
    runner(POLICIES[device], device=device, probes=Probes(before_op=lambda op: seen.add(op.kind)))
    assert seen == {kind for name, _, kind in FAULTS if name == device} - {Kind.BARRIER}


CRAWL = 10.0  # bytes a second
# the link that crawls -> an op that then never ends, the n-th op of a kind that need not wait for
# it, and the percentage of weights on gpu that makes it so
CRAWLING: Mapping[str, tuple[Kind, Kind, int, float]] = {
    "h2d_bytes_per_s": (Kind.LOAD_WEIGHT, Kind.READ_WEIGHT, 2, 0),
    "d2h_bytes_per_s": (Kind.STORE_CACHE, Kind.COMPUTE, 6, 0),
    "disk_read_bytes_per_s": (Kind.READ_WEIGHT, Kind.COMPUTE, 1, 50),
    "disk_write_bytes_per_s": (Kind.WRITE_CACHE, Kind.COMPUTE, 6, 0),
    "flops_per_s": (Kind.COMPUTE, Kind.LOAD_WEIGHT, 2, 0),
}


@pytest.mark.parametrize("link", CRAWLING)
def test_a_fault_does_not_wait_for_a_crawling_link(runner: Runner, link: str) -> None:
    crawling, kind, n, weights_on_gpu = CRAWLING[link]
    fail = FailAt(kind, n=n)
    started: list[Kind] = []

    def before(op: Op) -> None:
        started.append(op.kind)
        if op.kind == kind and fail.n == 1:
            time.sleep(0.3)  # long enough for all others to be caught in their waits
        fail(op)

    shares = percent_shares([weights_on_gpu, 50 - weights_on_gpu, 0, 50, 100, 0])
    with pytest.raises(RunError, match="magic smoke"):
        runner(
            {**EVERYWHERE, **shares},
            emulation=replace(FAST, **{link: CRAWL}),
            probes=Probes(before_op=before),
        )
    print(f"{link}: ended {fail.seconds_since() * 1e3:.1f} ms after the fault")
    assert fail.seconds_since() < PROMPT_S
    assert crawling in started


def test_the_run_ends_as_soon_as_the_op_now_running_returns(runner: Runner) -> None:
    fail = FailAt(Kind.READ_WEIGHT, n=3)
    returned: list[float] = []

    def before(op: Op) -> None:
        if op.kind == Kind.COMPUTE:
            time.sleep(0.5)
            returned.append(time.perf_counter())
        fail(op)

    with pytest.raises(RunError, match="magic smoke"):
        runner(EVERYWHERE_ON_CPU, device="cpu", probes=Probes(before_op=before))
    assert fail.seconds_since() < 0.5 + PROMPT_S
    assert len([at for at in returned if at > fail.failed_at]) <= 1, "a queued op was performed"


def test_of_several_faults_the_first_is_told(runner: Runner) -> None:
    first = FailAt(Kind.COMPUTE, n=5)

    def before(op: Op) -> None:
        if first.op is not None:
            raise Fault("an aftershock")
        first(op)

    with pytest.raises(RunError, match="magic smoke"):
        runner(EVERYWHERE, probes=Probes(before_op=before))


def test_an_error_that_has_advice_keeps_it(runner: Runner) -> None:
    fail = FailAt(Kind.COMMIT, error=PlanError("Lower --gpu-mem."))
    with pytest.raises(RunError, match=r"^commit of head .* failed: Lower --gpu-mem\.$"):
        runner(EVERYWHERE, probes=Probes(before_op=fail))


def test_ctrl_c_ends_a_run_that_waits(runner: Runner) -> None:
    interrupted: list[float] = []

    def interrupt(op: Op) -> None:
        if op.kind == Kind.LOAD_WEIGHT and not interrupted:
            interrupted.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

    slow = replace(FAST, h2d_bytes_per_s=CRAWL)
    with pytest.raises(KeyboardInterrupt):
        runner(EVERYWHERE, emulation=slow, probes=Probes(before_op=interrupt))
    took_s = time.perf_counter() - interrupted[0]
    print(f"ended {took_s * 1e3:.1f} ms after Ctrl-C")
    assert took_s < PROMPT_S


def test_ctrl_c_before_the_first_op_leaves_nothing(runner: Runner) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner(EVERYWHERE, probes=Probes(on_stage=lambda stage: signal.raise_signal(signal.SIGINT)))


def test_a_checkpoint_cut_while_it_is_read_is_one_clear_error(
    hf_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(hf_checkpoint("llama2"), model)
    file = model / "model.safetensors"

    def cut(op: Op) -> None:
        if op.kind == Kind.COMMIT and file.stat().st_size > 100_000:
            os.truncate(file, 100_000)

    runner = Runner(model, tmp_path, PROMPTS, max_tokens=40)
    with pytest.raises(RunError) as caught:
        runner(EVERYWHERE_ON_CPU, device="cpu", probes=Probes(before_op=cut))
    text = str(caught.value)
    assert re.match(r"read_(weight|embed) of .* \(step \d+.*\) failed: ", text)
    assert f"{file} ends at byte 100000" in text and "fetch it again" in text


def test_a_device_that_fails_is_one_clear_error(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = threading.Event()
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if broken.is_set():
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    def before(op: Op) -> None:
        if op.kind == Kind.COMMIT:
            broken.set()

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(RunError, match=r"read_.* of .* failed: cannot read .*: Input/output error"):
        runner(EVERYWHERE_ON_CPU, device="cpu", probes=Probes(before_op=before))


# -- the command ----------------------------------------------------------------------------------


def arguments(model: Path, folder: Path, output: Path, *others: object) -> list[str]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": 1, "prompt_token_ids": [5, 6, 7]}) + "\n")
    fixed = ("run", "--model", model, "-i", prompts, "-o", output, "--max-tokens", 400)
    return [str(word) for word in (*fixed, "--offload-dir", folder / "offload", *others)]


def last_line(text: str) -> str:
    """What stands there in the end, the progress bar left out."""
    return re.split(r"[\r\n]", text.strip())[-1]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tiny file system takes root and a kernel that lets it mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_results_that_find_no_room_are_one_line_and_exit_code_5(
    hf_checkpoint: CheckpointFactory,
    tmp_path: Path,
    tiny_disk: Path,
    flexpipe_process: Callable[..., Finished],
) -> None:
    (tiny_disk / "other").write_bytes(bytes(64 << 10))
    done = flexpipe_process(
        *arguments(hf_checkpoint("llama2"), tmp_path, tiny_disk / "out.jsonl"), "--device", "cpu"
    )
    line = last_line(done.stderr)
    assert done.returncode == 5, done.stderr
    assert line.startswith("flexpipe: error: cannot write") and "No space left" in line
    assert "run the same command again" in line and "Traceback" not in done.stderr


def test_an_offload_directory_too_small_is_refused_before_anything_is_loaded(
    hf_checkpoint: CheckpointFactory,
    tmp_path: Path,
    tiny_disk: Path,
    flexpipe_process: Callable[..., Finished],
) -> None:
    words = arguments(hf_checkpoint("llama2"), tmp_path, tmp_path / "out.jsonl")
    words[words.index("--offload-dir") + 1] = str(tiny_disk / "offload")
    percent = ("--percent", 0, 100, 0, 0, 0, 100)
    done = flexpipe_process(*words, "--device", "cpu", *percent)
    line = last_line(done.stderr)
    assert done.returncode == 4, done.stderr
    assert "disk needs" in line and "This would fit: " in line
    assert list((tiny_disk / "offload" / "jobs").iterdir()) == []


def test_space_that_others_took_since_the_plan_is_one_clear_error(
    runner: Runner, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexpipe.runtime.usable.free_disk", lambda path: 1 << 40)
    (runner.folder / "offload").symlink_to(tiny_disk)
    with pytest.raises(RunError, match=r"the disk of .* is full: .* wanted, .* free\. Free some"):
        runner(
            {**EVERYWHERE_ON_CPU, **percent_shares([0, 100, 0, 0, 0, 100])},
            device="cpu",
            probes=Probes(on_stage=lambda stage: pytest.fail("something was loaded")),
        )


def test_ctrl_c_of_the_command_is_130_and_clears_its_folder(
    hf_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    command = arguments(hf_checkpoint("llama2"), tmp_path, tmp_path / "out.jsonl")
    crawl = ("--emulate", f"h2d={CRAWL}", "--percent", "0", "100", "0", "0", "0", "100")
    process = subprocess.Popen(
        [sys.executable, "-m", "flexpipe", *command, *crawl], stderr=subprocess.PIPE, text=True
    )
    jobs = tmp_path / "offload" / "jobs"
    limit = time.monotonic() + 60
    while not list(jobs.glob("*/KV cache.bin")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    print(f"ended {time.monotonic() - start:.2f} s after Ctrl-C")
    assert process.returncode == 130, stderr
    told = "flexpipe: interrupted; what is done is kept, go on with: flexpipe run "
    assert last_line(stderr).startswith(told), stderr
    assert list(jobs.iterdir()) == []
