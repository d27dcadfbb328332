"""systemd units: what systemd takes, with options that exist, and time to drain."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest
from deployed import DEPLOY, CommandLine

UNITS = DEPLOY / "systemd"
SERVICES = ["roost-router.service", "roost-engine@.service"]


def settings(name: str) -> dict[str, str]:
    """Each setting's last value; lines that end in a backslash are joined."""
    text = (UNITS / name).read_text().replace("\\\n", " ")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def command(name: str, **values: str) -> CommandLine:
    text = settings(name)["ExecStart"]
    for variable, value in values.items():
        text = text.replace(f"${{{variable}}}", value).replace(f"${variable}", value)
    program, *arguments = shlex.split(text.replace("%i", "8101"))
    assert program == "/opt/roost/bin/roost"
    return CommandLine(arguments)


def test_systemd_takes_them(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for path in UNITS.iterdir():
        name = path.name.replace("@.", "@8101.")
        text = path.read_text().replace("/opt/roost/bin/roost", "/bin/true")
        (tmp_path / name).write_text(text)
    verify = ["systemd-analyze", "verify", *(str(path) for path in tmp_path.iterdir())]
    run = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_router_drains_in_time_and_takes_the_socket_it_is_given():
    unit = settings("roost-router.service")
    line = command("roost-router.service")
    assert line.number("--drain-delay") + line.number("--drain") + 5 <= int(unit["TimeoutStopSec"])
    assert unit["Requires"] == "roost-router.socket"
    assert settings("roost-router.socket")["ListenStream"].endswith(":8000")
    assert line.number("--processes") == 1  # a supervisor: reload replaces its worker
    assert unit["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert unit["KillMode"] == "mixed"
    assert int(unit["LimitNOFILE"]) > line.number("--max-connections")


def test_an_engine_finishes_in_time_on_the_port_of_its_name():
    unit = settings("roost-engine@.service")
    line = command("roost-engine@.service", MODEL="smollm2", OPTIONS="--threads 8")
    assert line.number("--port") == 8101
    assert line.number("--grace") + 5 <= int(unit["TimeoutStopSec"])


def test_the_example_of_an_engine_is_one():
    text = (UNITS / "roost-engine@.service").read_text()
    (options,) = re.findall(r"^#   OPTIONS=(.*)$", text, re.MULTILINE)
    command("roost-engine@.service", MODEL="smollm2", OPTIONS=options)


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_no_root_and_gain_none(name):
    unit = settings(name)
    assert unit["User"] == "roost"
    assert unit["NoNewPrivileges"] == "yes"
    assert unit["CapabilityBoundingSet"] == ""
    assert unit["ProtectSystem"] == "strict"
    assert unit["Restart"] == "always"
