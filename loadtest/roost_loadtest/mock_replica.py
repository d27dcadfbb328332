"""The cheapest replica there can be: canned answers over raw protocols, for proxy benchmarks.

`python -m roost_loadtest.mock_replica PORT`. Answers any POST with the same 350-byte completion
as soon as its body is complete, so that what a benchmark measures is the proxy before it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import httptools
import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "mock"


def _json(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


_MODELS = _json(b'{"object":"list","data":[{"id":"mock","object":"model"}]}')
_METRICS = _json(b'vllm:cache_config_info{block_size="16",num_gpu_blocks="30000"} 1\n')
_ANSWER = _json(
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1,"model":"mock","choices":[{"index":'
    b'0,"message":{"role":"assistant","content":"' + b"word " * 20 + b'"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":500,"completion_tokens":20,"total_tokens":520}}'
)


class _Connection(asyncio.Protocol):
    """One client of the mock."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write: Callable[[bytes], None] = transport.write  # type: ignore[attr-defined]
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._target = url

    def on_message_complete(self) -> None:
        if self._target == b"/v1/models":
            self._write(_MODELS)
        else:
            self._write(_METRICS if self._target == b"/metrics" else _ANSWER)


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
