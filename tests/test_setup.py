"""deploy/setup.sh on machines where something is missing: one line that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What setup.sh reads, without a virtual environment."""
    (tmp_path / "deploy").mkdir()
    for name in ("deploy/setup.sh", "deploy/model.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_setup(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["deploy/setup.sh", "engine"],
        cwd=directory,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(directory: Path, script: str) -> str:
    path = directory / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_python_is_named(copy):
    result = run_setup(copy, PYTHON="no-such-python")

    assert result.returncode == 1
    assert result.stderr == (
        "setup: 'no-such-python' is missing: install Python 3.11 or newer, "
        "or name one with PYTHON=/path/to/python3\n"
    )


def test_an_old_python_is_refused(copy):
    old = fake_python(copy, '[ "$1" = --version ] && echo Python 3.9.2 || exit 1')

    result = run_setup(copy, PYTHON=old)

    assert result.returncode == 1
    assert result.stderr.startswith("setup: Python 3.9.2 is too old: Roost needs 3.11 or newer")


def test_a_python_without_venv_is_told_apart(copy):
    broken = fake_python(copy, 'case "$*" in *venv*) exit 1;; --version) echo Python 3.11.2;; esac')

    result = run_setup(copy, PYTHON=broken)

    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr
    assert not (copy / ".venv").exists()


@pytest.mark.e2e  # makes an environment, with its own pip
def test_a_download_that_fails_says_what_to_do(copy):
    result = run_setup(copy, PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1")

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("setup: could not install torch")
    assert "check the network" in result.stderr
    assert not (copy / ".venv" / ".engine").exists()
