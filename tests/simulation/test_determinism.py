from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from roost_loadtest.simulation.families import FAMILIES, run

_PROGRAM = """
from roost_loadtest.simulation.families import run
import sys
for family in sys.argv[1:]:
    for line in run(family, 3).rendered_log():
        print(line)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_run(family):
    first, second = run(family, 3).rendered_log(), run(family, 3).rendered_log()

    assert first
    assert first == second


def test_another_seed_gives_another_run():
    assert run("calm", 1).rendered_log() != run("calm", 2).rendered_log()


@pytest.mark.simulation
def test_a_run_does_not_depend_on_the_process_it_is_in():
    """Neither hash seeds nor addresses of objects decide anything."""
    logs = []
    for hash_seed in ("0", "1", "77"):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *FAMILIES],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
        logs.append(hashlib.sha256(done.stdout).hexdigest())

    assert len(set(logs)) == 1
