"""The cheapest replica there can be: canned answers over raw protocols, for proxy benchmarks.

`python -m roost_loadtest.mock_replica PORT`. Any POST is answered as soon as its body is complete,
so that what a benchmark measures is the proxy before it:

    a prompt that begins "[stream N chunks, M us apart]"   a stream of N chunks and their end;
                                                           M = 0: as fast as it can,
                                                           each in a write of its own
    any other                                              the same 350-byte completion

The order is in the prompt because that is what every proxy passes on unchanged: some drop headers
and fields they do not know. The text of a chunk is the time at which it was written
(`perf_counter_ns`, one clock for all processes of a machine), so that a client knows its delay.

Not here: tokens, models, errors.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time

import httptools
import uvloop

MODEL = "mock"

STAMP = b'"content":"at '  # what stands before the 20 digits of a chunk's time
STAMP_DIGITS = 20

_ORDER = re.compile(rb"\[stream (\d+) chunks, (\d+) us apart\]")
_LOOKED_AT = 4096  # bytes of a body among which an order is looked for


def stream_order(num_chunks: int, gap_us: int) -> str:
    """What a prompt begins with that asks for a stream."""
    return f"[stream {num_chunks} chunks, {gap_us} us apart]"


def _json(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


_PAGES = {
    b"/v1/models": _json(b'{"object":"list","data":[{"id":"mock","object":"model"}]}'),
    b"/metrics": _json(b'vllm:cache_config_info{block_size="16",num_gpu_blocks="30000"} 1\n'),
}
_HEALTHY = _json(b"{}")
_ANSWER = _json(
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1,"model":"mock","choices":[{"index":'
    b'0,"message":{"role":"assistant","content":"' + b"word " * 20 + b'"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":500,"completion_tokens":20,"total_tokens":520}}'
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1,"model":"mock",'
    b'"choices":[{"index":0,"delta":{%b},"finish_reason":%b}]}\n\n'
)
_TEXT_CHUNK = _chunk(_EVENT % (STAMP + b"0" * STAMP_DIGITS + b'"', b"null"))
_BEFORE, _AFTER = _TEXT_CHUNK.split(b"0" * STAMP_DIGITS)
_END = _chunk(_EVENT % (b"", b'"stop"')) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One client of the mock."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._start = b""  # of the body
        self._left = 0  # chunks still to come
        self._due = 0.0  # when the next one is

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._left = 0

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.close()  # some routers greet in HTTP/2

    def on_url(self, url: bytes) -> None:
        self._target = url
        self._start = b""

    def on_body(self, data: bytes) -> None:
        if len(self._start) < _LOOKED_AT:
            self._start += data[:_LOOKED_AT]

    def on_message_complete(self) -> None:
        if self._parser.get_method() != b"POST":
            self._transport.write(_PAGES.get(self._target, _HEALTHY))
        elif (order := _ORDER.search(self._start)) is None:
            self._transport.write(_ANSWER)
        else:
            self._stream(int(order[1]), int(order[2]) / 1e6)

    def _stream(self, num_chunks: int, gap_s: float) -> None:
        self._transport.write(_STREAM_HEAD)
        self._left, self._due, self._gap_s = num_chunks, self._loop.time(), gap_s
        self._next()

    def _next(self) -> None:
        """Write a chunk; the next is due a gap after this one was, however late this one is.

        Never two in one turn of the loop: uvloop would join their writes.
        """
        if not self._left:
            return
        self._left -= 1
        if not self._left:
            self._transport.write(_text_chunk() + _END)
            return
        self._transport.write(_text_chunk())
        self._due += self._gap_s
        if self._gap_s:
            self._loop.call_at(self._due, self._next)
        else:
            self._loop.call_soon(self._next)


def _text_chunk() -> bytes:
    return b"%b%020d%b" % (_BEFORE, time.perf_counter_ns(), _AFTER)


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
