"""What a run did, as data and as a table.

Every figure was read from a clock, a counter or the kernel, except those called planned or asked.
Times of links and lanes are the sum over their moves or ops, so lanes that overlap add up to more
than the wall time; a busy share is that sum over the time the engine ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flexpipe.job.predicted import Predicted, stage_bubbles
from flexpipe.job.table import plain_table
from flexpipe.units import format_bytes, format_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkUse:
    """What went over one link; the rate is over the time it was busy."""

    name: str
    bytes: int
    busy_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneUse:
    """How many ops one lane ran and which share of the run it was busy."""

    name: str
    num_ops: int
    busy_s: float
    busy_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TierUse:
    """Peak bytes of one tier: the budget, what the plan said, what it came to."""

    tier: str
    planned_bytes: int
    measured_bytes: int
    asked_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareUse:
    """How much of one kind of tensor was asked for on a tier, and what whole tensors made of it."""

    kind: str
    tier: str
    asked: float
    achieved: float
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StageUse:
    """What one rank of a pipeline did, in a window from the job's first to its last op on any rank.

    `bubble` is the share of that window in which it computed nothing; `step_s` are what the 50th,
    90th and 99th of 100 steps computed, the slowest last, so that a straggler shows.
    """

    stage: int
    shard: int
    name: str
    host: str
    device: str
    layers: str
    window_s: tuple[float, float]
    compute_s: float
    bubble: float = 0.0
    num_steps: int = 0
    step_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cpu_share: float = 0.0
    links: Sequence[LinkUse] = ()
    tiers: Sequence[TierUse] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StageUse:
        """From what another rank made with `asdict`."""
        links = [LinkUse(**link) for link in values["links"]]
        tiers = [TierUse(**tier) for tier in values["tiers"]]
        window_s, step_s = tuple(values["window_s"]), tuple(values["step_s"])
        return cls(
            **{**values, "window_s": window_s, "step_s": step_s, "links": links, "tiers": tiers}
        )

    def within(self, window_s: float) -> StageUse:
        """With the bubble that it has in the job's window."""
        return replace(self, bubble=1 - self.compute_s / window_s if window_s else 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One finished job. Prefill and decode times are apart and lie within `total_s`.

    The tail is the time after the last request took its place; `tail_bound_s` is what its steps
    would take if each were as short as the shortest: a pass over the weights. `useful_rows` is the
    share of places that worked over all steps, `useful_tokens` the share of computed tokens that no
    earlier run had computed. `num_earlier` are the requests that an earlier run of the job did.
    `latency_s` is the mean time of a request from the step that takes it to its last token.
    """

    model: str
    device: str
    compute_dtype: str
    strategy: str
    num_requests: int
    num_finished: int
    num_failed: int
    num_earlier: int = 0
    load_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    prompt_tokens: int
    generated_tokens: int
    decode_step_tokens: int
    latency_s: float = 0.0
    tail_s: float = 0.0
    tail_steps: int = 0
    tail_bound_s: float = 0.0
    useful_rows: float = 1.0
    useful_tokens: float = 1.0
    bottleneck: str = ""
    links: Sequence[LinkUse] = ()
    lanes: Sequence[LaneUse] = ()
    tiers: Sequence[TierUse] = ()
    shares: Sequence[ShareUse] = ()
    stages: Sequence[StageUse] = ()  # of a pipeline
    policy: Mapping[str, Any] = field(default_factory=dict)
    prediction: Predicted | None = None
    notes: Sequence[str] = ()

    @property
    def figures(self) -> dict[str, float]:
        """What a prediction tells too, by the names it has there."""
        return {
            "total_s": self.total_s,
            "load_s": self.load_s,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "latency_s": self.latency_s,
            **{f"{use.name}_bytes": use.bytes for use in self.links},
            **{f"peak_{use.tier}_bytes": use.measured_bytes for use in self.tiers},
            **stage_bubbles([use.bubble for use in self.stages if not use.shard]),
        }

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the time spent on prefill."""
        return _rate(self.prompt_tokens, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens over the time of the steps that only decoded."""
        return _rate(self.decode_step_tokens, self.decode_s)

    @property
    def generated_tokens_per_s(self) -> float:
        """All generated tokens over the time of the whole generation, prefill included."""
        return _rate(self.generated_tokens, self.prefill_s + self.decode_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the same names, throughputs included."""
        values = asdict(self)
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "generated_tokens_per_s"):
            values[name] = getattr(self, name)
        return values

    def render(self) -> str:
        """The same for people: a line on top, then a table each for times, tiers, links, lanes."""
        parts = [
            f"{self.model} on {self.device} in {self.compute_dtype}, overlap {self.strategy}: "
            f"{self.num_finished} of {self.num_requests} requests finished"
            + (f", {self.num_failed} failed" if self.num_failed else "")
            + (f", {self.num_earlier} done by an earlier run" if self.num_earlier else ""),
            plain_table(("time", "seconds", "tokens", "tokens/s"), self._times()),
            plain_table(
                ("peak memory", "asked", "planned", "measured"), map(_tier_row, self.tiers)
            ),
            plain_table(
                ("placement", "tier", "asked", "achieved", "bytes"), map(_share_row, self.shares)
            ),
            plain_table(("link", "moved", "busy s", "rate"), map(_link_row, self.links)),
            plain_table(("lane", "ops", "busy s", "busy"), map(_lane_row, self.lanes)),
            plain_table(_STAGE_HEAD, map(_stage_row, self.stages)),
            self._prediction(),
            f"{self.bottleneck}; {self.useful_rows:.0%} of the places worked, "
            f"{self.useful_tokens:.0%} of the computed tokens were new"
            if self.bottleneck
            else "",
            "\n".join(f"note: {note}" for note in self.notes),
        ]
        return "\n\n".join(part for part in parts if part)

    def _times(self) -> list[tuple[str, ...]]:
        decoded = self.decode_step_tokens
        return [
            ("load", f"{self.load_s:.2f}", "", ""),
            ("prefill", f"{self.prefill_s:.2f}", *_tokens(self.prompt_tokens, self.prefill_s)),
            ("decode", f"{self.decode_s:.2f}", *_tokens(decoded, self.decode_s)),
            *self._tail(),
            ("total", f"{self.total_s:.2f}", *_tokens(self.generated_tokens, self.total_s)),
            ("latency of a request", f"{self.latency_s:.2f}", "", ""),
        ]

    def _prediction(self) -> str:
        """Its table under what it was made with."""
        made = self.prediction
        if made is None:
            return ""
        head = ("figure", "predicted", "measured", "error")
        return f"{made.told()}:\n\n{plain_table(head, (figure.row() for figure in made.figures))}"

    def _tail(self) -> list[tuple[str, ...]]:
        if not self.tail_steps:
            return []
        return [
            (f"tail of {self.tail_steps} steps", f"{self.tail_s:.2f}", "", ""),
            ("  its bound", f"{self.tail_bound_s:.2f}", "", ""),
        ]


_STAGE_HEAD = ("stage", "host", "device", "layers", "computed s", "bubble", "cpu", "steps",
               "step p50 ms", "p90", "p99")  # fmt: skip


def _stage_row(use: StageUse) -> tuple[str, ...]:
    steps = (f"{seconds * 1e3:.1f}" for seconds in use.step_s)
    shares = f"{use.bubble:.1%}", f"{use.cpu_share:.0%}"
    where = use.name, use.host, use.device, use.layers
    return (*where, f"{use.compute_s:.2f}", *shares, str(use.num_steps), *steps)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _tokens(count: int, seconds: float) -> tuple[str, str]:
    return f"{count}", f"{_rate(count, seconds):.1f}"


def _tier_row(use: TierUse) -> tuple[str, ...]:
    asked = "what is free" if use.asked_bytes is None else format_bytes(use.asked_bytes)
    return use.tier, asked, format_bytes(use.planned_bytes), format_bytes(use.measured_bytes)


def _share_row(use: ShareUse) -> tuple[str, ...]:
    shares = (f"{use.asked:.1%}", f"{use.achieved:.1%}")
    return use.kind, use.tier, *shares, format_bytes(use.bytes)


def _link_row(use: LinkUse) -> tuple[str, ...]:
    rate = format_rate(use.bytes_per_s)
    return use.name, format_bytes(use.bytes), f"{use.busy_s:.2f}", rate


def _lane_row(use: LaneUse) -> tuple[str, ...]:
    return use.name, str(use.num_ops), f"{use.busy_s:.2f}", f"{use.busy_share:.0%}"
