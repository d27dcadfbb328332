"""Listening sockets: who may share a port, and what a descriptor must be."""

from __future__ import annotations

import os
import socket

import pytest

from roost_router.config import ConfigError
from roost_router.listening import bind_group, inherited


def test_a_group_shares_a_port_and_each_connection_comes_to_one_of_them():
    group = bind_group("127.0.0.1", 0, 3)
    for sock in group:
        sock.listen()
        sock.setblocking(False)

    clients = [socket.create_connection(group[0].getsockname()) for _ in range(60)]

    accepted = []
    for sock in group:
        count = 0
        while True:
            try:
                sock.accept()[0].close()
            except BlockingIOError:
                break
            count += 1
        accepted.append(count)
    assert sum(accepted) == 60
    assert min(accepted) > 0
    for sock in [*group, *clients]:
        sock.close()


def test_a_second_group_on_the_port_is_refused():
    group = bind_group("127.0.0.1", 0, 2)
    for sock in group:
        sock.listen()
    port = group[0].getsockname()[1]

    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .* in use"):
        bind_group("127.0.0.1", port, 2)

    for sock in group:
        sock.close()


@pytest.mark.parametrize("kind", ["pipe", "closed", "udp", "unix"])
def test_a_descriptor_that_is_no_tcp_socket_is_refused(kind):
    opened = {
        "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach(),
        "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach(),
        "pipe": lambda: os.pipe()[0],
        "closed": lambda: 1_000_000,
    }
    fd = opened[kind]()

    with pytest.raises(ConfigError, match=f"descriptor {fd} is no"):
        inherited(fd)
