"""Listening sockets: bound here, or inherited from whoever keeps them open for longer than us.

A group is several sockets on one port (SO_REUSEPORT): the kernel spreads new connections over
them, and each has its own queue of connections not accepted yet. Such a queue belongs to the open
socket, not to the process: while any process holds the socket, the next one finds the queue as
it was.
"""

from __future__ import annotations

import signal
import socket

from roost_router.config import ConfigError

#: Connections that may wait to be accepted: as many as come while a process is replaced.
BACKLOG = 2048
#: Asks a process to leave its sockets to its successor, which accepts already.
REPLACED = signal.SIGUSR2


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises ConfigError with one line that says what to do."""
    sock = _tcp_socket(host)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; stop what uses it or choose another port"
        ) from None
    return sock


def bind_group(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` bound TCP sockets that share a port. Raises ConfigError as `bind` does.

    The first is bound as if it were alone: with SO_REUSEPORT set before, a second router of the
    same user would take half of our clients where it should be told that the port is in use.
    """
    first = bind(host, port)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    group = [first]
    for _ in range(count - 1):
        sock = _tcp_socket(host)
        group.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(first.getsockname())
    return group


def inherited(fd: int) -> socket.socket:
    """The TCP socket behind a descriptor that another process opened. Raises ConfigError."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"descriptor {fd} is no socket: {error.strerror}") from None
    if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise ConfigError(f"descriptor {fd} is no TCP socket: clients come over TCP")
    return sock


def _tcp_socket(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock
