"""Whatever a kill cuts off, a journal gives back a prefix of each row, and all it promised."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flexpipe.errors import InputError, RunError
from flexpipe.job import journal as journal_module
from flexpipe.job.journal import Journal, SystemCalls, digest_input, path_for
from tests.limits import file_size

FINGERPRINT = {"model": "7c" * 32, "compute dtype": "float32"}
INPUT = b"one\ntwo\nthree\n"


def digest_of(content: bytes) -> Callable[[int], str]:
    return lambda num_bytes: hashlib.sha256(content[:num_bytes]).hexdigest()


def begin(
    path: Path,
    fingerprint: dict[str, str] = FINGERPRINT,
    content: bytes = INPUT,
    overwrite: bool = False,
    on_new: Callable[[], None] = lambda: None,
    system: SystemCalls | None = None,
) -> Journal:
    return Journal.open(
        path,
        fingerprint,
        digest_of(content),
        len(content),
        overwrite,
        on_new=on_new,
        system=system,
    )


def token_of(row: int, position: int) -> int:
    return (row * 7919 + position * 104729) % 200_000


def tokens_of(row: int, num_tokens: int) -> tuple[int, ...]:
    return tuple(token_of(row, position) for position in range(num_tokens))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return path_for(tmp_path / "out.jsonl")


# what comes back


def test_journal_lies_beside_the_output() -> None:
    assert path_for(Path("some/out.jsonl")) == Path("some/out.jsonl.journal")


def test_unfinished_rows_come_back_and_done_ones_do_not(path: Path) -> None:
    with begin(path) as first:
        assert first.is_new and not first.unfinished
        for token in (5, 6):
            first.append(1, token)
            first.append(2, token + 10)
        first.flush(force=True)
        first.append(1, 7)
        first.append(3, 8)
        first.done(2)
        first.done(3)
        first.done(99)
    with begin(path) as second:
        assert not second.is_new
        assert second.unfinished == {1: (5, 6, 7)}
        second.append(1, 9)
    with begin(path) as third:
        assert third.unfinished == {1: (5, 6, 7, 9)}


def test_forced_flush_is_in_the_file_at_once(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with begin(path) as journal:
        journal.append(4, 2)
        journal.flush(force=True)
        shutil.copy(path, copy)
    with begin(copy) as copied:
        assert copied.unfinished == {4: (2,)}


def test_tokens_are_written_in_batches_and_synced_now_and_then(path: Path) -> None:
    now, calls = [100.0], Counter[str]()

    def write(fd: int, data: memoryview) -> int:
        calls["write"] += 1
        return os.write(fd, data)

    def sync(fd: int) -> None:
        calls["sync"] += 1

    system = SystemCalls(write=write, sync=sync, clock=lambda: now[0])
    with begin(path, system=system) as journal:
        calls.clear()
        for step in range(1000):
            for row in range(8):
                journal.append(row, token_of(row, step))
            journal.flush()
            now[0] += 0.01
        assert 8 <= calls["write"] <= 10, "ten seconds in batches of one"
        assert calls["sync"] <= 2


def test_complete_job_keeps_the_header_alone(path: Path) -> None:
    begin(path).close(complete=True)
    header = path.read_bytes()
    with begin(path) as journal:
        journal.append(1, 5)
        journal.flush(force=True)
        journal.append(2, 5)
        journal.close(complete=True)
    assert path.read_bytes() == header
    with begin(path) as journal:
        assert not journal.is_new and not journal.unfinished


def test_file_stays_in_proportion_to_what_is_alive(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "ROTATE_BYTES", 4096)
    with begin(path) as journal:
        journal.append(0, 1)
        largest = 0
        for row in range(1, 2000):
            for position in range(20):
                journal.append(row, token_of(row, position))
            journal.flush(force=True)
            journal.done(row)
            largest = max(largest, path.stat().st_size)
        assert largest < 5000
    with begin(path) as journal:
        assert journal.unfinished == {0: (1,)}


def test_threads_may_share_a_journal(path: Path) -> None:
    with begin(path) as journal:

        def work(row: int) -> None:
            for position in range(500):
                journal.append(row, token_of(row, position))
                journal.flush(force=position % 10 == 0)

        threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with begin(path) as journal:
        assert journal.unfinished == {row: tokens_of(row, 500) for row in range(4)}


def test_closed_journal_takes_no_more(path: Path) -> None:
    journal = begin(path)
    journal.close(complete=False)
    size = path.stat().st_size
    journal.append(1, 1)
    journal.flush(force=True)
    journal.close(complete=True)
    assert path.stat().st_size == size


# damage


def test_journal_cut_anywhere_gives_a_prefix(path: Path, tmp_path: Path) -> None:
    header = begin(path)
    whole_from = path.stat().st_size
    header.close(complete=False)
    with begin(path) as journal:
        for position in range(4):
            for row in (1, 2):
                journal.append(row, token_of(row, position))
            journal.flush(force=True)
    content, copy = path.read_bytes(), tmp_path / "copy"
    seen = set()
    for size in range(whole_from, len(content) + 1):
        copy.write_bytes(content[:size])
        with begin(copy) as journal:
            for row, tokens in journal.unfinished.items():
                assert tokens == tokens_of(row, len(tokens))
            seen.add(len(journal.unfinished.get(1, ())))
            recovered = dict(journal.unfinished)
        with begin(copy) as again:
            assert again.unfinished == recovered, "what was torn was cut off"
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("spoil", [b"\0", b"\n", b"9"])
def test_damaged_byte_hides_what_follows_but_changes_no_token(
    path: Path, tmp_path: Path, spoil: bytes
) -> None:
    begin(path).close(complete=False)
    start = path.stat().st_size
    with begin(path) as journal:
        for position in range(3):
            journal.append(1, token_of(1, position))
            journal.flush(force=True)
    content, copy = path.read_bytes(), tmp_path / "copy"
    for offset in range(start, len(content)):
        copy.write_bytes(content[:offset] + spoil + content[offset + 1 :])
        with begin(copy) as journal:
            tokens = journal.unfinished.get(1, ())
            assert tokens == tokens_of(1, len(tokens))


@pytest.mark.parametrize("content", [b"precious\n", b"precious", b'{"id": 1}\n', b"\0" * 5000])
def test_file_that_is_no_journal_is_kept_unless_told(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"out\.jsonl\.journal is not a journal.*--overwrite"):
        begin(path)
    assert path.read_bytes() == content
    with begin(path, overwrite=True) as journal:
        assert journal.is_new


def test_journal_of_another_format_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(path).close(complete=False)
    monkeypatch.setattr(journal_module, "VERSION", 2)
    with pytest.raises(InputError, match="format 1, but this flexpipe reads format 2"):
        begin(path)


def test_path_that_cannot_be_a_journal_is_refused(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        begin(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        begin(tmp_path / "pipe")
    with pytest.raises(InputError, match="No such file or directory; name an --output-file"):
        begin(tmp_path / "missing" / "journal")


def test_interrupted_write_is_made_good(path: Path) -> None:
    interrupts = iter([False, True])  # the header's, the batch's

    def write(fd: int, data: memoryview) -> int:
        if next(interrupts, False):
            os.write(fd, data[:7])
            raise KeyboardInterrupt
        return os.write(fd, data)

    journal = begin(path, system=SystemCalls(write=write))
    journal.append(1, 5)
    with pytest.raises(KeyboardInterrupt):
        journal.flush(force=True)
    journal.append(1, 6)
    journal.close(complete=False)
    with begin(path) as journal:
        assert journal.unfinished == {1: (5, 6)}


def test_new_file_is_on_disk_before_it_takes_the_name(path: Path) -> None:
    calls = []

    def sync(fd: int) -> None:
        calls.append("sync")

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        os.replace(source, target)

    begin(path, system=SystemCalls(sync=sync, replace=replace)).close(complete=True)
    assert calls == ["sync", "replace"]


# the same job


def test_difference_is_named_with_both_values(path: Path) -> None:
    begin(path).close(complete=False)
    held = path.read_bytes()
    changed = {"model": "e1" * 32, "compute dtype": "bfloat16", "temperature": "0.7"}
    with pytest.raises(InputError) as refused:
        begin(path, changed, b"one\ntoo\nthree\n")
    assert str(refused.value) == (
        f"cannot resume from {path}, since other tokens would come out now:\n"
        "  model was 7c7c7c7c7c7c…, is e1e1e1e1e1e1…\n"
        "  compute dtype was float32, is bfloat16\n"
        "  temperature was absent, is 0.7\n"
        "  input changed within its first 14 bytes (lines may only be added behind them)\n"
        "Run the job as it was begun, name another --output-file, or give --overwrite to start "
        "again"
    )
    assert path.read_bytes() == held


def test_shorter_input_is_refused(path: Path) -> None:
    begin(path).close(complete=True)
    with pytest.raises(InputError, match="input had 14 bytes, has 8"):
        begin(path, content=INPUT[:8])


def test_input_may_grow_and_is_then_held_to_its_new_length(path: Path) -> None:
    begin(path).close(complete=True)
    grown = INPUT + b"four\n"
    begin(path, content=grown).close(complete=True)
    begin(path, content=grown).close(complete=True)
    with pytest.raises(InputError, match="within its first 19 bytes"):
        begin(path, content=INPUT + b"FOUR\n")
    with pytest.raises(InputError, match="had 19 bytes, has 14"):
        begin(path)


def test_overwrite_starts_again(path: Path) -> None:
    with begin(path) as journal:
        journal.append(1, 5)
    with begin(path, {"model": "other"}, b"new\n", overwrite=True) as journal:
        assert journal.is_new and not journal.unfinished


def test_new_journal_is_begun_only_after_the_output_agreed(path: Path) -> None:
    def refuse() -> None:
        assert path.read_bytes() == b"", "no header yet"
        raise InputError("the output is not empty")

    for overwrite in (False, True):
        with pytest.raises(InputError, match="the output is not empty"):
            begin(path, overwrite=overwrite, on_new=refuse)
        assert not path.exists()
    begin(path).close(complete=False)
    begin(path, on_new=refuse).close(complete=False)  # not a new one
    with pytest.raises(InputError, match="the output is not empty"):
        begin(path, overwrite=True, on_new=refuse)
    assert not path.exists(), "an old journal beside a new output would mix two runs"


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (b"a\nb\n", b"a\nb\nc\n", True),
        (b"a\nb", b"a\nb\nc\n", True),
        (b"a\nb", b"a\nb\r\nc\n", True),
        (b"a\nb\r", b"a\nb\r\nc\n", True),
        (b"a\nb", b"a\nbc\n", False),
        (b"a\nb", b"a\nb\rc\n", False),
        (b"a\nb\n", b"a\nc\nc\n", False),
        (b"", b"a\n", True),
    ],
)
def test_digest_tells_added_lines_from_a_line_that_went_on(
    tmp_path: Path, then: bytes, now: bytes, same: bool
) -> None:
    input_file = tmp_path / "in"
    input_file.write_bytes(then)
    digest = digest_input(input_file, len(then))
    input_file.write_bytes(now)
    assert (digest_input(input_file, len(then)) == digest) is same


def test_digest_covers_all_of_a_long_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_CHUNK_BYTES", 3)
    input_file = tmp_path / "in"
    input_file.write_bytes(INPUT)
    assert digest_input(input_file, len(INPUT)) == hashlib.sha256(INPUT).hexdigest()
    assert digest_input(input_file, 8) == hashlib.sha256(INPUT[:8]).hexdigest()


# one process at a time


def test_second_process_is_refused_until_the_first_ends(path: Path) -> None:
    first = begin(path)
    first.append(1, 5)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="another process is running this job: it holds"):
            begin(path, overwrite=overwrite)
    first.close(complete=False)
    with begin(path) as second:
        assert second.unfinished == {1: (5,)}


def test_lock_outlives_rotation_and_dies_with_its_process(path: Path) -> None:
    ready = path.with_name("ready")

    def hold() -> None:
        journal = begin(path)
        journal.append(1, 5)
        journal._rewrite()
        ready.touch()
        signal.pause()

    child = fork(hold)
    wait_for(ready.exists)
    with pytest.raises(InputError, match="another process"):
        begin(path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with begin(path) as journal:
        assert journal.unfinished == {1: (5,)}


def test_two_processes_never_hold_one_journal(path: Path) -> None:
    inside = path.with_name("inside")

    def contend() -> None:
        held = 0
        while held < 25:
            try:
                journal = begin(path)
            except InputError:
                continue
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is inside
            journal._rewrite()
            inside.unlink()
            journal.close(complete=held % 2 == 0)
            held += 1

    children = [fork(contend) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


# full disks


def test_batch_that_does_not_fit_is_taken_back(path: Path) -> None:
    journal = begin(path)
    journal.append(1, 5)
    journal.flush(force=True)
    held = path.read_bytes()
    with file_size(len(held) + 1):  # one token takes two bytes even in a new file
        journal.append(1, 6)
        with pytest.raises(RunError, match=r"cannot write the journal .*: File too large"):
            journal.flush(force=True)
        assert path.read_bytes() == held
        with pytest.raises(RunError):
            journal.flush(force=True)
    assert path.read_bytes() == held
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    journal.close(complete=False)
    with begin(path) as journal:
        assert journal.unfinished == {1: (5, 6)}


def test_error_of_the_job_is_told_before_that_of_its_journal(path: Path) -> None:
    journal = begin(path)
    journal.append(1, 5)
    with file_size(1), pytest.raises(ZeroDivisionError), journal:
        raise ZeroDivisionError
    with file_size(1), pytest.raises(RunError):
        begin(path)


# crashes, simulated at any byte


class Crash(BaseException):
    """The process is dead, as far as the journal can tell."""


@dataclass
class Faults:
    """System calls that fail, or end the process, once so many bytes and calls have gone by."""

    left: int | None = None
    crash: bool = True
    dead: bool = False
    now: float = 0.0

    def calls(self) -> SystemCalls:
        return SystemCalls(
            write=self._write, sync=self._sync, replace=self._replace, clock=lambda: self.now
        )

    def _spend(self, cost: int) -> int:
        """How much of `cost` is left; the fault itself if nothing is."""
        if self.dead:
            raise Crash
        if self.left is None:
            return cost
        if self.left == 0:
            self.dead = self.crash
            raise Crash if self.crash else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        given = min(cost, self.left)
        self.left -= given
        return given

    def _write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data[: self._spend(len(data))])

    def _sync(self, fd: int) -> None:
        self._spend(1)

    def _replace(self, source: Path, target: Path) -> None:
        self._spend(1)
        os.replace(source, target)
        if self.crash:
            self._spend(1)


ROWS = st.integers(0, 4)
FAULTS = st.none() | st.tuples(st.integers(0, 400), st.booleans())


class JournalMachine(RuleBasedStateMachine):
    """A job that appends, finishes rows, runs out of disk and is killed, over and over."""

    @initialize()
    def start(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(journal_module, "ROTATE_BYTES", 300)
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "journal"
        self.length = Counter[int]()  # tokens generated of each row that is not done
        self.promised = Counter[int]()  # of these, what must survive
        self.finished: set[int] = set()  # rows in the output; never to be generated again
        self.forgotten: set[int] = set()  # of these, what must not come back
        self.faults = Faults()
        self.journal = begin(self.path, system=self.faults.calls())

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal._file.close()
            shutil.rmtree(self.directory)
            self.patch.undo()

    @rule(row=ROWS, count=st.integers(1, 12))
    def append(self, row: int, count: int) -> None:
        if row not in self.finished:
            for _ in range(count):
                self.journal.append(row, token_of(row, self.length[row]))
                self.length[row] += 1

    @rule(row=ROWS)
    def done(self, row: int) -> None:
        self.finished.add(row)
        self.journal.done(row)

    @rule(old=ROWS)
    def next_rows(self, old: int) -> None:
        """A finished row's index is used again, as no job does, so that there is always work."""
        if old in self.forgotten:
            self.finished.discard(old)
            self.forgotten.discard(old)
            del self.length[old], self.promised[old]

    @rule(seconds=st.floats(0, 7))
    def wait(self, seconds: float) -> None:
        self.faults.now += seconds
        self.journal.flush()

    @rule(fault=FAULTS)
    def flush(self, fault: tuple[int, bool] | None) -> None:
        if self._under(fault, lambda: self.journal.flush(force=True)):
            self._promise()
        elif not self.journal._file.is_open:
            self._resume()

    @rule(fault=FAULTS)
    def close_and_resume(self, fault: tuple[int, bool] | None) -> None:
        if self._under(fault, lambda: self.journal.close(complete=False)):
            self._promise()
        self._resume()

    @rule(fault=FAULTS)
    def kill_and_resume(self, fault: tuple[int, bool] | None) -> None:
        self.journal._file.close()
        self._resume(fault)

    @invariant()
    def no_journal_is_torn_while_its_process_lives(self) -> None:
        if hasattr(self, "path"):
            assert self.path.read_bytes().endswith(b"\n")

    def _under(self, fault: tuple[int, bool] | None, act: Callable[[], object]) -> bool:
        """Whether `act` succeeded with this fault ahead; a crash lets go of the journal."""
        self.faults.left, self.faults.crash = fault or (None, True)
        try:
            act()
        except RunError:
            return False
        except Crash:
            self.faults.dead = False
            self.journal._file.close()
            return False
        finally:
            self.faults.left = None
        return True

    def _resume(self, fault: tuple[int, bool] | None = None) -> None:
        def begin_again() -> None:
            self.journal = begin(self.path, system=self.faults.calls())

        if not self._under(fault, begin_again):
            begin_again()
        self._check()

    def _check(self) -> None:
        assert not self.journal.is_new
        recovered = self.journal.unfinished
        assert self.forgotten.isdisjoint(recovered)
        for row, tokens in recovered.items():
            assert tokens == tokens_of(row, len(tokens))
            assert len(tokens) <= self.length[row]
        for row in range(5):
            if row not in self.finished:
                self.length[row] = len(recovered.get(row, ()))
                assert self.length[row] >= self.promised[row]
        for row in self.finished.intersection(recovered):
            self.journal.done(row)

    def _promise(self) -> None:
        self.promised = Counter(self.length)
        self.forgotten = set(self.finished)


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=150, stateful_step_count=40)


# crashes, real


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child; exit status 0 if it returned."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@dataclass
class Kill:
    """kill -9 of oneself in the n-th call of a kind; `num_bytes` of a write are still written."""

    kind: str
    nth: int
    num_bytes: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def calls(self) -> SystemCalls:
        steps = iter(range(1 << 30))
        return SystemCalls(
            write=self._write,
            sync=self._sync,
            replace=self._replace,
            clock=lambda: float(next(steps)),  # each look is a second later
        )

    def _at(self, kind: str) -> bool:
        self.seen[kind] += 1
        return self.kind == kind and self.seen[kind] == self.nth + 1

    def _here(self, kind: str) -> None:
        if self._at(kind):
            os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, fd: int, data: memoryview) -> int:
        if self._at("write"):
            if self.num_bytes:
                os.write(fd, data[: self.num_bytes])
            os.kill(os.getpid(), signal.SIGKILL)
        return os.write(fd, data)

    def _sync(self, fd: int) -> None:
        self._here("sync")
        os.fdatasync(fd)

    def _replace(self, source: Path, target: Path) -> None:
        self._here("before replace")
        os.replace(source, target)
        self._here("after replace")


NEVER = Kill("never", 0)
NUM_ROWS, NUM_PLACES = 48, 4
LENGTHS = {row: 3 + row * 7 % 20 for row in range(NUM_ROWS)}


@dataclass
class SmallJob:
    """Rows in places, a token a step, results appended to a file: a job reduced to its journal."""

    directory: Path

    def __post_init__(self) -> None:
        self.output = self.directory / "out"
        self.promises = self.directory / "promises"

    def results(self) -> list[str]:
        return self.output.read_text().splitlines() if self.output.exists() else []

    def run(self, kill: Kill, step_s: float = 0.0) -> None:
        """What the process does that is killed."""
        journal_module.ROTATE_BYTES = 400
        journal = begin(path_for(self.output), system=kill.calls())
        finished = {int(line.split()[0]) for line in self.results()}
        rows = {row: list(journal.unfinished.get(row, ())) for row in LENGTHS}
        self._check(journal, finished)
        for row in finished:
            journal.done(row)
        queue = [row for row in rows if row not in finished]
        places: list[int] = []
        while queue or places:
            while queue and len(places) < NUM_PLACES:
                places.append(queue.pop(0))
            for row in list(places):
                if len(rows[row]) < LENGTHS[row]:
                    rows[row].append(token_of(row, len(rows[row])))
                    journal.append(row, rows[row][-1])
                if len(rows[row]) == LENGTHS[row]:
                    append_line(self.output, f"{row} {rows[row]}")
                    journal.done(row)
                    places.remove(row)
            journal.flush(force=True)
            append_line(self.promises, " ".join(f"{row}:{len(rows[row])}" for row in places))
            time.sleep(step_s)
        journal.close(complete=True)

    def _check(self, journal: Journal, finished: set[int]) -> None:
        for row, tokens in journal.unfinished.items():
            assert tokens == tokens_of(row, len(tokens))
        lines = self.promises.read_text().splitlines() if self.promises.exists() else [""]
        for promise in lines[-1].split():
            row, num_tokens = (int(number) for number in promise.split(":"))
            assert row in finished or len(journal.unfinished.get(row, ())) >= num_tokens


def append_line(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def check_every_row_is_there_once(job: SmallJob) -> None:
    whole = [f"{row} {list(tokens_of(row, LENGTHS[row]))}" for row in LENGTHS]
    assert sorted(job.results()) == sorted(whole)
    with begin(path_for(job.output)) as journal:
        assert not journal.unfinished


def kill_twice_then_finish(directory: Path, kill: Kill) -> None:
    job = SmallJob(directory)
    for _ in range(2):
        status = os.waitpid(fork(partial(job.run, kill)), 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert os.waitpid(fork(partial(job.run, NEVER)), 0)[1] == 0
    check_every_row_is_there_once(job)


KILLS = [
    *(Kill("write", nth, cut) for nth in (0, 1, 2, 4, 7, 9) for cut in (0, 1, 8, 30, 10**6)),
    *(Kill("sync", nth) for nth in range(3)),
    *(Kill("before replace", nth) for nth in range(3)),
    *(Kill("after replace", nth) for nth in range(3)),
]
TIMES_S = [0.001 + 0.0023 * k for k in range(14)]


def test_every_kill_leaves_a_job_that_finishes_as_if_unharmed_sample(tmp_path: Path) -> None:
    sample = (KILLS[1], KILLS[8], KILLS[14], KILLS[28], KILLS[31], KILLS[34], KILLS[37])
    for index, kill in enumerate(sample):
        (tmp_path / str(index)).mkdir()
        kill_twice_then_finish(tmp_path / str(index), kill)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill.kind}-{kill.nth}-{kill.num_bytes}")
def test_every_kill_leaves_a_job_that_finishes_as_if_unharmed(tmp_path: Path, kill: Kill) -> None:
    kill_twice_then_finish(tmp_path, kill)


@pytest.mark.parametrize(
    "after_s",
    [TIMES_S[7], *(pytest.param(s, marks=pytest.mark.slow) for s in TIMES_S)],
    ids=lambda s: f"{s * 1000:.1f}ms",
)
def test_job_killed_after_any_time_finishes_as_if_unharmed(tmp_path: Path, after_s: float) -> None:
    job = SmallJob(tmp_path)
    status, num_kills = -1, 0
    while status != 0:
        child = fork(partial(job.run, NEVER, step_s=0.0005))
        time.sleep(after_s + 0.005 * num_kills)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        num_kills += 1
    check_every_row_is_there_once(job)
