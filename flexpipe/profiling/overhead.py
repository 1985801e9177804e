"""What an op costs beside its work: a model of next to no work, run by the engine itself.

Times come from the recorder of real runs, of one row and of many, with everything beside the
device, with a KV cache that crosses the host links or lies on disk, and with all lanes at work.
`commit` reaches to the first layer of the next step, less the op that embeds: in between the step
is formed and its first ops are built. What the step's layers share is built by that op.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexpipe.memory.dummy import dummy_tensors
from flexpipe.model.families import read_config
from flexpipe.plan.block import Need
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.layer import LayerKind
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.planner import Planner
from flexpipe.plan.policy import Policy
from flexpipe.plan.tier import Tier
from flexpipe.policy.shares import all_on
from flexpipe.runtime.device import open_device
from flexpipe.runtime.executor import execute
from flexpipe.runtime.record import Recorder, Span
from flexpipe.runtime.stage import SampledToken, Stage
from flexpipe.runtime.stores import reserved_files
from flexpipe.schedule.op import Kind
from flexpipe.schedule.simulate import COMPUTING
from flexpipe.schedule.step import MicroBatch, Row

MANY_ROWS = 32
_BLOCK_ROWS, _BLOCK = 8, 4
_MOST_S, _LEAST_STEPS = 0.5, 4  # of one run
_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
}
_ROOMY = Budgets(gpu=2**50, cpu=2**50, disk=2**50)
_FAST = Emulation(h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12)
_OTHER = (Kind.SAMPLE, Kind.FETCH_TOKENS)
_MOVES = (Kind.LOAD_CACHE, Kind.STORE_CACHE)


def op_times(device: str, directory: Path, num_steps: int) -> dict[str, float]:
    """Mean seconds of the ops that tell overheads, of one try, since a job's add up.

    `directory` takes the model's weights. On a CPU moves are those of the emulated accelerator.
    """
    away = "emulated" if device == "cpu" else device

    def run(
        name: str, home: Tier, rows: int, *, block: int = 1, mixed: bool = False, **knobs: Any
    ) -> _Run:
        policy = _policy(home, Tier.CPU if name == "cpu" else Tier.GPU, rows, block)
        return _Run.make(name, directory, replace(policy, **knobs), num_steps, mixed=mixed)

    beside = Tier.CPU if device == "cpu" else Tier.GPU
    one, many = (run(device, beside, rows) for rows in (1, MANY_ROWS))
    mixed = run(device, beside, MANY_ROWS, mixed=True)
    moving, moving_many = (run(away, Tier.CPU, rows) for rows in (1, MANY_ROWS))
    paging, paging_many = (run(device, Tier.DISK, rows, strategy="none") for rows in (1, MANY_ROWS))
    still, busy = (run(away, home, _BLOCK_ROWS, block=_BLOCK) for home in (Tier.GPU, Tier.DISK))
    return {
        "layer": one.mean_s(one.is_layer),
        "layer_many": many.mean_s(many.is_layer),
        "layer_mixed": mixed.mean_s(mixed.is_layer),
        "embed": one.mean_s(one.is_embed),
        "embed_many": many.mean_s(many.is_embed),
        "other": one.mean_s(one.is_other),
        "turn": one.turn_s(),
        "turn_beside": one.dispatching,
        "hop": paging.hop_s(),
        "hop_beside": paging.dispatching,
        "commit": one.commit_s(),
        "commit_many": many.commit_s(),
        "dispatch": one.dispatch_s,
        "calls": busy.mean_s(busy.is_layer) / still.mean_s(still.is_layer),
        "beside": busy.beside_layers(),
        "busy_dispatching": busy.dispatching,
        "move": moving.mean_s(_is_move),
        "move_many": moving_many.mean_s(_is_move),
        "disk_cache": paging.mean_s(_is_write),
        "disk_cache_many": paging_many.mean_s(_is_write),
    }


def overheads(tries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds for all of `flexpipe.policy.profile.OVERHEADS` that ops of the engine tell: the mean
    of some tries, since jobs meet what holds a try up as well."""
    mean = {name: statistics.fmean(one[name] for one in tries) for name in tries[0]}
    commit_s, row_s = _split(mean["commit"], mean["commit_many"])
    embed_s, embed_row_s = _split(mean["embed"], mean["embed_many"])
    move_s, copy_s = _split(mean["move"], mean["move_many"])
    disk_cache_s, disk_cache_row_s = _split(mean["disk_cache"], mean["disk_cache_many"])
    mixed_s = max(0.0, mean["layer_mixed"] - mean["layer_many"])
    longer = calls_beside_calls(tries) - 1  # the dispatcher was at work beside
    turn_s, hop_s = (
        max(0.0, mean[name]) / (1 + longer * mean[f"{name}_beside"]) for name in ("turn", "hop")
    )
    return {
        "layer": mean["layer"],
        "group": mixed_s / (MANY_ROWS - 1),
        "embed": embed_s,
        "embed_row": embed_row_s,
        "other": mean["other"],
        "move": move_s + copy_s,
        "copy": copy_s,
        "disk_cache": disk_cache_s,
        "disk_cache_row": disk_cache_row_s,
        "dispatch": mean["dispatch"],
        "turn": turn_s,
        "hop": hop_s,
        "commit": max(0.0, commit_s - mean["hop"] - embed_s),
        "commit_row": max(0.0, row_s - embed_row_s),
    }


def calls_beside_calls(tries: Sequence[Mapping[str, float]]) -> float:
    """How much longer a lane's calls take while another one makes calls all the time.

    Computing a layer is nothing but calls here, and so is what lanes do beside it, and what the
    dispatcher does for every op, so much of the time."""
    beside = [one["beside"] + one["busy_dispatching"] for one in tries]
    factors = [
        1 + (one["calls"] - 1) / at_once
        for one, at_once in zip(tries, beside, strict=True)
        if at_once
    ]
    return max(1.0, statistics.fmean(factors or [1.0]))


def _split(one_s: float, many_s: float) -> tuple[float, float]:
    """What an op costs without rows, and per row."""
    per_row_s = max(0.0, many_s - one_s) / (MANY_ROWS - 1)
    return max(0.0, one_s - per_row_s), per_row_s


def _policy(home: Tier, beside: Tier, rows: int, block: int) -> Policy:
    """The KV cache at `home`, and weights as far away, but not on disk, where a read of theirs
    would take long; the hidden beside the device unless all is on disk."""
    kv_cache, near = all_on(home), all_on(beside)
    return Policy(
        weights=all_on(Tier.CPU) if home == Tier.DISK else kv_cache,
        kv_cache=kv_cache,
        hidden=kv_cache if home == Tier.DISK else near,
        micro_batch_size=rows,
        num_micro_batches=block,
    )


def _is_move(span: Span) -> bool:
    return span.op.kind in _MOVES


def _is_write(span: Span) -> bool:
    """Of a KV cache to the disk: mostly tails alone, for few tokens fill a page."""
    return span.op.kind == Kind.WRITE_CACHE


class _Rows:
    """A block of rows that decode for some steps: the least that a job must do.

    Where other work holds them up they are fewer. With `mixed` every other row takes two tokens a
    step, so that no two neighbours attend together.
    """

    def __init__(self, num_rows: int, block: int, num_steps: int, *, mixed: bool) -> None:
        self._mixed = mixed
        self._next: dict[int, tuple[Row, ...]] = {
            mb: tuple(
                Row(mb * num_rows + place, place, 0, (3, 4), True) for place in range(num_rows)
            )
            for mb in range(block)
        }
        self._block = block
        self._num_steps = num_steps
        self._end = time.perf_counter() + _MOST_S

    def steps(self, index: int) -> Iterator[MicroBatch | None] | None:
        late = index >= _LEAST_STEPS and time.perf_counter() > self._end
        return None if index == self._num_steps or late else self._step()

    def _step(self) -> Iterator[MicroBatch | None]:
        for mb in range(self._block):
            while mb not in self._next:
                yield None
            yield MicroBatch(mb, self._next.pop(mb))

    def commit(self, batch: MicroBatch, sampled: Sequence[SampledToken]) -> None:
        self._next[batch.index] = tuple(
            Row(row.request, row.place, row.num_context + row.num_new, self._new(row, one), True)
            for row, one in zip(batch.rows, sampled, strict=True)
        )

    def _new(self, row: Row, sampled: SampledToken) -> tuple[int, ...]:
        return (sampled.token,) * (2 if self._mixed and row.place % 2 else 1)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's plan, the times of its ops, by op, and what the dispatcher computed for each."""

    plan: Plan
    spans: Mapping[int, Span]
    dispatch_s: float

    @classmethod
    def make(
        cls, device_name: str, directory: Path, policy: Policy, num_steps: int, *, mixed: bool
    ) -> _Run:
        device = open_device(device_name, _FAST if device_name == "emulated" else None)
        config = read_config(_MODEL)
        num_rows, block = policy.micro_batch_size, policy.num_micro_batches
        plan = Planner(
            config,
            [Need(2, 2 * num_steps)] * (num_rows * block),
            dummy_tensors(config, cache_dir=directory),
            _ROOMY,
            device_tier=device.tier,
            compute_dtype="float32",
        )(policy)
        rows = _Rows(num_rows, block, num_steps, mixed=mixed)
        recorder = Recorder(keep_spans=True)
        with reserved_files(plan, directory, device) as files:
            stage = Stage(plan, device, files=files, commit=rows.commit)
            try:
                stage.load(lambda num_bytes: None)
                before_s = time.thread_time()
                execute(plan, device, stage, rows.steps, recorder)
                dispatch_s = time.thread_time() - before_s
            finally:
                stage.close()
        spans = {span.op.id: span for span in recorder.spans}
        return cls(plan, spans, dispatch_s / len(spans))

    def mean_s(self, wanted: Callable[[Span], bool]) -> float:
        """Of an op's time, prefill left out; also of those that something held up."""
        return statistics.fmean(
            span.end_s - span.start_s
            for span in self.spans.values()
            if span.op.step and wanted(span)
        )

    @property
    def dispatching(self) -> float:
        """Share of the time in which the dispatcher computed, prefill left out."""
        spans = [span for span in self.spans.values() if span.op.step]
        seconds = max(s.end_s for s in spans) - min(s.start_s for s in spans)
        return len(spans) * self.dispatch_s / seconds

    def is_layer(self, span: Span) -> bool:
        decoder = self.plan.layers[span.op.layer].kind == LayerKind.DECODER
        return span.op.kind == Kind.COMPUTE and decoder

    def is_embed(self, span: Span) -> bool:
        embeds = self.plan.layers[span.op.layer].kind == LayerKind.EMBED
        return span.op.kind == Kind.COMPUTE and embeds

    def is_other(self, span: Span) -> bool:
        computes = span.op.kind == Kind.COMPUTE
        return span.op.kind in _OTHER or (
            computes and not self.is_layer(span) and not self.is_embed(span)
        )

    def beside_layers(self) -> float:
        """Lanes at work beside a layer's computing, on the mean."""
        layers = sorted((s.start_s, s.end_s) for s in self.spans.values() if self.is_layer(s))
        others = [s for s in self.spans.values() if s.op.lane not in COMPUTING]
        starts = np.array([start for start, _ in layers])
        ends = np.array([end for _, end in layers])
        both_s = sum(
            float((np.minimum(ends, one.end_s) - np.maximum(starts, one.start_s)).clip(0).sum())
            for one in others
        )
        return both_s / float((ends - starts).sum())

    def turn_s(self) -> float:
        """From an op's end to the start of the next one on its lane, which was ready by then."""
        return statistics.fmean(gap_s for is_turn, gap_s in self._gaps() if is_turn)

    def hop_s(self) -> float:
        """From an op's end to the start of one that waited for it, and for nothing else, on
        another lane."""
        return statistics.fmean(gap_s for is_turn, gap_s in self._gaps() if not is_turn)

    def _gaps(self) -> Iterator[tuple[bool, float]]:
        """Whether it was a turn or a hop, and its seconds; what waits for a step is neither."""
        free_at: dict[object, float] = {}
        for span in sorted(self.spans.values(), key=lambda span: span.start_s):
            before = [self.spans[wait.op] for wait in span.op.waits_for if wait.op in self.spans]
            last = max(before, key=lambda one: one.end_s, default=None)
            idle_from = free_at.get(span.op.lane, 0.0)
            free_at[span.op.lane] = span.end_s
            if last is None or last.op.kind == Kind.COMMIT:
                continue
            ready_s = max(last.end_s, idle_from)
            yield ready_s == idle_from, span.start_s - ready_s

    def commit_s(self) -> float:
        """From the start of COMMIT to that of the next step's first layer."""
        first: dict[int, float] = {}
        for span in filter(self.is_layer, self.spans.values()):
            step = span.op.step
            first[step] = min(first.get(step, span.start_s), span.start_s)
        return statistics.median(
            first[span.op.step + 1] - span.start_s
            for span in self.spans.values()
            if span.op.kind == Kind.COMMIT and span.op.step + 1 in first
        )
