"""Asks all replicas once where they publish KV events."""

from __future__ import annotations

import asyncio
import contextlib

from roost_router.fleet.replica import Replica
from roost_router.http.upstream import UpstreamPool
from roost_router.kv.discovery import discover
from roost_router.kv.source import KvSource

_TIMEOUT_S = 2.0


async def probe(
    replicas: list[Replica], authorization: str | None
) -> dict[str, list[KvSource] | None]:
    """Streams of each replica that is up, by its name; None: it did not say."""
    up = [replica for replica in replicas if replica.is_up]
    found = await asyncio.gather(*(_ask(replica, authorization) for replica in up))
    return {replica.name: sources for replica, sources in zip(up, found, strict=True)}


async def _ask(replica: Replica, authorization: str | None) -> list[KvSource] | None:
    loop = asyncio.get_running_loop()
    with contextlib.closing(UpstreamPool(replica.url, loop, _TIMEOUT_S)) as pool:
        try:
            return await discover(pool, replica.url, replica.dialect, authorization, _TIMEOUT_S)
        except (OSError, ValueError):  # SourceError and PageError are ValueErrors
            return None
