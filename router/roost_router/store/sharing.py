"""Builds what connects a router with the others: store, secret, link. Holds no choices."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from roost_router.config import ConfigError, RouterConfig
from roost_router.placement import Placer
from roost_router.shared.hearing import Hearing
from roost_router.store.address import AddressError, parse_address
from roost_router.store.client import Store
from roost_router.store.feeder import MAX_BLOCKS, Feeder
from roost_router.store.index import RedisIndex
from roost_router.store.leases import Leases
from roost_router.store.link import Link
from roost_router.store.secret import ClusterSecret, SecretError

_log = logging.getLogger(__name__)


class Cluster(NamedTuple):
    """Where routers meet, and what they have in common."""

    store: Store
    secret: ClusterSecret


def open_cluster(
    url: str, secret_file: Path, password_file: Path | None, ca_file: Path | None
) -> Cluster:
    """The store that the options name, not started yet. Raises ConfigError."""
    password = ""
    if password_file is not None:
        password = _read(password_file).decode("utf-8", "replace").strip()
    try:
        address = parse_address(
            url, password=password, ca_file="" if ca_file is None else str(ca_file)
        )
        secret = ClusterSecret(_read(secret_file).strip())
        store = Store(address, _log_change, probe_key=secret.prefix + b"probe")
    except AddressError as error:
        raise ConfigError(str(error)) from None
    except SecretError as error:
        raise ConfigError(f"{secret_file}: {error}") from None
    return Cluster(store, secret)


def cluster_of(config: RouterConfig) -> Cluster:
    """Of a router with `config.redis`. Raises ConfigError."""
    assert config.redis is not None
    assert config.redis_secret_file is not None
    return open_cluster(
        config.redis, config.redis_secret_file, config.redis_password_file, config.redis_ca_file
    )


def make_link(cluster: Cluster, placer: Placer, clock: Callable[[], float]) -> Link:
    """The link of a router that has a journal."""
    journal = placer.journal
    assert journal is not None
    store, secret = cluster
    hearing = Hearing(placer.fleet, placer.index, journal.router, journal.stamps)
    leases = Leases(store, secret.prefix, b"%d" % journal.router)
    index = RedisIndex(store, secret.prefix, max_blocks=MAX_BLOCKS)
    feeder = Feeder(index, secret, placer.fleet, placer.index, placer.told, clock)
    return Link(store, leases, secret, placer.fleet, placer.index, journal, hearing, feeder, clock)


def _log_change(is_up: bool, why: str) -> None:
    if is_up:
        _log.info("the store is there")
    else:
        _log.warning("the store is away: %s", why)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
