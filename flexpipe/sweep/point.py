"""A point of a sweep: what it sets, and all that this makes of a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from flexpipe.errors import PolicyError
from flexpipe.job.bench import Workload, block_rows
from flexpipe.job.spec import JobSpec
from flexpipe.plan.policy import Policy
from flexpipe.sweep.setting import WORKLOAD_NAMES, Settings, knobs_of, plain, shown


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run to predict or to measure, or the `refusal` that says which values contradict.

    `asked` is all that its figures depend on, as plain values, but for the machine itself and the
    version of flexpipe; `key` is a digest of it.
    """

    settings: Settings
    asked: Mapping[str, Any]
    knobs: Mapping[str, Any]
    workload: Workload | None
    refusal: str | None = None

    @cached_property
    def key(self) -> str:
        text = json.dumps(self.asked, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """What it sets, as a grid writes it."""
        return " ".join(f"{name}={shown(value)}" for name, value in self.settings.items()) or "{}"


def make_points(
    grid: Iterable[Settings], spec: JobSpec, workload: Mapping[str, int]
) -> list[Point]:
    """The grid's points, each once.

    `spec` is what they share, and its paths mean nothing; `workload` the fields of `Workload` that
    are given: without num_prompts a point runs one block.
    """
    points = [_point(settings, spec, workload) for settings in grid]
    return list({point.key: point for point in points}.values())


def _point(settings: Settings, spec: JobSpec, workload: Mapping[str, int]) -> Point:
    load = {**workload, **{name: settings[name] for name in WORKLOAD_NAMES if name in settings}}
    try:
        knobs = knobs_of(settings, spec.given)
        if spec.device != "auto":
            Policy(**knobs).check_device(spec.device)
    except PolicyError as error:
        return Point(
            settings=settings,
            asked=_asked(spec, {**spec.given, **settings}, load),
            knobs={},
            workload=None,
            refusal=str(error),
        )
    load = {"num_prompts": block_rows(knobs), **load}
    return Point(
        settings=settings,
        asked=_asked(spec, knobs, load),
        knobs=knobs,
        workload=Workload(**load),
    )


def _asked(spec: JobSpec, knobs: Mapping[str, Any], load: Mapping[str, int]) -> dict[str, Any]:
    return {
        "model": os.path.abspath(spec.model) if os.path.exists(spec.model) else spec.model,
        "revision": spec.revision,
        "load_format": spec.load_format,
        "seed": spec.seed,
        "device": spec.device,
        "emulation": spec.emulation and asdict(spec.emulation),
        "offload_dir": spec.offload_dir and os.path.abspath(spec.offload_dir),
        "workload": dict(load),
        "knobs": {name: plain(value) for name, value in knobs.items()},
    }
