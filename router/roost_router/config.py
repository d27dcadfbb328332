"""Configuration of a router process: frozen, validated once. `roost route --help` shows it."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import msgspec

from roost_router.replica_url import ReplicaUrlError, check_replica_url


class ConfigError(ValueError):
    """An option cannot be served; the message says which and what to do."""


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All options of one router."""

    replicas: tuple[str, ...]  # base URLs, without /v1
    host: str = "127.0.0.1"  # data port: clients
    port: int = 8000
    admin_host: str = "127.0.0.1"  # admin port: metrics, health; never on the data port
    admin_port: int = 9000
    poll_interval_s: float = 1.0  # shorter notices joins and deaths sooner, costs replicas a page
    poll_timeout_s: float = 5.0
    connect_timeout_s: float = 2.0
    max_attempts: int = 3  # replicas tried for a request before the first byte
    max_resumes: int = 3  # replicas tried for a stream after it
    max_body_bytes: int = 32 << 20
    drain_s: float = 10.0  # how long streams may finish after SIGTERM
    api_keys_file: Path | None = None  # hashes of the keys that open the data port; None: open
    admin_keys_file: Path | None = None  # likewise /metrics and /replicas of the admin port
    replica_key_file: Path | None = None  # holds the key that replicas ask for
    insecure: bool = False  # other machines may come in without a key
    lifeline_fd: int | None = None  # stop when this descriptor reaches its end (parent died)

    def __post_init__(self) -> None:
        """Refuse what could never work."""
        if not self.replicas:
            raise ConfigError("no replica given: pass --replica URL at least once")
        if len(set(self.replicas)) != len(self.replicas):
            raise ConfigError("a replica is given twice")
        for url in self.replicas:
            try:
                check_replica_url(url)
            except ReplicaUrlError as error:
                raise ConfigError(str(error)) from None
        if self.port == self.admin_port and self.port and self.host == self.admin_host:
            raise ConfigError(f"data and admin port are both {self.port}: choose two")
        if not self.insecure:
            if self.api_keys_file is None:
                check_open("--host", self.host, "--api-keys-file (see `roost keys new`)")
            if self.admin_keys_file is None:
                check_open("--admin-host", self.admin_host, "--admin-keys-file")


def check_open(option: str, host: str, cure: str = "") -> None:
    """ConfigError for an address of `option` that other machines reach: nobody is asked for a key.

    `cure`: the option that makes it ask.
    """
    if not is_loopback(host):
        keys = f"{cure}, or " if cure else ""
        raise ConfigError(
            f"{option} {host} lets other machines in without a key: pass {keys}--insecure if "
            "something before it asks for one"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`. Names other than localhost count as not."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
