"""What the ranks of a job tell each other: before anything is loaded, and when all is done.

Every rank says what it may spend and what its machine can do. Rank 0, which alone reads the input,
plans for all and gives orders; from these each rank makes its own plan, the one rank 0 made for it.
At the end rank 0 is told what each was like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flexpipe.closing import Closing
from flexpipe.errors import InputError
from flexpipe.job.compute import Events, Work
from flexpipe.job.measure import Ran, layers_of, stage_use
from flexpipe.job.prepare import Model, site_here
from flexpipe.job.report import StageUse
from flexpipe.job.spec import JobSpec
from flexpipe.memory.disk import Stopped
from flexpipe.memory.offload import OffloadDirectory
from flexpipe.plan.block import Need
from flexpipe.plan.pipeline import Pipeline
from flexpipe.plan.plan import Budgets, Plan
from flexpipe.plan.policy import Policy, knob
from flexpipe.plan.tier import Tier
from flexpipe.policy.curve import Curve
from flexpipe.policy.profile import parse_profile, render_profile
from flexpipe.policy.shares import Machine
from flexpipe.policy.site import Site
from flexpipe.profiling.ring import message_seconds, slowest_link
from flexpipe.runtime.control import Follower, Publisher
from flexpipe.runtime.device import Device
from flexpipe.runtime.dispatcher import Dispatcher
from flexpipe.runtime.gang import Gang
from flexpipe.runtime.ranks import Ranks
from flexpipe.runtime.transport import GroupTransport
from flexpipe.runtime.usable import Sharers
from flexpipe.schedule.trace import stage_events, write_events


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What rank 0 has decided: the cuts, each stage's policy, what requests need, the dtype."""

    pipeline: Pipeline
    policies: Sequence[Policy]
    needs: Sequence[Need]
    compute_dtype: str

    @classmethod
    def of_plans(cls, plans: Sequence[Plan], needs: Sequence[Need]) -> Orders:
        return cls(
            pipeline=plans[0].pipeline,
            policies=[plan.policy for plan in plans],
            needs=needs,
            compute_dtype=plans[0].compute_dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "pipeline": asdict(self.pipeline),
            "policies": [policy.to_dict() for policy in self.policies],
            "needs": [[need.prompt, need.output] for need in self.needs],
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Orders:
        pipeline = values["pipeline"]
        return cls(
            pipeline=Pipeline(**{**pipeline, "layers": tuple(pipeline["layers"])}),
            policies=[
                Policy(**{name: knob(name, value) for name, value in policy.items()})
                for policy in values["policies"]
            ],
            needs=[Need(*need) for need in values["needs"]],
            compute_dtype=values["compute_dtype"],
        )


class Crew(Closing):
    """The ranks of a job, seen from one of them, and the messages between them."""

    def __init__(self, gang: Gang, spec: JobSpec, model: Model, offload: OffloadDirectory) -> None:
        """Say what this rank brings, hear what the others do, and reach the neighbours."""
        self.gang = gang
        gang.watch.on_failure(model.device.stop.set)
        self._transport = GroupTransport.open(gang, model.device.torch_device)
        here, ranks = gang.here.machine, gang.ranks
        on_host = sum(member.machine == here for member in gang.members)
        sharers = Sharers(on_host, self._transport.num_sharing)
        self.here = site_here(spec, model, offload, stage=ranks.stage, sharers=sharers)
        brought = gang.board.exchange("site", _brought(self.here))
        _check_alike(ranks, [one["device_tier"] for one in brought])
        comm = self._message_rates(model.device)
        self.sites = [
            _site(brought[first : first + ranks.num_shards], spec, stage, comm)
            for stage, first in enumerate(range(0, ranks.size, ranks.num_shards))
        ]

    def close(self) -> None:
        """Part from the other ranks; all must be past their last message."""
        self._transport.close()

    def introduce(self, plan: Plan, device: Device) -> None:
        """Tell who this is."""
        self.gang.introduce(device.name, layers_of(plan))

    def give(self, orders: Orders | None) -> None:
        """Rank 0's decision; None where there is nothing to do."""
        self.gang.board.share("orders", None if orders is None else orders.to_dict())

    def take(self) -> Orders | None:
        """What rank 0 decided."""
        values = self.gang.board.share("orders")
        return None if values is None else Orders.of(values)

    @contextmanager
    def leading(self, work: Work, events: Events) -> Iterator[tuple[Work, Events]]:
        """Rank 0's work, whose steps the others are told of."""
        ranks = self.gang.ranks
        embedding = range(1, ranks.num_shards)
        publisher = Publisher(self.gang.connect(), range(1, ranks.size), embedding)
        steps = publisher.wrap(work.steps)
        yield replace(work, steps=steps, transport=self._transport), self._events(events)
        self.gang.board.meet("last message")

    @contextmanager
    def following(self, plan: Plan, device: Device) -> Iterator[tuple[Work, Events]]:
        """Another rank's work, whose steps are told by rank 0."""
        with Follower(self.gang.connect(), self.gang.ranks.rank) as follower:
            steps, transport = follower.steps, self._transport
            work = Work(plan=plan, device=device, steps=steps, transport=transport)

            def started(dispatcher: Dispatcher) -> None:
                follower.wake = dispatcher.wake

            yield work, self._events(Events(started=started))
        self.gang.board.meet("last message")

    def stages(self, ran: Ran) -> list[StageUse]:
        """For rank 0 every rank's figures, by rank; bubbles are those of the job's window."""
        mine = stage_use(ran, self.gang.ranks.name(), self.gang.here.host)
        told = [StageUse.of(one) for one in self.gang.board.gather("figures", asdict(mine))]
        if not told:
            return []
        first_s = min(use.window_s[0] for use in told)
        last_s = max(use.window_s[1] for use in told)
        return [use.within(last_s - first_s) for use in told]

    def trace(self, ran: Ran, path: Path | None) -> None:
        """Draw all ranks into one file, where one is asked for."""
        if path is None:
            return
        ranks = self.gang.ranks
        mine = stage_events(ran.recorder.spans, ran.plan, ranks.rank, ranks.name())
        told = self.gang.board.gather("trace", mine)
        if told:
            write_events(path, [event for events in told for event in events])

    def _message_rates(self, device: Device) -> Curve:
        """Of what the ranks send each other, where it is slowest."""
        took = message_seconds(self._transport, device.torch_device, self.gang.ranks)
        told = self.gang.board.exchange("messages", [*took.values()])
        return slowest_link([dict(zip(took, seconds, strict=True)) for seconds in told])

    def _events(self, events: Events) -> Events:
        """The same, for a stage that waits for the others and ends when one of them fails."""

        def started(dispatcher: Dispatcher) -> None:
            events.started(dispatcher)
            stopped = Stopped("another rank failed")
            self.gang.watch.on_failure(lambda: dispatcher.abort(stopped))

        return replace(
            events,
            loaded=lambda: self.gang.board.meet("loaded"),
            started=started,
            failed=self.gang.watch.tell,
        )


def _check_alike(ranks: Ranks, tiers: Sequence[str]) -> None:
    """Refuse a job that some ranks would compute on an accelerator and others on a CPU."""
    for rank, tier in enumerate(tiers):
        if tier != tiers[0]:
            raise InputError(
                f"{ranks.name(0)} computes beside the {tiers[0]} tier, {ranks.name(rank)} beside "
                f"the {tier} tier; name a --device that all ranks have"
            )


def _brought(site: Site) -> dict[str, Any]:
    """What the others are told of a rank's site."""
    profile = None if site.machine is None else render_profile(site.machine.profile)
    return {
        "budgets": asdict(site.budgets),
        "device_tier": site.device_tier.value,
        "profile": profile,
    }


def _site(brought: Sequence[Mapping[str, Any]], spec: JobSpec, stage: int, comm: Curve) -> Site:
    """A stage's: its ranks compute alike, and each may spend what the poorest of them may."""
    first, budgets = brought[0], [one["budgets"] for one in brought]
    least = {name: min(one[name] for one in budgets) for name in ("gpu", "cpu", "disk")}
    tier, machine = Tier(first["device_tier"]), None
    if first["profile"] is not None:
        profile = parse_profile(yaml.safe_load(first["profile"]))
        profile = replace(profile, links={**profile.links, "comm": comm})
        machine = Machine(profile=profile, device_tier=tier, emulation=spec.emulation)
    return Site(
        budgets=Budgets(**least, overhead=max(one["overhead"] for one in budgets)),
        device_tier=tier,
        machine=machine,
        given=spec.given_at(stage),
    )
