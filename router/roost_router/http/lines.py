"""An answer that goes on, line by line, as it comes: asked for over a connection of its own.

Bounded: a line has up to MAX_LINE_BYTES, and who reads slower than lines come holds up the sender.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

from roost_router.http.head import ResponseHead
from roost_router.http.page import PageError, get_request
from roost_router.http.upstream import Upstream, UpstreamPool

MAX_LINE_BYTES: Final = 4 << 20
#: Lines that wait to be read before the sender is held up.
_MAX_WAITING: Final = 256


class StatusError(PageError):
    """The answer is none: another status than 200."""

    def __init__(self, status: int) -> None:
        super().__init__(f"it answered {status}")
        self.status: Final = status


async def get_lines(
    pool: UpstreamPool, path: bytes, authorization: str | None, silence_s: float
) -> AsyncGenerator[bytes, None]:
    """Lines of what `path` answers, without their ends, until it ends.

    Raises StatusError and other PageErrors; TimeoutError after `silence_s` seconds without a line;
    other OSErrors of dialling.
    """
    upstream = await pool.dial()
    lines = _Lines(upstream)
    upstream.send(lines, [get_request(pool, path, authorization)])
    try:
        while True:
            async with asyncio.timeout(silence_s):
                line = await lines.next()
            if line is None:
                return
            yield line
    finally:
        if not lines.is_over:
            upstream.abandon()


class _Lines:
    """Hears one answer, and cuts it."""

    def __init__(self, upstream: Upstream) -> None:
        self.is_over = False
        self._upstream: Final = upstream
        self._waiting: deque[bytes] = deque()
        self._rest = b""  # of a line that has not ended
        self._error: PageError | None = None
        self._has_news = asyncio.Event()
        self._is_paused = False

    async def next(self) -> bytes | None:
        """The next line; None: there is none left. Raises PageError."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self.is_over:
                return None
            if self._is_paused:
                self._is_paused = False
                self._upstream.resume()
            self._has_news.clear()
            await self._has_news.wait()
        return self._waiting.popleft()

    def on_head(self, head: ResponseHead) -> None:
        if head.status != 200:
            self._fail(StatusError(head.status))

    def on_answer(self, head: ResponseHead, body: bytes) -> None:
        self.on_head(head)
        self.on_body(body)
        self.on_end()

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:  # noqa: ARG002
        if self._error is not None:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._waiting.extend(line for line in lines if line.strip())
        if len(self._rest) > MAX_LINE_BYTES:
            self._fail(PageError(f"a line exceeds {MAX_LINE_BYTES} bytes"))
        elif len(self._waiting) > _MAX_WAITING and not self._is_paused:
            self._is_paused = True
            self._upstream.pause()
        self._has_news.set()

    def on_end(self) -> None:
        self.is_over = True
        if self._rest.strip() and self._error is None:
            self._waiting.append(self._rest)
        self._has_news.set()

    def on_lost(self, reason: str) -> None:
        self.is_over = True
        self._fail(PageError(reason))

    def _fail(self, error: PageError) -> None:
        if self._error is None:
            self._error = error
        self._has_news.set()
