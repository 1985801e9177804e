"""What one run was asked to do, before anything was looked at but the paths.

The command line and the Python interface both end here. A `JobSpec` is legal in itself; whether the
model exists, the device is there and the plan fits is the job's question. Texts name the options,
since those are what a user can change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from flexpipe.errors import InputError
from flexpipe.job.params import SamplingParams
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy_file import MadeFor
from flexpipe.runtime.network import Network

LoadFormat = Literal["auto", "dummy"]
LOAD_FORMATS: tuple[LoadFormat, ...] = get_args(LoadFormat)
DEFAULT_OFFLOAD_DIR = Path("~/.cache/flexpipe")
TRACE_SUFFIXES = (".json", ".png", ".svg")
_DEVICE = re.compile(r"auto|cpu|emulated|(cuda|xpu|mps|mtia|npu|hpu)(:[0-9]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """One batch job: model, prompts in, results out, and how to use the machine.

    `given` holds the fields of `Policy` that the user chose; the search finds the rest. Where they
    were `made_for` a model, they go with no other. `stage_given` has them for each stage of the
    `arrangement`, as far as these differ. `device` "auto" takes the accelerator if there
    is one, else the CPU. `emulation` goes with the device "emulated" and is never None there.
    """

    model: str
    input_path: Path
    output_path: Path
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    fail_fast: bool = False
    device: str = "auto"
    emulation: Emulation | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    made_for: MadeFor | None = None
    load_format: LoadFormat = "auto"
    seed: int = 0
    revision: str | None = None
    offload_dir: Path | None = None
    trace_path: Path | None = None
    overwrite: bool = False
    progress: bool = True
    stage_given: Sequence[Mapping[str, Any]] = ()
    arrangement: Arrangement = field(default_factory=Arrangement)
    network: Network = field(default_factory=Network)

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("--model is empty; give a checkpoint's directory or a hub name")
        _ = self.params  # checks itself
        if self.load_format not in LOAD_FORMATS:
            raise InputError(
                f"--load-format is one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}"
            )
        if all(knobs == self.given for knobs in self.stage_given):
            object.__setattr__(self, "stage_given", ())
        object.__setattr__(self, "emulation", checked_emulation(self.device, self.emulation))
        self._check_paths()

    @property
    def params(self) -> SamplingParams:
        """What holds where a line of the input says nothing."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_tokens=self.max_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )

    def given_at(self, stage: int) -> Mapping[str, Any]:
        """The knobs that the user chose for one stage."""
        return self.stage_given[stage] if self.stage_given else self.given

    def _check_paths(self) -> None:
        for option, path in (
            ("--input-file", self.input_path),
            ("--output-file", self.output_path),
        ):
            if str(path) == "-" and option == "--output-file":
                raise InputError("--output-file - is not supported; name a file")
        if _same_file(self.input_path, self.output_path):
            raise InputError(
                f"--output-file {self.output_path} is the input file; name another, "
                "or the prompts would be overwritten"
            )
        if self.trace_path is not None and self.trace_path.suffix not in TRACE_SUFFIXES:
            raise InputError(f"--trace {self.trace_path} must end in {', '.join(TRACE_SUFFIXES)}")
        shared = self.arrangement.num_ranks > 1
        if shared and self.trace_path is not None and self.trace_path.suffix != ".json":
            raise InputError(
                f"--trace {self.trace_path} must end in .json, which holds all ranks of a job"
            )


def checked_emulation(device: str, emulation: Emulation | None) -> Emulation | None:
    """What `device` pretends to be: None unless it is "emulated", and never None there."""
    if not _DEVICE.fullmatch(device):
        raise InputError(
            f"--device {device!r} is unknown; use auto, cpu, emulated, or a torch accelerator such "
            "as cuda or cuda:1"
        )
    if device == "emulated":
        return emulation or Emulation()
    if emulation is not None:
        raise InputError(
            f"--emulate describes an emulated accelerator, but --device is {device}; use --device "
            "emulated or drop one of the two"
        )
    return None


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist yet
        return one.absolute() == other.absolute()
