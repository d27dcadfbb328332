"""Pools for connections that are driven by hand: no loop ever runs."""

from __future__ import annotations

import asyncio

from roost_router.http.upstream import UpstreamPool

_LOOP = asyncio.AbstractEventLoop()  # dials nothing, and holds no descriptors open


def local_pool() -> UpstreamPool:
    """An empty pool of a replica that is never dialled."""
    return UpstreamPool("http://127.0.0.1:1", _LOOP, connect_timeout_s=1.0)
