"""The knobs reach the job under the names of `Policy`, the flag before the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from flexpipe.cli.bench import bench
from flexpipe.cli.demo import demo
from flexpipe.cli.run import run
from flexpipe.cli.sweep import sweep
from flexpipe.plan.codec import Codec
from flexpipe.plan.hardware import Emulation
from flexpipe.plan.policy import OPTION_NAMES, Policy, Shares
from flexpipe.preset import policy_file
from flexpipe.units import GIB
from tests.cli.conftest import FakeJob

Given = Callable[..., Mapping[str, Any]]


@pytest.fixture
def given(flexpipe: Callable[..., int], job: FakeJob) -> Given:
    """What `flexpipe run` with these options hands to the job as knobs."""

    def call(*arguments: object) -> Mapping[str, Any]:
        assert flexpipe("run", "--model", "m", "-i", "in", "-o", "out", *arguments) == 0
        return job.spec.given

    return call


@pytest.fixture
def refused(
    flexpipe: Callable[..., int], job: FakeJob, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def call(*arguments: object) -> str:
        assert flexpipe("run", "--model", "m", "-i", "in", "-o", "out", *arguments) == 2
        assert job.specs == []
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize("command", [run, demo, bench, sweep])
def test_every_knob_of_the_table_is_an_option(command: click.Command) -> None:
    spelled = {name for option in command.params for name in option.opts}
    assert set(OPTION_NAMES.values()) <= spelled


def test_nothing_given_leaves_all_to_the_rule(given: Given) -> None:
    assert given() == {}


def test_each_flag_is_one_field(given: Given) -> None:
    knobs = given(
        *("--gpu-batch-size", 8, "--num-gpu-batches", 3, "--overlap", "multi"),
        *("--prefetch-depth", 2, "--dtype", "bfloat16", "--max-batch-tokens", 512),
        *("--gpu-mem", "22GiB", "--cpu-mem", "1.5GiB", "--disk-mem", 4096),
    )
    assert knobs == {
        "micro_batch_size": 8,
        "num_micro_batches": 3,
        "strategy": "multi",
        "prefetch_depth": 2,
        "compute_dtype": "bfloat16",
        "max_batch_tokens": 512,
        "gpu_mem": 22 * GIB,
        "cpu_mem": 3 * GIB // 2,
        "disk_mem": 4096,
    }
    Policy(**knobs)


@pytest.mark.parametrize(
    ("flags", "separate", "pin"),
    [
        (["--sep-layer"], True, None),
        (["--sep-layer", "--pin-weight", "false"], True, False),
        (["--pin-weight", "0", "--sep-layer", "no"], False, False),
        (["--pin-weight=true"], None, True),
    ],
)
def test_switches_take_a_word_or_none(
    given: Given, flags: list[str], separate: bool | None, pin: bool | None
) -> None:
    knobs = given(*flags)
    assert (knobs.get("separate_layers"), knobs.get("pin_weights")) == (separate, pin)


def test_compression_takes_its_bits_none_or_no_word_for_four(given: Given) -> None:
    knobs = given("--compress-weight", "--compress-cache", 8, "--compress-vocabulary", "none")
    assert knobs == {
        "compress_weight": "4",
        "compress_cache": "8",
        "compress_vocabulary": "none",
    }
    policy = Policy(**knobs)
    assert policy.weight_codec == Codec(bits=4) and policy.vocabulary_codec is None


@pytest.mark.parametrize(
    ("flags", "codec"),
    [([], Codec(bits=8, group_size=128)), (["--compress-weight", "none"], None)],
)
def test_a_file_says_bits_as_numbers(
    given: Given, tmp_path: Path, flags: list[str], codec: Codec | None
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("compress_weight: 8\ncompress_cache: none\ncompress_group: 128\n")
    assert Policy(**given("--policy", file, *flags)).weight_codec == codec


def test_percent_is_six_numbers_and_the_rest_is_disk(given: Given) -> None:
    knobs = given("--percent", 20, 80, 0, 50, 100, 0)
    assert knobs["weights"] == Shares(gpu=0.2, cpu=0.8)
    assert knobs["kv_cache"] == Shares(cpu=0.5, disk=0.5)
    assert knobs["hidden"] == Shares(gpu=1.0)


FILE = "weights: {cpu: 0.5, disk: 0.5}\nmicro_batch_size: 4\nstrategy: single\ngpu_mem: 2GiB\n"


def test_flags_override_single_knobs_of_the_file(given: Given, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FILE)
    knobs = given("--policy", file, "--overlap", "none", "--prefetch-depth", 3)
    assert knobs == {
        "weights": Shares(cpu=0.5, disk=0.5),
        "micro_batch_size": 4,
        "strategy": "none",
        "prefetch_depth": 3,
        "gpu_mem": 2 * GIB,
    }


def test_policy_may_be_a_preset(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(FILE)
    monkeypatch.setattr("flexpipe.preset.presets_dir", lambda: tmp_path)
    assert given("--policy", "small")["micro_batch_size"] == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--percent", "100", "0"], "'--percent' requires 6 arguments"),
        (["--percent", "90", "20", "0", "100", "0", "100"], "--percent gives weights 90"),
        (["--percent", "nan", "20", "0", "100", "0", "100"], "between 0 and 1"),
        (["--gpu-batch-size", "0"], "'--gpu-batch-size'"),
        (["--overlap", "double"], "'--overlap'"),
        (["--dtype", "int8"], "'--dtype'"),
        (["--gpu-mem", "lots"], "'--gpu-mem': cannot read 'lots'"),
        (["--pin-weight", "maybe"], "'--pin-weight'"),
        (["--emulate", "h2d=fast"], "'--emulate': --emulate h2d=fast: cannot read"),
        (["--emulate", "h2d=1GB/s", "--device", "cpu"], "--device is cpu"),
        (["--device", "tpu"], "--device 'tpu' is unknown"),
        (["--temperature", "-0.8"], "temperature must be"),
        (["--policy", "no-such-preset"], "no-such-preset"),
        (["--policy", "no/such/file.yaml"], "cannot read the policy file no/such/file.yaml"),
        (["--trace", "run.gif"], "--trace run.gif"),
        (["--load-format", "gguf"], "'--load-format'"),
    ],
)
def test_bad_value_is_refused_with_its_option(
    refused: Callable[..., str], arguments: list[str], named: str
) -> None:
    assert named in refused(*arguments)


def test_unknown_field_of_a_file_is_refused_by_name(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("micro_batch_sizes: 4\n")
    assert "did you mean micro_batch_size?" in refused("--policy", file)


def test_emulation_implies_its_device(given: Given, job: FakeJob) -> None:
    given("--emulate", "h2d=1GB/s")
    assert job.spec.device == "emulated"
    assert job.spec.emulation == Emulation(h2d_bytes_per_s=1e9)


def test_a_file_wins_over_a_preset_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text(FILE)
    assert policy_file("mine") == Path("mine")


def test_readme_names_every_option_and_field(repo: Path) -> None:
    readme = (repo / "README.md").read_text(encoding="utf-8")
    spelled = {option.opts[-1] for option in (*run.params, *bench.params)}
    assert {name for name in spelled if name not in readme} == set()
    assert {name for name in OPTION_NAMES if f"`{name}`" not in readme} == set()
