"""Documents keep up with the code: files, links, targets, commands and options exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from roost.cli import main
from roost.options import options_page

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
    "targets"
]["wheel"]["packages"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("package", PACKAGES)
def test_the_code_map_names_every_file_and_nothing_else(package):
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.split(f"| **{package}/** |")[1].split("| **")[0].split("\nBeside them")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+\.py)`", row)}

    files = (ROOT / package).rglob("*.py")
    existing = {str(f.relative_to(ROOT / package)) for f in files if f.name != "__init__.py"}

    assert existing == named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(document):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = document.read_text()
    for target in re.findall(r"^make ([a-z0-9-]+)", text, re.MULTILINE):
        assert target in targets
    for line in re.findall(r"^roost [a-z].*", text, re.MULTILINE):
        command: click.Command = main
        arguments = shlex.split(line, comments=True)[1:]
        while isinstance(command, click.Group):
            command = command.commands[arguments.pop(0)]
        command.make_parser(click.Context(command)).parse_args(arguments)


def test_options_are_documented_as_they_are():
    assert options_page() == (ROOT / "docs" / "options.md").read_text(), "run `make docs`"


def test_every_decision_is_listed():
    listed = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert f"({page.name})" in listed
        assert page.read_text().startswith(f"# {page.name[:4]}: ")


def test_make_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())

    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert phony == set(re.findall(r"^  make (\S+)", shown, re.MULTILINE))
