"""What installing and importing costs: the router alone stays small and never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import Distribution, distribution

import pytest
from packaging.requirements import Requirement

HEAVY = {"torch", "triton", "numpy", "transformers", "tokenizers", "jinja2", "roost_engine"}


def imported_by(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    return {name.partition(".")[0] for name in json.loads(shown)}


@pytest.mark.parametrize(
    "statement",
    ["import roost_router.app", "import roost.up, roost.bench", "import roost_loadtest.demo"],
)
def test_the_router_imports_nothing_heavy(statement):
    assert not HEAVY & imported_by(statement)


def test_what_the_router_alone_can_do_needs_no_aiohttp():
    """One HTTP implementation; another costs 15 MB and 0.2 s of each start (decisions/0015)."""
    statement = "import roost_router.app, roost_router.supervisor, roost_loadtest.bench_proxy"
    assert "aiohttp" not in imported_by(statement)


def test_a_router_without_a_store_needs_nothing_of_it():
    assert not {"hiredis", "nacl", "redis"} & imported_by("import roost.up, roost_router.app")


def test_the_store_needs_no_redis_py():
    found = imported_by("import roost_router.store.client")
    assert "hiredis" in found
    assert "redis" not in found


def test_help_imports_only_the_command_line():
    assert not (HEAVY | {"aiohttp", "uvloop", "prometheus_client"}) & imported_by(
        "import roost.cli"
    )


def base_distributions() -> dict[str, Distribution]:
    """Roost and all that it needs without extras."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement("roost")]
    while waiting:
        requirement = waiting.pop()
        if requirement.name.lower() in found:
            continue
        dist = found[requirement.name.lower()] = distribution(requirement.name)
        for text in dist.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed)
    return found


def test_the_router_alone_installs_within_60_mb_and_25_distributions():
    found = base_distributions()
    size = sum(
        path.stat().st_size
        for dist in found.values()
        for file in dist.files or []
        if (path := dist.locate_file(file)).is_file()
    )

    assert not HEAVY & found.keys()
    assert len(found) <= 25
    assert size <= 60e6
    assert "uvloop" in found
