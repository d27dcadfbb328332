"""A replica that answers completions with exactly the bytes it is told to, for framing tests."""

from __future__ import annotations

import asyncio
import re
from typing import Self

MODELS = b'{"object":"list","data":[{"id":"m"}]}'


def whole(body: bytes, *, head: bytes = b"") -> bytes:
    """A complete JSON answer."""
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        + head
        + b"content-length: %d\r\n\r\n" % len(body)
        + body
    )


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class LocalReplica:
    """Listens on a free port of this machine; a subclass says how a connection is served."""

    port = 0
    _server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class RawReplica(LocalReplica):
    """`script`: what to write for each completion request; None among the bytes resets."""

    def __init__(self, *script: list[bytes | None]) -> None:
        self.script = list(script)
        self.num_requests = 0
        self.num_connections = 0  # that carried a completion
        self.heads: list[bytes] = []
        self.models = MODELS
        self.metrics = b""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_counted = False
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if length := re.search(rb"content-length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
                if head.startswith(b"POST") and not is_counted:
                    is_counted = True
                    self.num_connections += 1
                if not await self._answer(head, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> bool:
        if head.startswith(b"GET /v1/models"):
            writer.write(whole(self.models))
            return True
        if head.startswith(b"GET /metrics"):
            writer.write(whole(self.metrics))
            return True
        self.heads.append(head)
        answer = self.script[min(self.num_requests, len(self.script) - 1)]
        self.num_requests += 1
        for part in answer:
            if part is None:
                await asyncio.sleep(0.05)  # what was written arrives before the reset
                writer.transport.abort()
                return False
            writer.write(part)
            await writer.drain()
        return True
