"""A replica that streams words (fault_words.py) and fails as it is told.

GET answers (/health, /v1/models, /metrics ...) stay 200 whatever the fault is: the failure that
health checks do not see. Raw asyncio protocols; a reset is a real RST (SO_LINGER 0).

Not here: which faults when (fault_matrix.py).
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from enum import Enum

import httptools
import msgspec

from roost_loadtest.fault_words import MODEL, Dialect, RefusedError, Work
from roost_wire import headers, resume

_LINGER_0 = struct.pack("ii", 1, 0)


class Fault(Enum):
    """What happens to a request; the value is the row of the table."""

    NONE = "none"
    DEAD = "dead (refused)"
    RST_PRE = "RST before headers"
    FIN_PRE = "FIN before headers"
    STATUS_500 = "500"
    STATUS_503 = "503"
    STATUS_429 = "429"
    HANG_PRE = "hang before headers"
    RST_HEAD = "RST after headers, no event"
    HANG_HEAD = "hang after headers, no event"
    RST_MID = "RST mid-stream"
    FIN_MID = "FIN mid-stream"
    EOF_MID = "clean EOF, no [DONE]"
    ERROR_MID = "SSE error mid-stream"
    HANG_MID = "hang mid-stream"
    RST_END = "RST after finish_reason"


_STATUS = {Fault.STATUS_500: 500, Fault.STATUS_503: 503, Fault.STATUS_429: 429}
_MID = {Fault.RST_MID, Fault.FIN_MID, Fault.EOF_MID, Fault.ERROR_MID, Fault.HANG_MID}


class FaultyReplica:
    """One replica in this process; `fault` may change at any time."""

    def __init__(self, dialect: Dialect, *, first_s: float = 0.01, pace_s: float = 0.004) -> None:
        """first_s: from the request to the first token; pace_s: between tokens."""
        self.dialect: Dialect = dialect
        self.first_s = first_s
        self.pace_s = pace_s
        self.fault = Fault.NONE
        self.every = 1  # the fault meets every so-many-th request
        self.num_requests = 0
        self.num_hits = 0  # requests that met a fault
        self.num_resumed = 0  # requests that continue an answer
        self.aborted_at: list[float] = []  # time.monotonic() when a request's client went away
        self.connections: set[_Connection] = set()
        self.port = 0
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Where routers find it."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> FaultyReplica:
        """Listen on a free port, the same one every time."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """As if the process had died: no listener, all connections reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.reset()
        await asyncio.sleep(0)


class _Connection(asyncio.Protocol):
    """One client of a replica: one request at a time."""

    def __init__(self, replica: FaultyReplica) -> None:
        self._replica = replica
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._begin()
        self._replica.connections.add(self)

    def _begin(self) -> None:
        self._target = b""
        self._body = b""
        self._headers: dict[bytes, bytes] = {}

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self._replica.connections.discard(self)
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._replica.aborted_at.append(time.monotonic())

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._whole(*_page(self._target, self._replica.dialect))
        elif self._target.endswith(b"/chat/completions"):
            self._task = asyncio.ensure_future(self._answer())
            return
        else:
            self._whole(404, b'{"error":{"message":"no such path"}}')
        self._begin()

    def reset(self) -> None:
        """RST, whatever is buffered."""
        sock: socket.socket = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        self._transport.abort()

    async def _answer(self) -> None:
        replica = self._replica
        replica.num_requests += 1
        fault = replica.fault if replica.num_requests % replica.every == 0 else Fault.NONE
        replica.num_hits += fault is not Fault.NONE
        body = msgspec.json.decode(self._body)
        reports = replica.dialect == "roost" and self._headers.get(b"x-roost-resumable") == b"1"
        self._begin()
        if fault in _STATUS:
            message = b'{"error":{"message":"told to fail","type":"server_error","code":null}}'
            self._whole(_STATUS[fault], message)
            return
        try:
            answer_id = f"chatcmpl-{replica.port}-{replica.num_requests}"
            work = Work(answer_id, body, replica.dialect, reports=reports)
        except RefusedError as error:
            message = msgspec.json.encode({"error": {"message": str(error), "code": 400}})
            self._whole(400, message)
            return
        replica.num_resumed += work.is_resumed
        if fault is Fault.HANG_PRE:
            await asyncio.Event().wait()
        await asyncio.sleep(replica.first_s)
        if fault is Fault.RST_PRE:
            self.reset()
        elif fault is Fault.FIN_PRE:
            self._transport.close()
        else:
            await self._stream(work, fault)

    async def _stream(self, work: Work, fault: Fault) -> None:
        """The whole answer, or as much of it as the fault lets pass."""
        # Another place for every hit: after the first event, before the last, all between.
        last = max(1, len(work.events) - 1)
        stop_at = 1 + self._replica.num_hits * 7 % last if fault in _MID else None
        self._write(_stream_head(work))
        if fault is Fault.HANG_HEAD:
            await asyncio.Event().wait()
        if fault is Fault.RST_HEAD:
            await self._settle()
            self.reset()
            return
        if work.writes_role:
            self._event(work, {"role": "assistant", "content": ""})
        for number, (ids, text) in enumerate(work.events):
            if number == stop_at:
                await self._fail(work, fault, number)
                return
            self._event(work, {"content": text}, token_ids=ids)
            await asyncio.sleep(self._replica.pace_s)
        self._event(work, {}, finish="length")
        if fault is Fault.RST_END:
            await self._settle()
            self.reset()
            return
        if work.has_usage:
            self._usage(work)
        self._chunk(b"data: [DONE]\n\n")
        self._write(b"0\r\n\r\n")

    async def _fail(self, work: Work, fault: Fault, number: int) -> None:
        if fault is Fault.HANG_MID:
            await asyncio.Event().wait()
        if fault is Fault.ERROR_MID:
            error = (
                b'{"error":{"message":"the engine died","type":"InternalServerError","code":500}}'
            )
            self._chunk(b"data: " + error + b"\n\n")
            if self._replica.dialect == "vllm":  # it does so after an error, too
                self._chunk(b"data: [DONE]\n\n")
        if fault in {Fault.ERROR_MID, Fault.EOF_MID}:
            self._write(b"0\r\n\r\n")
            return
        if self._replica.num_hits % 2:  # half of the losses come in the middle of an event
            ids, text = work.events[number]
            self._chunk(_encode(work, {"content": text}, None, ids)[:-9])
        await self._settle()
        if fault is Fault.RST_MID:
            self.reset()
        else:
            self._transport.close()

    async def _settle(self) -> None:
        """Let what was written arrive before a reset discards it."""
        await asyncio.sleep(0.003)

    def _event(
        self,
        work: Work,
        delta: dict[str, str],
        *,
        finish: str | None = None,
        token_ids: list[int] | None = None,
    ) -> None:
        self._chunk(_encode(work, delta, finish, token_ids or []))

    def _usage(self, work: Work) -> None:
        usage = {
            "prompt_tokens": work.prompt_tokens,
            "completion_tokens": sum(len(ids) for ids, _ in work.events) + work.counted,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]  # type: ignore[operator]
        event = {"id": work.id, "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        encoded = msgspec.json.encode(event | {"choices": [], "usage": usage})
        self._chunk(b"data: " + encoded + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def _whole(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._write(head % (status, len(body)) + body)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


def _stream_head(work: Work) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    if work.reports:
        head += f"{resume.SEED}: {work.seed}\r\n".encode()
        head += f"{headers.PROMPT_TOKENS}: {work.prompt_tokens}\r\n".encode()
        head += f"{headers.CACHED_TOKENS}: 0\r\n".encode()
    return head + b"\r\n"


def _encode(work: Work, delta: dict[str, str], finish: str | None, token_ids: list[int]) -> bytes:
    event = {
        "id": work.id,
        "object": "chat.completion.chunk",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    comment = resume.comment(token_ids) if work.reports else b""
    return comment + b"data: " + msgspec.json.encode(event) + b"\n\n"


def _page(target: bytes, dialect: Dialect) -> tuple[int, bytes]:
    """What monitoring sees: a healthy engine."""
    if target == b"/v1/models":
        return 200, msgspec.json.encode(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": dialect}]}
        )
    if target == b"/metrics":
        return 200, b'vllm:cache_config_info{block_size="16",num_gpu_blocks="30000"} 1\n'
    if target == b"/version":
        return 200, b'{"version":"0.33.0"}'
    if target.startswith((b"/health", b"/get_", b"/server_info", b"/model_info")):
        return 200, b'{"model_path":"mock","served_model_name":"mock","status":"ok"}'
    return 404, b'{"error":{"message":"no such path"}}'
