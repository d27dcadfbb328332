"""compose.yaml: valid, closed, and its parts agree with each other and with the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files

import jsonschema
import pytest
from deployed import DEPLOY, CommandLine, load

COMPOSE = load(DEPLOY / "compose.yaml")
SERVICES = COMPOSE["services"]
ROUTERS = {name: service for name, service in SERVICES.items() if name.startswith("router-")}
ENGINES = {name: service for name, service in SERVICES.items() if name.startswith("engine-")}


def seconds(duration: str) -> float:
    return float(re.fullmatch(r"(\d+)s", duration)[1])


def test_it_is_a_compose_file():
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(COMPOSE, json.loads(schema.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"a": {"imgae": "b"}}}, json.loads(schema.read_text()))


def test_there_are_two_routers_and_two_engines():
    assert (len(ROUTERS), len(ENGINES)) == (2, 2)


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_can_write_or_gain_rights(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "build" in service or re.search(r":v?\d+\.\d+", service["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_names_is_there(name):
    service = SERVICES[name]
    secrets = service.get("secrets", [])
    assert set(secrets) <= set(COMPOSE["secrets"])
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    for other in service.get("depends_on", {}):
        assert other in SERVICES
        if service["depends_on"][other]["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other] or "build" in SERVICES[other]
    text = json.dumps([service.get(key) for key in ("command", "environment", "healthcheck")])
    used = set(re.findall(r"/run/secrets/([\w.-]+)", text))
    if name == "prometheus":
        used.add("admin-key")  # in its configuration
    assert used == set(secrets)
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        assert (
            (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
        )


def test_only_the_front_is_open_to_other_machines():
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:") or name == "front"


def test_redis_and_engines_are_on_inner_networks_only():
    for name in ("redis", *ENGINES):
        service = SERVICES[name]
        assert "ports" not in service
        assert all(COMPOSE["networks"][network]["internal"] for network in service["networks"])
    on_store = [name for name, service in SERVICES.items() if "store" in service["networks"]]
    assert sorted(on_store) == ["redis", *sorted(ROUTERS)]


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_know_all_replicas_and_have_time_to_drain(name):
    line = CommandLine(SERVICES[name]["command"])
    replicas = [part for part in SERVICES[name]["command"] if part.startswith("--replica=")]

    port = int(CommandLine(SERVICES["engine-1"]["command"]).number("--port"))
    assert replicas == [f"--replica=http://{engine}:{port}" for engine in ENGINES]
    assert line.options["--redis"] == "redis://roost@redis:6379/0"
    drain_s = line.number("--drain-delay") + line.number("--drain")
    assert drain_s + 5 <= seconds(SERVICES[name]["stop_grace_period"])


@pytest.mark.parametrize("name", ENGINES)
def test_engines_have_time_to_finish(name):
    line = CommandLine(SERVICES[name]["command"])
    assert line.number("--grace") + 5 <= seconds(SERVICES[name]["stop_grace_period"])


def test_the_front_and_prometheus_know_both_routers():
    front = (DEPLOY / "compose" / "haproxy.cfg").read_text()
    assert re.findall(r"^ +server (\S+) (\S+)", front, re.MULTILINE) == [
        (name, f"{name}:8000") for name in ROUTERS
    ]
    assert "check port 9000" in front
    (at_most,) = re.findall(r"^ +maxconn (\d+)", front, re.MULTILINE)
    assert 2 * int(at_most) + 100 <= SERVICES["front"]["ulimits"]["nofile"]  # both sides
    jobs = load(DEPLOY / "prometheus" / "prometheus.yaml")["scrape_configs"]
    targets = [target for job in jobs for target in job["static_configs"][0]["targets"]]
    assert targets == [*(f"{name}:9000" for name in ROUTERS), *(f"{e}:8101" for e in ENGINES)]


def test_the_front_is_what_haproxy_takes():
    haproxy = shutil.which("haproxy")
    if haproxy is None:
        pytest.skip("haproxy is not installed (Debian: apt install haproxy)")
    command = [haproxy, "-c", "-f", str(DEPLOY / "compose" / "haproxy.cfg")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
