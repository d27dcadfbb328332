"""A replica that records every byte it gets, apart from the router's own polls."""

from __future__ import annotations

import asyncio
import contextlib
import re

from raw_replica import MODELS, LocalReplica, whole

#: The first bytes of a poll: the router's own request, which names itself.
_POLL = re.compile(
    rb"GET /(v1/models|metrics) HTTP/1\.1\r\n(?:[^\r\n]+\r\n)*?user-agent: roost-router\r\n"
)
_ANSWER = whole(b'{"object":"text_completion","choices":[]}')


class RecordingReplica(LocalReplica):
    """Answers 200 to each `content-length` request; `received` holds a connection an item."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []

    def take(self) -> bytes:
        """All that came since the last call, of all connections."""
        taken = b"".join(self.received)
        for connection in self.received:
            connection.clear()
        return taken

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unread = bytearray()
        record: bytearray | None = None
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                unread += data
                if record is None and not _POLL.match(unread):
                    record = bytearray()
                    self.received.append(record)
                if record is not None:
                    record += data
                while (end := _request_end(unread)) is not None:
                    is_poll, models = _POLL.match(unread), unread.startswith(b"GET /v1/models")
                    del unread[:end]
                    writer.write(whole(MODELS if models else b"") if is_poll else _ANSWER)
        writer.close()


def _request_end(data: bytearray) -> int | None:
    """Where the first request ends, or None while it is incomplete."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return None
    length = re.search(rb"\r\ncontent-length: (\d+)", data[:head])
    end = head + 4 + (int(length[1]) if length else 0)
    return end if len(data) >= end else None
