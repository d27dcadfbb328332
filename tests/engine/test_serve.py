"""The replica as a process: it starts, says so, and stops when told to or when alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from roost_engine.serve import ServeError, _bind

pytestmark = [pytest.mark.model, pytest.mark.e2e]

PROGRAM = """
import asyncio, sys
from roost_engine.serve import ServeConfig, serve
fd = int(sys.argv[2])
asyncio.run(serve(ServeConfig(
    model="smollm2", port=int(sys.argv[1]), kv_tokens=4096, max_model_len=1024,
    lifeline_fd=None if fd < 0 else fd,
)))
"""


def start(port: int = 0, lifeline: int = -1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port), str(lifeline)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[lifeline] if lifeline >= 0 else [],
        text=True,
    )


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def ready_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready: SmolLM2"), line
    return next(word for word in line.split() if word.startswith("http://"))


def test_it_serves_until_its_parent_is_gone_and_its_port_is_its_own() -> None:
    reader, writer = os.pipe()
    with ended(start(lifeline=reader)) as replica:
        os.close(reader)
        url = ready_url(replica)
        with urllib.request.urlopen(f"{url}/health") as answer:
            assert answer.status == 200
        with ended(start(port=int(url.rsplit(":", 1)[1]))) as second:
            _, errors = second.communicate()
            assert second.returncode == 1
            assert errors.count("\n") == 1
            assert "Address already in use" in errors

        os.close(writer)

        _, errors = replica.communicate()
        assert (replica.returncode, errors) == (0, "")


def test_sigterm_is_a_clean_end() -> None:
    with ended(start()) as replica:
        ready_url(replica)
        replica.send_signal(signal.SIGTERM)

        _, errors = replica.communicate()
        assert (replica.returncode, errors) == (0, "")


def test_an_address_that_does_not_exist_is_told() -> None:
    with pytest.raises(ServeError, match=r"cannot listen on no-such-host.invalid:1:"):
        _bind("no-such-host.invalid", 1)
