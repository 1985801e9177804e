"""Options that several commands share, and how the knobs come together.

Each knob of `Policy` is an option under the name that `OPTION_NAMES` gives it; a flag overrides
that one knob of the policy file or preset. Whatever is not given stays out of `given`, so that the
rule can fill it in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from flexpipe.errors import FlexpipeError, InputError
from flexpipe.job.bench import Workload
from flexpipe.job.spec import LOAD_FORMATS, TRACE_SUFFIXES
from flexpipe.plan.arrangement import PARTITIONS, Arrangement
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import (
    COMPRESSIONS,
    COMPUTE_DTYPES,
    OPTION_NAMES,
    RESIDENT_DTYPES,
    STRATEGIES,
    Policy,
    percent_shares,
)
from flexpipe.plan.policy_file import PolicyFile
from flexpipe.preset import policy_file
from flexpipe.runtime.network import Network
from flexpipe.units import parse_bytes

Command = Callable[..., None]


def _read_by(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of ours as the type of an option, whose name click puts before our text."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except FlexpipeError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def _knob(field: str, type: Any, help: str, **settings: Any) -> Callable[[Command], Command]:
    return click.option(OPTION_NAMES[field], field, type=type, help=help, **settings)


def _switch(field: str, help: str) -> Callable[[Command], Command]:
    """A yes-or-no knob: the bare option says yes, `--pin-weight false` says no."""
    default = "yes" if getattr(Policy(), field) else "no"
    help = f"{help} [true|false, default {default}]"
    return _knob(field, bool, help, is_flag=False, flag_value=True, default=None, metavar="[BOOL]")


def _bits(field: str, help: str) -> Callable[[Command], Command]:
    """A compression: the bare option says 4 bits."""
    help = f"{help}; lossy. [4|8|none, default none; 4 if no number follows]"
    choice = click.Choice(COMPRESSIONS)
    return _knob(field, choice, help, is_flag=False, flag_value="4", default=None, metavar="[BITS]")


def _size(field: str, help: str) -> Callable[[Command], Command]:
    return _knob(field, _read_by(parse_bytes), help, metavar="SIZE")


def bytes_option(name: str, help: str) -> Callable[[Command], Command]:
    """An option that takes a size like 22GiB."""
    return click.option(name, type=_read_by(parse_bytes), help=help, metavar="SIZE")


_COUNT = click.IntRange(min=1)
_POLICY_OPTIONS = (
    click.option(
        "--policy",
        metavar="FILE|PRESET",
        help="Take the knobs from a YAML file or from a preset; the options below override it.",
    ),
    click.option(
        "--percent",
        type=float,
        nargs=6,
        metavar="WG WC KG KC HG HC",
        help="Percent of the weights on gpu and cpu, of the KV cache on gpu and cpu, of hidden on "
        "gpu and cpu; the rest lies on disk.",
    ),
    _knob("micro_batch_size", _COUNT, "Rows of a micro-batch."),
    _knob("num_micro_batches", _COUNT, "Micro-batches that share one load of the weights."),
    _knob("strategy", click.Choice(STRATEGIES), "What may overlap (default event)."),
    _switch("separate_layers", "Run attention and MLP as two layers."),
    _switch("pin_weights", "Keep weights in pinned host memory."),
    _knob("prefetch_depth", _COUNT, "Streamed layers whose weights are loaded ahead."),
    _knob("compute_dtype", click.Choice(COMPUTE_DTYPES), "What the layers compute in."),
    _knob(
        "resident_dtype",
        click.Choice(RESIDENT_DTYPES),
        "What weights beside the compute device are held in (default compute: no conversion; "
        "checkpoint: fewer bytes).",
    ),
    _bits("compress_weight", "Bits of the layers' matrices"),
    _bits("compress_vocabulary", "Bits of the embedding and the head"),
    _bits("compress_cache", "Bits of keys and values"),
    _knob(
        "compress_group",
        _COUNT,
        "Neighbours that share a scale when compressed (default 64; 32 to 256).",
    ),
    _switch("cpu_attention", "Attend to a KV cache on the cpu tier there, when decoding."),
    _knob("max_batch_tokens", _COUNT, "Most new tokens of a micro-batch in one step."),
    _size("gpu_mem", "Budget of accelerator memory, like 22GiB (default: what is free)."),
    _size("cpu_mem", "Budget of host memory."),
    _size("disk_mem", "Budget of the offload directory."),
)


def policy_options(command: Command) -> Command:
    """Add the knobs; the command gets them as `given`, a dict of `Policy`'s fields, and what the
    policy file says it was `made_for`, or None."""

    @functools.wraps(command)
    def with_given(policy: str | None, percent: tuple[float, ...] | None, **others: Any) -> None:
        knobs = {field: others.pop(field) for field in OPTION_NAMES if field in others}
        file = _policy_file(policy)
        if file.stages:
            raise InputError(
                f"--policy {policy} is for a pipeline of {len(file.stages)} stages, which this "
                "command does not take; use another one"
            )
        given = given_knobs(file.knobs, percent, knobs)
        command(given=given, made_for=file.made_for, **others)

    return _decorated(with_given, _POLICY_OPTIONS)


def stage_policy_options(command: Command) -> Command:
    """Add the knobs, and how a model is shared among ranks; beside what `policy_options` gives, the
    command gets the `Arrangement`, as `arrangement`, which may come from the policy file, and the
    knobs given for each stage, as `stage_given`."""

    @functools.wraps(command)
    def with_given(
        policy: str | None,
        percent: tuple[float, ...] | None,
        arrangement: Arrangement,
        **others: Any,
    ) -> None:
        knobs = {field: others.pop(field) for field in OPTION_NAMES if field in others}
        file = _policy_file(policy)
        if file.stages:
            arrangement = arrangement.of_stages(len(file.stages), file.cut)
        own = [stage.knobs for stage in file.stages] or [{}] * arrangement.num_stages
        command(
            given=given_knobs(file.knobs, percent, knobs),
            stage_given=tuple(given_knobs({**file.knobs, **one}, percent, knobs) for one in own),
            arrangement=arrangement,
            made_for=file.made_for,
            **others,
        )

    return pipeline_options(_decorated(with_given, _POLICY_OPTIONS))


def _policy_file(policy: str | None) -> PolicyFile:
    return PolicyFile(knobs={}) if policy is None else PolicyFile.read(policy_file(policy))


def given_knobs(
    policy: Mapping[str, Any], percent: tuple[float, ...] | None, knobs: Mapping[str, Any]
) -> dict[str, Any]:
    """The knobs of the policy file, overridden by those given one by one."""
    given = dict(policy)
    if percent is not None:
        given |= percent_shares(percent)
    return given | {field: value for field, value in knobs.items() if value is not None}


_SECONDS = click.FloatRange(min=0, min_open=True)
_NETWORK_DEFAULTS = {name: item.default for name, item in Network.__dataclass_fields__.items()}
_NETWORK_OPTIONS = (
    click.option(
        "--interface",
        metavar="NAME",
        help="Network interface between hosts, like eth0 (default: the one on the way to rank 0).",
    ),
    click.option(
        "--join-timeout",
        "join_limit_s",
        type=_SECONDS,
        default=_NETWORK_DEFAULTS["join_limit_s"],
        show_default=True,
        help="Seconds to wait for all ranks at the start.",
    ),
    click.option(
        "--heartbeat-timeout",
        "heartbeat_limit_s",
        type=_SECONDS,
        default=_NETWORK_DEFAULTS["heartbeat_limit_s"],
        show_default=True,
        help="Seconds without a sign of life after which a rank counts as frozen.",
    ),
)


def network_options(command: Command) -> Command:
    """Add how ranks find each other: a `Network`, as `network`."""

    @functools.wraps(command)
    def with_network(**options: Any) -> None:
        asked = {item.name: options.pop(item.name) for item in fields(Network)}
        command(network=Network(**asked), **options)

    return _decorated(with_network, _NETWORK_OPTIONS)


_MODEL_OPTIONS = (
    click.option("--model", required=True, help="A checkpoint's directory, or its hub name."),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option(
        "--load-format",
        type=click.Choice(LOAD_FORMATS),
        default="auto",
        help="dummy takes random weights instead of the checkpoint's.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        help="Seed of samples, of synthetic prompts and of dummy weights.",
    ),
)


def model_options(command: Command) -> Command:
    """Add which model to run: model, revision, load_format, seed."""
    return _decorated(command, _MODEL_OPTIONS)


_LOAD_DEFAULTS = {name: item.default for name, item in Workload.__dataclass_fields__.items()}


def _load_count(field: str, help: str, least: int = 1) -> Callable[[Command], Command]:
    return click.option(
        f"--{field.replace('_', '-')}",
        type=click.IntRange(min=least),
        default=_LOAD_DEFAULTS[field],
        show_default=True,
        help=help,
    )


_WORKLOAD_OPTIONS = (
    _load_count("prompt_len", "Tokens of each prompt."),
    _load_count("gen_len", "Tokens to generate for each prompt; end tokens are ignored."),
    click.option(
        "--num-prompts",
        type=_COUNT,
        help="Number of prompts (default: one block, --gpu-batch-size times --num-gpu-batches).",
    ),
    _load_count("warmup", "Runs before the first that counts.", least=0),
    _load_count("repetitions", "Runs that count."),
)


def workload_options(command: Command) -> Command:
    """Add what to measure: the fields of `Workload`, where num_prompts may be None."""
    return _decorated(command, _WORKLOAD_OPTIONS)


_DEVICE_OPTIONS = (
    click.option(
        "--device",
        metavar="auto|cpu|emulated|cuda[:N]",
        help="Where layers are computed (default: an accelerator if there is one, else cpu). "
        "emulated stands in for an accelerator on any machine.",
    ),
    click.option(
        "--emulate",
        "emulation",
        type=_read_by(Emulation.parse),
        metavar="NAME=VALUE,...",
        help="What --device emulated pretends to be, like h2d=2GB/s,d2h=2GB/s,memory=1GiB; also "
        "compute=100GFLOP/s, disk_read=1GB/s, disk_write=1GB/s.",
    ),
    click.option(
        "--offload-dir",
        type=click.Path(path_type=Path),
        help="Directory for what lies on disk; made if it is missing, emptied after the run.",
    ),
)


def device_options(command: Command) -> Command:
    """Add where to run: device, emulation, offload_dir."""

    @functools.wraps(command)
    def with_device(device: str | None, emulation: Emulation | None, **others: Any) -> None:
        implied = "auto" if emulation is None else "emulated"
        command(device=device or implied, emulation=emulation, **others)

    return _decorated(with_device, _DEVICE_OPTIONS)


_JSON_OPTION = click.option(
    "--json", "as_json", is_flag=True, help="End with the report as one JSON line."
)
_REPORT_OPTIONS = (
    click.option(
        "--trace",
        "trace_path",
        type=click.Path(path_type=Path),
        metavar="|".join(f"FILE{suffix}" for suffix in TRACE_SUFFIXES),
        help="Write what ran when: JSON for Perfetto, or a picture.",
    ),
    _JSON_OPTION,
)


def machine_options(command: Command) -> Command:
    """Add where to run and what to show: device, emulation, offload_dir, trace_path, as_json."""
    return device_options(_decorated(command, _REPORT_OPTIONS))


_PIPELINE_OPTIONS = (
    click.option(
        "--pipeline-parallel-size",
        "num_stages",
        type=_COUNT,
        help="Stages that the layers are cut into, each with devices and memories of its own "
        "(default 1).",
    ),
    click.option(
        "--tensor-parallel-size",
        "num_shards",
        type=_COUNT,
        help="Ranks that share the heads and widths of each stage (default 1).",
    ),
    click.option(
        "--num-inner-iterations",
        "num_blocks",
        type=_COUNT,
        help="Blocks in flight in the pipeline (default: one per stage).",
    ),
    click.option(
        "--virtual-stages",
        "num_chunks",
        type=_COUNT,
        help="Ranges of layers that each rank owns, taken in turns (default 1).",
    ),
    click.option(
        "--async-comm/--no-async-comm",
        "async_comm",
        default=None,
        help="Send and receive while layers compute (default: yes).",
    ),
    click.option(
        "--partition",
        type=click.Choice(PARTITIONS),
        help="Cut by what stages are predicted to take, or evenly (default balanced).",
    ),
    click.option(
        "--layers-per-stage",
        "layers",
        type=_read_by(Arrangement.parse_layers),
        metavar="N,N,...",
        help="Cut by hand: the layers of each stage.",
    ),
)


def pipeline_options(command: Command) -> Command:
    """Add how a model is shared among ranks: an `Arrangement`, as `arrangement`."""

    @functools.wraps(command)
    def with_arrangement(**options: Any) -> None:
        asked = {item.name: options.pop(item.name) for item in fields(Arrangement)}
        known = {name: value for name, value in asked.items() if value is not None}
        command(arrangement=Arrangement(**known), **options)

    return _decorated(with_arrangement, _PIPELINE_OPTIONS)


_PATH = click.Path(path_type=Path)
_INQUIRY_OPTIONS = (
    click.option(
        "--model",
        required=True,
        help="A checkpoint's directory, its hub name, or a model's shape such as opt-175b; no "
        "weights are needed.",
    ),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option("--prompt-len", type=_COUNT, help="Tokens of each prompt (default 512)."),
    click.option("--gen-len", type=_COUNT, help="Tokens to generate for each (default 32)."),
    click.option("--num-prompts", type=_COUNT, help="Number of prompts (default: one block)."),
    click.option(
        "-i",
        "--input-file",
        "input_path",
        type=_PATH,
        help="Take the requests of this file instead, with their real lengths.",
    ),
    click.option(
        "--max-tokens",
        type=_COUNT,
        help="Most tokens to generate where a line of the file does not say (default 128).",
    ),
    click.option(
        "--hardware",
        metavar="NAME|FILE",
        help="A machine described on paper, such as t4-gcp (default: this machine).",
    ),
    _JSON_OPTION,
)


def inquiry_options(command: Command) -> Command:
    """Add what a plan that nobody runs is asked about: an `Inquiry`, as `inquiry`; and as_json."""

    @functools.wraps(command)
    def with_inquiry(**options: Any) -> None:
        from flexpipe.job.outlook import Inquiry  # not needed for --help

        asked = {item.name: options.pop(item.name) for item in fields(Inquiry)}
        command(inquiry=Inquiry(**asked), **options)

    return device_options(_decorated(with_inquiry, _INQUIRY_OPTIONS))


def _decorated(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):  # the first one applied is the last one shown
        command = option(command)
    return command
