"""One page of a replica: asked for, read whole, bounded in size and time. Decides nothing.

A redirect is an answer like any other: nothing is ever asked elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from roost_router.http.head import ResponseHead
from roost_router.http.upstream import Upstream, UpstreamPool

MAX_PAGE_BYTES = 8 << 20


class PageError(ValueError):
    """A replica's answer cannot be used: broken off, too large, or not what was asked for."""


class Page(NamedTuple):
    """What a replica answered."""

    status: int
    body: bytes  # empty unless the status is 200: nobody reads the others


async def get_page(
    pool: UpstreamPool, path: bytes, authorization: str | None, timeout_s: float
) -> Page:
    """GET `path` over one of `pool`'s connections, a kept one first.

    `authorization`: value of the header of that name. Raises PageError; TimeoutError when the
    page has not come after `timeout_s` seconds, dialling included; other OSErrors of dialling,
    of which ConnectionRefusedError says that nobody listens.
    """
    request = get_request(pool, path, authorization)
    async with asyncio.timeout(timeout_s):
        kept = pool.try_idle()
        if kept is not None:
            try:
                return await _ask(kept, request)
            except PageError:
                if not kept.was_stale:
                    raise
        return await _ask(await pool.dial(), request)


def get_request(pool: UpstreamPool, path: bytes, authorization: str | None) -> bytes:
    """A whole request for `path`."""
    key = b"" if authorization is None else b"authorization: %b\r\n" % authorization.encode()
    return b"GET %b%b HTTP/1.1\r\nhost: %b\r\nuser-agent: roost-router\r\n%b\r\n" % (
        pool.base_path,
        path,
        pool.host,
        key,
    )


async def _ask(upstream: Upstream, request: bytes) -> Page:
    listener = _PageListener()
    upstream.send(listener, [request])
    try:
        return await listener.page
    finally:
        if not listener.is_over:
            upstream.abandon()


class _PageListener:
    """Hears one answer, up to what can be used of it."""

    def __init__(self) -> None:
        self.page: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        self.is_over = False  # the connection is the pool's again, or gone
        self._status = 0
        self._body = bytearray()

    def on_head(self, head: ResponseHead) -> None:
        self._status = head.status
        if head.status != 200:
            self._finish()

    def on_answer(self, head: ResponseHead, body: bytes) -> None:
        self.on_head(head)
        self.on_body(body)
        self.on_end()

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:  # noqa: ARG002
        if self.page.done():
            return
        self._body += data
        if len(self._body) > MAX_PAGE_BYTES:
            self.page.set_exception(PageError(f"the page exceeds {MAX_PAGE_BYTES} bytes"))

    def on_end(self) -> None:
        self.is_over = True
        self._finish()

    def on_lost(self, reason: str) -> None:
        self.is_over = True
        if not self.page.done():
            self.page.set_exception(PageError(reason))

    def _finish(self) -> None:
        if not self.page.done():
            self.page.set_result(Page(self._status, bytes(self._body)))
