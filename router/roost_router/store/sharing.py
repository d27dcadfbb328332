"""Builds what connects a router with the others: its store, feeders, link. Holds no choices."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from roost_router.config import ConfigError, RouterConfig
from roost_router.placement import Placer
from roost_router.shared.hearing import Hearing
from roost_router.store.address import AddressError, parse_address
from roost_router.store.client import Store
from roost_router.store.leases import Leases
from roost_router.store.link import Link
from roost_router.store.secret import ClusterSecret, SecretError

_log = logging.getLogger(__name__)


def make_link(config: RouterConfig, placer: Placer, clock: Callable[[], float]) -> Link:
    """The link of a router with `config.redis`. Raises ConfigError."""
    journal = placer.journal
    assert journal is not None
    assert config.redis is not None
    assert config.redis_secret_file is not None
    password = ""
    if config.redis_password_file is not None:
        password = _read(config.redis_password_file).decode("utf-8", "replace").strip()
    ca_file = "" if config.redis_ca_file is None else str(config.redis_ca_file)
    try:
        address = parse_address(config.redis, password=password, ca_file=ca_file)
        secret = ClusterSecret(_read(config.redis_secret_file).strip())
        store = Store(address, _log_change, probe_key=secret.prefix + b"probe")
    except AddressError as error:
        raise ConfigError(str(error)) from None
    except SecretError as error:
        raise ConfigError(f"{config.redis_secret_file}: {error}") from None
    hearing = Hearing(placer.fleet, placer.index, journal.router, journal.stamps)
    leases = Leases(store, secret.prefix, b"%d" % journal.router)
    return Link(store, leases, secret, placer.fleet, placer.index, journal, hearing, clock)


def _log_change(is_up: bool, why: str) -> None:
    if is_up:
        _log.info("the store is there")
    else:
        _log.warning("routing goes on without the store: %s", why)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
