"""`flexpipe profile` shows what is known of the machine; here that is the tests' profile."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flexpipe.policy.profile import OVERHEADS, read_profile, render_profile

Flexpipe = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def test_the_table_has_links_products_overheads_and_memory(
    flexpipe: Flexpipe, capsys: Capture
) -> None:
    assert flexpipe("profile") == 0
    told = capsys.readouterr()
    known = read_profile(Path(os.environ["FLEXPIPE_PROFILE"]))
    for name in (known.name, known.date, *known.links, *known.compute.matmul, *OVERHEADS, "memory"):
        assert name in told.out
    assert os.environ["FLEXPIPE_PROFILE"] in told.err


def test_json_is_one_line_with_every_part_of_the_file(flexpipe: Flexpipe, capsys: Capture) -> None:
    assert flexpipe("profile", "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    data = json.loads(out)
    assert {"links", "compute", "overhead_s", "slowdown", "memory"} <= set(data)


def test_the_output_file_is_the_profile_again(
    flexpipe: Flexpipe, tmp_path: Path, capsys: Capture
) -> None:
    assert flexpipe("profile", "-o", tmp_path / "machine.yaml") == 0
    known = read_profile(Path(os.environ["FLEXPIPE_PROFILE"]))
    assert render_profile(read_profile(tmp_path / "machine.yaml")) == render_profile(known)


def test_an_output_file_without_a_directory_is_refused_before_anything_is_measured(
    flexpipe: Flexpipe, tmp_path: Path, capsys: Capture
) -> None:
    assert flexpipe("profile", "-o", tmp_path / "none" / "machine.yaml") == 2
    told = capsys.readouterr()
    assert "none" in told.err and told.out == ""


def test_a_profile_that_cannot_be_read_is_one_line(
    flexpipe: Flexpipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text("links: {h2d: fast}")
    monkeypatch.setenv("FLEXPIPE_PROFILE", str(path))
    assert flexpipe("profile") == 2
    assert capsys.readouterr().err.count("\n") == 1
