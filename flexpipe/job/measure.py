"""What a run was like: clocks, counters and peaks put together into its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flexpipe.job.batcher import Batcher
from flexpipe.job.report import LaneUse, LinkUse, Report, ShareUse, StageUse, TierUse
from flexpipe.plan.hardware import peak_rss_bytes
from flexpipe.plan.plan import Plan
from flexpipe.plan.tier import Tier
from flexpipe.runtime.device import Device
from flexpipe.runtime.record import Recorder
from flexpipe.runtime.stage import Stage
from flexpipe.schedule.op import PEER_LANES, Kind, Lane
from flexpipe.schedule.places import StepCount, phases, tail
from flexpipe.units import format_bytes

BOUND_SHARE = 0.5  # of the time; a lane less busy than that bounds nothing
DISK_BOUND_SHARE = 0.9  # of the bytes asked of the disk that the device itself must have read
_LINK_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "h2d": (Kind.LOAD_WEIGHT, Kind.LOAD_EMBED, Kind.LOAD_CACHE, Kind.LOAD_HIDDEN, Kind.MOVE_OUTPUT),
    "d2h": (Kind.STORE_CACHE, Kind.STORE_HIDDEN, Kind.MOVE_QUERY, Kind.FETCH_TOKENS),
    "disk_read": (Kind.READ_WEIGHT, Kind.READ_EMBED, Kind.READ_CACHE, Kind.READ_HIDDEN),
    "disk_write": (Kind.WRITE_CACHE, Kind.WRITE_HIDDEN),
    "comm": (Kind.SEND_HIDDEN, Kind.SEND_TOKENS, Kind.ALL_REDUCE),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Seconds and bytes of the run; `physical_read_bytes` came from the device itself, `cpu_s` is
    what all threads computed while it ran."""

    load_s: float
    began: float
    run_s: float
    cpu_s: float
    physical_read_bytes: int | None
    disk_bytes: int


@dataclass(slots=True)
class Tally:
    """How requests ended and what they came to."""

    num_requests: int = 0
    num_earlier: int = 0  # done by an earlier run of the job
    num_finished: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    # of requests that ended before their limit, by line: the tokens that this run generated
    num_early: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A stage that has run; it is closed, but its figures can be read."""

    stage: Stage
    device: Device
    recorder: Recorder
    measured: Measured

    @property
    def plan(self) -> Plan:
        return self.stage.plan


def report(
    model: str, ran: Ran, batcher: Batcher, tally: Tally, stages: Sequence[StageUse] = ()
) -> Report:
    """The figures of a finished run; of `stages`, where there are several, links and tiers are told
    in sum, each by its first shard, as they are predicted."""
    first = [use for use in stages if not use.shard]
    plan, device, recorder, measured = ran.plan, ran.device, ran.recorder, ran.measured
    took, drain = phases(batcher.counts, measured.began), tail(batcher.counts)
    return Report(
        model=model,
        device=device.name,
        compute_dtype=plan.compute_dtype,
        strategy=plan.policy.strategy,
        num_requests=tally.num_requests,
        num_earlier=tally.num_earlier,
        num_finished=tally.num_finished,
        num_failed=tally.num_failed,
        load_s=measured.load_s,
        prefill_s=took.prefill_s,
        decode_s=took.decode_s,
        total_s=measured.load_s + measured.run_s,
        latency_s=batcher.latency_s,
        tail_s=drain.seconds,
        tail_steps=drain.num_steps,
        tail_bound_s=drain.bound_s,
        useful_rows=_useful_rows(batcher.counts, plan),
        useful_tokens=_useful_tokens(batcher),
        prompt_tokens=sum(count.prompt_tokens for count in batcher.counts),
        generated_tokens=tally.num_tokens,
        decode_step_tokens=took.decoded,
        links=_summed_links(first) or _links(device, recorder),
        lanes=_lanes(recorder, measured.run_s),
        tiers=_summed_tiers(first) or _tiers(ran),
        shares=_shares(plan),
        stages=stages,
        policy=plan.policy.to_dict(),
        notes=_notes(device, ran.stage, measured),
        bottleneck=_busiest_stage(stages) if stages else _bottleneck(device, recorder, measured),
    )


def _useful_rows(counts: Sequence[StepCount], plan: Plan) -> float:
    """Share of the block's places that worked, over all steps."""
    places = sum(mb.num_places for mb in plan.micro_batches)
    steps = [count for count in counts if count.rows]
    return sum(count.rows for count in steps) / (places * len(steps)) if steps else 0.0


def _useful_tokens(batcher: Batcher) -> float:
    """Share of the computed tokens that are not those of an earlier run, prefilled again."""
    computed = sum(count.prompt_tokens + count.decode_tokens for count in batcher.counts)
    return 1 - batcher.repeated_tokens / computed if computed else 1.0


def _busiest_stage(stages: Sequence[StageUse]) -> str:
    """One sentence: the rank that computed most of the time, and how much."""
    use = min(stages, key=lambda use: use.bubble)
    share = 1 - use.bubble
    if share < BOUND_SHARE:
        return f"nothing was busy all the time; most of all compute of {use.name}, {share:.0%}"
    return f"compute of {use.name} is the bottleneck: busy {share:.0%} of the time"


def _bottleneck(device: Device, recorder: Recorder, measured: Measured) -> str:
    """One sentence: the lane that was busiest, and how busy; one that waits for peers does not
    count."""
    busy = {lane: recorder.lane_busy_s(lane) for lane in Lane if lane not in PEER_LANES}
    lane = max(busy, key=lambda lane: busy[lane])
    share = busy[lane] / measured.run_s if measured.run_s else 0.0
    cached = _read_from_cache(device, measured)
    what = "the disk" if lane in (Lane.READ_WEIGHT, Lane.READ_CACHE) else f"lane {lane.value}"
    if lane in (Lane.READ_WEIGHT, Lane.READ_CACHE) and cached is not None:
        what = "reading from a cache (not from the disk)"
    if share < BOUND_SHARE:
        return f"nothing was busy all the time; most of all {what}, {share:.0%}"
    return f"{what} is the bottleneck: busy {share:.0%} of the time"


def _read_from_cache(device: Device, measured: Measured) -> float | None:
    """Share of the bytes asked of the disk that the device read, where that is too little."""
    asked, physical = device.disk_read.num_bytes, measured.physical_read_bytes
    if not asked or physical is None or physical >= DISK_BOUND_SHARE * asked:
        return None
    return physical / asked


def _links(device: Device, recorder: Recorder) -> list[LinkUse]:
    uses = []
    for link in device.links:
        if not link.num_bytes:
            continue
        busy_s = sum(recorder.busy_s.get(kind, 0.0) for kind in _LINK_KINDS[link.name])
        rate = link.num_bytes / busy_s if busy_s else 0.0
        uses.append(LinkUse(name=link.name, bytes=link.num_bytes, busy_s=busy_s, bytes_per_s=rate))
    return uses


def _lanes(recorder: Recorder, run_s: float) -> list[LaneUse]:
    uses = []
    for lane in Lane:
        num_ops, busy_s = recorder.lane_ops(lane), recorder.lane_busy_s(lane)
        if num_ops:
            share = busy_s / run_s if run_s else 0.0
            uses.append(LaneUse(name=lane.value, num_ops=num_ops, busy_s=busy_s, busy_share=share))
    return uses


def stage_use(ran: Ran, name: str, host: str) -> StageUse:
    """The figures of one rank; its bubble is known once all ranks' windows are."""
    steps, measured = ran.recorder.step_s, ran.measured
    return StageUse(
        stage=ran.plan.rank,
        shard=ran.plan.config.shard.index,
        name=name,
        host=host,
        device=ran.device.name,
        layers=layers_of(ran.plan),
        window_s=ran.recorder.window_s,
        compute_s=ran.recorder.lane_busy_s(Lane.COMPUTE),
        num_steps=len(steps),
        step_s=_percentiles(steps),
        cpu_share=measured.cpu_s / measured.run_s if measured.run_s else 0.0,
        links=_links(ran.device, ran.recorder),
        tiers=_tiers(ran),
    )


def layers_of(plan: Plan) -> str:
    """The decoder layers of a stage, as messages name them."""
    chunks = plan.pipeline.chunks(plan.rank)
    return "layers " + ", ".join(f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 90th and 99th."""
    if not seconds:
        return 0.0, 0.0, 0.0
    half, most, nearly_all = np.percentile(seconds, (50, 90, 99)).tolist()
    return half, most, nearly_all


def _summed_links(stages: Sequence[StageUse]) -> list[LinkUse]:
    """What all stages moved over links of one name; the rate is that of one."""
    uses = []
    for name in dict.fromkeys(use.name for stage in stages for use in stage.links):
        alike = [use for stage in stages for use in stage.links if use.name == name]
        num_bytes, busy_s = sum(use.bytes for use in alike), sum(use.busy_s for use in alike)
        rate = num_bytes / busy_s if busy_s else 0.0
        uses.append(LinkUse(name=name, bytes=num_bytes, busy_s=busy_s, bytes_per_s=rate))
    return uses


def _summed_tiers(stages: Sequence[StageUse]) -> list[TierUse]:
    """Peaks of all stages in sum; they need not have come at one moment."""
    uses = []
    for tier in dict.fromkeys(use.tier for stage in stages for use in stage.tiers):
        alike = [use for stage in stages for use in stage.tiers if use.tier == tier]
        asked = [use.asked_bytes for use in alike if use.asked_bytes is not None]
        uses.append(
            TierUse(
                tier=tier,
                planned_bytes=sum(use.planned_bytes for use in alike),
                measured_bytes=sum(use.measured_bytes for use in alike),
                asked_bytes=sum(asked) if asked else None,
            )
        )
    return uses


def _tiers(ran: Ran) -> list[TierUse]:
    """Temporaries of an emulated device cannot be told from what else the process has: it is
    charged for as many as were planned."""
    plan, memory = ran.plan, ran.stage.stores.memory
    on_device, emulated = memory.peak_device_bytes(), memory.emulated_bytes(plan.device_tier)
    if emulated:
        on_device, emulated = (size + plan.transient_bytes for size in (on_device, emulated))
    measured = {
        Tier.GPU: on_device,
        Tier.CPU: peak_rss_bytes() - emulated,
        Tier.DISK: ran.measured.disk_bytes,
    }
    return [
        TierUse(
            tier=tier.value,
            asked_bytes=plan.policy.budget(tier),
            planned_bytes=plan.tier_bytes(tier),
            measured_bytes=measured[tier],
        )
        for tier in Tier
        if plan.tier_bytes(tier)
    ]


def _shares(plan: Plan) -> list[ShareUse]:
    policy = plan.policy
    by_kind: dict[str, dict[Tier, int]] = {
        "weights": dict(plan.placement.achieved_bytes),
        "kv_cache": dict.fromkeys(Tier, 0),
        "hidden": dict.fromkeys(Tier, 0),
    }
    for mb in plan.micro_batches:
        by_kind["hidden"][mb.hidden_home] += plan.hidden_bytes(mb)
        for tier in Tier:
            room = mb.region_tokens * plan.token_bytes * plan.num_decoder_layers
            by_kind["kv_cache"][tier] += len(mb.places(tier)) * room
    uses = []
    for kind, given in by_kind.items():
        shares = getattr(policy, kind)
        for tier in Tier:
            if shares.of(tier) or given[tier]:
                achieved = given[tier] / max(1, sum(given.values()))
                uses.append(
                    ShareUse(
                        kind=kind,
                        tier=tier.value,
                        asked=shares.of(tier),
                        achieved=achieved,
                        bytes=given[tier],
                    )
                )
    return uses


def _notes(device: Device, stage: Stage, measured: Measured) -> list[str]:
    notes = []
    copies = device.synchronous
    if copies.num_copies:
        notes.append(
            f"{copies.num_copies} copies ({format_bytes(copies.num_bytes)}) were synchronous: "
            f"{format_bytes(stage.stores.memory.unpinned_bytes)} of host memory could not be "
            "page-locked"
        )
    read = _read_from_cache(device, measured)
    if read is not None:
        notes.append(
            f"the device read {read:.0%} of the bytes asked of the disk; the rest came from a "
            "cache, so this run says nothing about the disk"
        )
    return notes
