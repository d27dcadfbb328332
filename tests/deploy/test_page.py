"""docs/deployment.md: the files, services and units that its commands name are there."""

from __future__ import annotations

import re
import shlex

from deployed import DEPLOY, ROOT, load

PAGE = (ROOT / "docs" / "deployment.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if re.match(r"(docker|deploy/|kubectl|systemctl|cp) ?", line)
]
SERVICES = load(DEPLOY / "compose.yaml")["services"]


def arguments(*start: str) -> list[list[str]]:
    """Of each command that begins so, the rest."""
    found = [command[len(start) :] for command in COMMANDS if command[: len(start)] == [*start]]
    assert found, start
    return found


def test_paths_lead_somewhere():
    for found in re.findall(r"(?<![\w/.])deploy/[\w./*-]+", PAGE):
        path = found.rstrip("./")
        if not path.startswith("deploy/secrets/") and path != "deploy/secrets":
            assert list(ROOT.glob(path)), path


def test_services_that_are_restarted_are_routers_one_after_the_other():
    restarted = [rest[-1] for rest in arguments("docker", "compose") if "--force-recreate" in rest]
    assert restarted == [name for name in SERVICES if name.startswith("router-")]


def test_units_that_are_started_exist():
    for rest in arguments("systemctl", "enable", "--now"):
        for unit in rest:
            template = re.sub(r"@\d+$", "@.service", unit)
            assert (DEPLOY / "systemd" / template).is_file(), unit


def test_ports_on_this_machine_are_published():
    published = {port for service in SERVICES.values() for port in service.get("ports", [])}
    for port in re.findall(r"--admin http://127\.0\.0\.1:(\d+)", PAGE):
        assert f"127.0.0.1:{port}:9000" in published


def test_overlays_in_the_table_are_those_that_exist():
    named = set(re.findall(r"^\| `([\w-]+)` \| (?:one|three) router", PAGE, re.MULTILINE))
    assert named == {path.name for path in (DEPLOY / "kustomize" / "overlays").iterdir()}
