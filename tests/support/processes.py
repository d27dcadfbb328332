"""Start and stop real Roost processes for tests; each hangs on a lifeline, so none survives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openai


class Process:
    """One `roost` command; its output is kept for failure messages."""

    def __init__(self, *arguments: str) -> None:
        read_end, self._our_end = os.pipe()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "roost", *arguments, "--lifeline-fd", str(read_end)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(read_end,),
            text=True,
            start_new_session=True,
        )
        os.close(read_end)
        self.url = ""

    def until_line(self, pattern: str) -> re.Match[str]:
        """Read output up to a line that matches `pattern`."""
        assert self.popen.stdout is not None
        seen = []
        for line in self.popen.stdout:
            seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"ended without {pattern!r}:\n{''.join(seen)}")

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.popen.terminate()
        code = self.popen.wait(30)
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        with contextlib.suppress(OSError):
            os.close(self._our_end)
        return code


def start_engine(*options: str) -> Process:
    """A replica with the small real model, one thread, ready."""
    engine = Process("serve", "smollm2", "--port", "0", "--threads", "1", *options)
    engine.url = engine.until_line(r"^ready: .* on (http://\S+)")[1]
    return engine


def start_router(*engines: Process, options: Sequence[str] = ()) -> tuple[Process, str]:
    """A router over `engines`, ready, and the URL of its admin port."""
    replicas = [part for engine in engines for part in ("--replica", engine.url)]
    router = Process("route", "--port", "0", "--admin-port", "0", *replicas, *options)
    found = router.until_line(r"routing on (http://\S+), admin on (http://\S+)")
    router.url, admin = found[1], found[2]
    until(lambda: ready_replicas(admin) == len(engines))
    return router, admin


def ready_replicas(admin: str) -> int:
    """How many replicas the router counts as up."""
    with contextlib.suppress(OSError):
        return len(json.loads(get(f"{admin}/ready"))["replicas_up"])
    return 0


def get(url: str) -> str:
    """Body of a GET, whatever the status below 400."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def metric(engine: Process | str, name: str) -> float:
    """Sum of a metric's samples on the Prometheus page of a replica, or of a URL."""
    page = get(f"{engine if isinstance(engine, str) else engine.url}/metrics")
    values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", page, re.MULTILINE)
    assert values, f"{name} is not exported"
    return sum(float(value) for value in values)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for `condition`; fails the test when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


@dataclass
class Cluster:
    """A router and two engines with the real model."""

    engines: list[Process]
    router: Process
    admin: str
    client: openai.OpenAI

    @property
    def model(self) -> str:
        return self.client.models.list().data[0].id


def make_client(url: str) -> openai.OpenAI:
    """An SDK client that never retries: every failure is seen."""
    import openai  # takes a second: not where tests are only collected

    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)
