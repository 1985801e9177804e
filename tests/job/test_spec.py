"""A job that contradicts itself is refused before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexpipe.errors import InputError
from flexpipe.job.spec import JobSpec
from flexpipe.plan.arrangement import Arrangement
from flexpipe.plan.hardware import Emulation


def spec(**changes: Any) -> JobSpec:
    values = {"model": "m", "input_path": Path("in"), "output_path": Path("out")}
    return JobSpec(**(values | changes))


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "emulated"])
def test_known_devices_pass(device: str) -> None:
    assert spec(device=device).device == device


def test_emulated_device_always_has_an_emulation() -> None:
    assert spec(device="emulated").emulation == Emulation()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": ""}, "--model"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temperature": -0.7}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"load_format": "gguf"}, "--load-format"),
        ({"device": "gpu"}, "--device 'gpu'"),
        ({"device": "cpu", "emulation": Emulation()}, "--emulate"),
        ({"trace_path": Path("t.pdf")}, "--trace t.pdf"),
        ({"trace_path": Path("t.png"), "arrangement": Arrangement(num_stages=2)}, "end in .json"),
        ({"output_path": Path("-")}, "--output-file -"),
        ({"output_path": Path("in")}, "is the input file"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as refusal:
        spec(**changes)
    assert named in str(refusal.value)


def test_output_that_links_to_the_input_is_refused(tmp_path: Path) -> None:
    prompts, link = tmp_path / "prompts", tmp_path / "link"
    prompts.write_text("hello\n")
    link.symlink_to(prompts)
    with pytest.raises(InputError, match="is the input file"):
        spec(input_path=prompts, output_path=link)
