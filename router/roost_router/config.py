"""Configuration of a router process: frozen, validated once. `roost route --help` shows it."""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec


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
    max_body_bytes: int = 32 << 20
    drain_s: float = 10.0  # how long streams may finish after SIGTERM
    lifeline_fd: int | None = None  # stop when this descriptor reaches its end (parent died)

    def __post_init__(self) -> None:
        """Refuse what could never work."""
        if not self.replicas:
            raise ConfigError("no replica given: pass --replica URL at least once")
        if len(set(self.replicas)) != len(self.replicas):
            raise ConfigError("a replica is given twice")
        for url in self.replicas:
            _check_url(url)
        if self.port == self.admin_port and self.port and self.host == self.admin_host:
            raise ConfigError(f"data and admin port are both {self.port}: choose two")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if usable and "@" in parts.netloc:
        raise ConfigError(f"'{parts.hostname}' is given with a user name: replicas take none")
    if not usable:
        raise ConfigError(f"'{url}' is not a replica's URL; it looks like http://127.0.0.1:8101")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigError(f"give '{url}' without /v1: requests bring their own path")
