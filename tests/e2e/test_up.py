"""`roost up` as a newcomer meets it: it shows the main job and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from processes import get, until

from roost_loadtest.local_processes import free_port


def start_up(*options: str, port: int, admin_port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "roost", "up"),
            *("--port", str(port), "--admin-port", str(admin_port)),
            *options,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def read_until(up: subprocess.Popen[str], text: str) -> str:
    assert up.stdout is not None
    seen = ""
    for line in up.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended without {text!r}:\n{seen}")


def test_it_demonstrates_the_main_job_and_ctrl_c_leaves_no_process():
    port, admin_port = free_port(), free_port()
    up = start_up(port=port, admin_port=admin_port)
    shown = read_until(up, "Ctrl-C stops everything")
    children = children_of(up.pid)

    assert f"http://127.0.0.1:{port}/v1" in shown
    curl = re.search(r"^  curl .*?\}'$", shown, re.MULTILINE | re.DOTALL)[0]
    snippet = re.search(r"^  from openai.*?content\)$", shown, re.MULTILINE | re.DOTALL)[0]
    for command in (["sh", "-c", curl], [sys.executable, "-c", textwrap.dedent(snippet)]):
        assert "Paris" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"(r\d) +(\d+) +(\d+) +([\d.]+) s", shown)
    (home, _, cold_cached, cold), (warm_home, _, warm_cached, warm), (other, *_) = rows
    assert (home, cold_cached) == (warm_home, "0")
    assert other != home
    assert int(warm_cached) > 1800
    assert float(cold) / float(warm) >= 5
    assert len(children) == 3
    assert json.loads(get(f"http://127.0.0.1:{admin_port}/ready"))["ready"] is True

    up.send_signal(signal.SIGINT)
    rest = up.communicate(timeout=30)[0]

    assert up.returncode == 0
    assert "no process is left behind" in rest
    assert not any(is_alive(child) for child in children)


def test_children_end_when_up_is_killed():
    up = start_up("--no-demo", port=free_port(), admin_port=free_port())
    read_until(up, "Ctrl-C stops everything")
    children = children_of(up.pid)
    assert len(children) == 3

    up.send_signal(signal.SIGKILL)
    up.communicate(timeout=10)

    until(lambda: not any(is_alive(child) for child in children))


def free_pair(first: int) -> int:
    """The first of two free ports in a row, where nobody is given any port that is free."""
    for port in range(first + os.getpid() % 2000, first + 6000, 2):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two free ports in a row")


def two_routers(*options: str) -> subprocess.Popen[str]:
    port, admin_port = free_pair(20_000), free_pair(26_000)
    return start_up("--redis", "--routers", "2", *options, port=port, admin_port=admin_port)


def test_two_routers_and_a_redis_act_as_one_router():
    up = two_routers()
    shown = read_until(up, "Ctrl-C stops everything")
    children = children_of(up.pid)

    rows = re.findall(r"(r\d) +(\d+) +(\d+) +([\d.]+) s", shown)
    (home, _, cold_cached, _), (warm_home, _, warm_cached, _), *_ = rows
    assert (home, cold_cached) == (warm_home, "0")  # the other router knew where it had been
    assert int(warm_cached) > 1800
    assert len(children) == 6  # two routers, two replicas, Redis, and who guards it

    up.send_signal(signal.SIGINT)
    up.communicate(timeout=30)

    assert up.returncode == 0
    until(lambda: not any(is_alive(child) for child in children))


def test_redis_ends_when_up_is_killed():
    up = two_routers("--no-demo")
    read_until(up, "Ctrl-C stops everything")
    children = children_of(up.pid)

    up.send_signal(signal.SIGKILL)
    up.communicate(timeout=10)

    until(lambda: not any(is_alive(child) for child in children))


def test_interrupting_the_start_leaves_no_process():
    up = start_up(port=free_port(), admin_port=free_port())
    read_until(up, "starting 2 replicas")
    until(lambda: len(children_of(up.pid)) == 2)
    children = children_of(up.pid)

    os.kill(up.pid, signal.SIGINT)
    up.communicate(timeout=30)

    assert not any(is_alive(child) for child in children)


def test_a_second_interrupt_is_quicker_and_leaves_no_process_either():
    up = start_up("--no-demo", port=free_port(), admin_port=free_port())
    read_until(up, "Ctrl-C stops everything")
    children = children_of(up.pid)
    for child in children:
        os.kill(child, signal.SIGSTOP)  # none of them can stop in good order

    up.send_signal(signal.SIGINT)
    read_until(up, "stopping")
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=10)

    assert len(children) == 3
    assert not any(is_alive(child) for child in children)


def test_a_replica_that_dies_while_starting_is_reported_at_once():
    up = start_up(port=free_port(), admin_port=free_port())
    read_until(up, "starting 2 replicas")
    until(lambda: len(children_of(up.pid)) == 2)

    os.kill(children_of(up.pid)[1], signal.SIGKILL)
    output = up.communicate(timeout=30)[0]

    assert up.returncode == 1
    assert "r1 ended with code -9" in output


def test_a_taken_port_is_one_line_that_says_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for ports in ((port, free_port()), (free_port(), port)):
            up = start_up(port=ports[0], admin_port=ports[1])
            output = up.communicate(timeout=30)[0]

            assert up.returncode == 1
            assert output.count("\n") == 1
            assert f"cannot listen on 127.0.0.1:{port}" in output
            assert "another port" in output


def test_a_model_that_does_not_exist_is_named():
    up = start_up("--model", "no/such.gguf", port=free_port(), admin_port=free_port())

    output = up.communicate(timeout=60)[0]

    assert up.returncode == 1
    assert "no/such.gguf" in output
    assert "Traceback" not in output
