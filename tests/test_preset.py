"""Presets are found by name, each among its own kind, and a wrong name is answered in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexpipe.errors import PolicyError
from flexpipe.preset import find_preset, hardware_file, policy_file, preset_names


def test_a_machine_is_found_in_any_case_and_with_its_suffix(repo: Path) -> None:
    file = repo / "policies" / "hardware" / "t4-gcp.yaml"
    assert {hardware_file(name) for name in ("t4-gcp", "T4-GCP", "t4-gcp.yaml")} == {file}


def test_machines_policies_and_model_shapes_are_told_apart() -> None:
    assert not set(preset_names("")) & set(preset_names("hardware"))
    assert not set(preset_names("hardware")) & set(preset_names("models"))
    with pytest.raises(PolicyError, match="no policy preset is called 't4-gcp'"):
        policy_file("t4-gcp")
    with pytest.raises(PolicyError, match="no hardware preset is called 'host-weights'"):
        hardware_file("host-weights")


def test_unknown_hardware_is_refused_in_one_line_with_the_nearest_name() -> None:
    with pytest.raises(PolicyError) as refused:
        hardware_file("RTX-4O90")
    message = str(refused.value)
    assert "did you mean rtx-4090? Known presets: " in message
    assert all(name in message for name in preset_names("hardware"))
    assert "\n" not in message


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(PolicyError, match=r"called 'zzz'\. Known presets"):
        find_preset("hardware", "zzz")


def test_a_hardware_file_wins_over_a_preset_and_a_path_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h100").write_text("name: mine\n")
    assert hardware_file("h100") == Path("h100")
    assert hardware_file("no/such.yaml") == Path("no/such.yaml")
