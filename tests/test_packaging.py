"""What is installed is what the checkout holds, and the launchers find it."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCES = ("flexpipe", "policies", "setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE")


@pytest.fixture(scope="module")
def setup(repo: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(repo / "setup.cfg")
    return parser


def test_every_package_of_the_tree_is_installed(
    repo: Path, setup: configparser.ConfigParser
) -> None:
    listed = setup["options"]["packages"].split()
    tree = {
        ".".join(path.parent.relative_to(repo).parts)
        for path in (repo / "flexpipe").rglob("__init__.py")
    }
    assert set(listed) == tree | {"flexpipe.presets"}


def test_ci_pins_everything_that_is_asked_for(repo: Path, setup: configparser.ConfigParser) -> None:
    pins = (repo / ".ci/constraints.txt").read_text().splitlines()
    pinned = {_name(line) for line in pins if "==" in line}
    extras = setup["options.extras_require"]
    asked = "\n".join([setup["options"]["install_requires"], extras["plot"], extras["test"]])
    assert {_name(line) for line in asked.split("\n") if line} <= pinned
    assert "torch==2.13.0" in pins


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~ ]", requirement.strip())[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this checkout, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = repo / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    shutil.copy(repo / "README.md", copy)
    (copy / "policies" / "probe.yaml").write_text("micro_batch_size: 4\n")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(copy), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(copy.glob("*.whl"))


def test_wheel_holds_code_model_and_presets(repo: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {str(path.relative_to(repo)) for path in (repo / "flexpipe").rglob("*.py")}
    presets = {
        f"flexpipe/presets/{path.relative_to(repo / 'policies')}"
        for path in (repo / "policies").rglob("*")
        if path.is_file()
    }
    model = {str(path.relative_to(repo)) for path in (repo / "flexpipe/demo/model").glob("*")}
    assert code | presets | model | {"flexpipe/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "policies", "benchmarks"))]


def test_installed_command_finds_presets_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "from flexpipe.preset import presets_dir\n"
        "from flexpipe.cli.options import policy_file\n"
        "print(presets_dir(), policy_file('probe'), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    presets = tmp_path / "site" / "flexpipe" / "presets"
    assert done.stdout.splitlines() == [str(presets), str(presets / "probe.yaml")], done.stderr


def test_launcher_runs_this_checkout_through_a_link_from_anywhere(
    repo: Path, tmp_path: Path
) -> None:
    link = tmp_path / "flexpipe"
    link.symlink_to(repo / "bin" / "flexpipe")
    done = _launch(link, "--version", FLEXPIPE_VENV=str(tmp_path), PYTHON=sys.executable)
    assert done.stdout.startswith("flexpipe, version"), done.stderr


def test_old_python_is_refused_with_advice(repo: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for script in ("venv", "flexpipe", "demo", "test"):
        venv = tmp_path / "venv"
        done = _launch(repo / "bin" / script, FLEXPIPE_VENV=str(venv), PYTHON=str(old))
        assert done.returncode == 1 and "3.11" in done.stderr
        assert not venv.exists()


def _launch(script: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
        env=os.environ | env,
    )
