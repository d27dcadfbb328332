"""The data plane of one router process: routes paths, shares pools, owns the listener.

Paths are denied by default: three are served, none of them administers anything.

    POST /v1/chat/completions, /v1/completions   an Exchange with a replica
    GET  /v1/models, /v1/models/{id}             answered here, the union of all replicas
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from random import Random
from urllib.parse import unquote

import msgspec

from roost_router.config import RouterConfig
from roost_router.errors import (
    EncodingError,
    MethodNotAllowedError,
    ModelNotFoundError,
    PathNotFoundError,
    RouterError,
)
from roost_router.fleet.replica import Replica
from roost_router.http.downstream import Answering, Downstream, Request
from roost_router.http.exchange import Exchange, RequestRecord
from roost_router.http.head import REQUEST_ID, get_header, response_head, valid_request_id
from roost_router.http.known_heads import KnownHeads, read_known_request
from roost_router.http.upstream import UpstreamPool
from roost_router.metrics import RouterMetrics
from roost_router.openai_request import CHAT_PATH, COMPLETIONS_PATH, read_routing_fields
from roost_router.placement import Placer

_MODELS_PATH = "/v1/models"
#: How often time is looked at, in seconds: half a second's limit is kept to a tenth.
_SWEEP_S = 0.1
_log = logging.getLogger(__name__)


class DataService:
    """Everything that the connections of the data port share."""

    def __init__(
        self,
        config: RouterConfig,
        placer: Placer,
        metrics: RouterMetrics,
        now: Callable[[], float],
        rng: Random,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.limits = config
        self.rng = rng
        self.placer = placer
        self.metrics = metrics
        self.now = now
        self.max_body_bytes = config.max_body_bytes
        self.is_draining = False
        self.heads = KnownHeads(read_known_request)
        self._connections: set[Downstream] = set()
        self._all_closed = asyncio.Event()
        self._exchanges: set[Exchange] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._pools = {
            replica.name: UpstreamPool(replica.url, loop, config.connect_timeout_s)
            for replica in placer.fleet.replicas
        }

    @property
    def num_exchanges(self) -> int:
        """Requests being served."""
        return len(self._exchanges)

    def pool(self, replica: Replica) -> UpstreamPool:
        """Connections to `replica`."""
        return self._pools[replica.name]

    async def listen(self, sock: socket.socket) -> None:
        """Accept clients on `sock`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Downstream(self), sock=sock, backlog=2048)
        self.watch()

    def watch(self) -> None:
        """Look after time from now on: deadlines, stalled replicas."""
        self._sweep = asyncio.get_running_loop().call_later(_SWEEP_S, self.watch)
        now = self.now()
        for exchange in [e for e in self._exchanges if e.is_due(now)]:
            exchange.expire(now)

    async def drain(self, grace_s: float) -> None:
        """Stop accepting, let streams finish for up to `grace_s` seconds, close the rest."""
        self.is_draining = True
        if self._server is not None:
            self._server.close()
        for connection in [c for c in self._connections if c.is_idle]:
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._connections:
                    self._all_closed.clear()
                    await self._all_closed.wait()
        for connection in list(self._connections):
            connection.close()
        for pool in self._pools.values():
            pool.close()
        if self._sweep is not None:
            self._sweep.cancel()

    def opened(self, client: Downstream) -> None:
        """A client connected."""
        self._connections.add(client)

    def closed(self, client: Downstream) -> None:
        """A client is gone."""
        self._connections.discard(client)
        if not self._connections:
            self._all_closed.set()

    def answer(self, client: Downstream, request: Request) -> Answering:
        """Route a request to what will answer it."""
        try:
            path = request.target.partition(b"?")[0].decode("ascii")
            if path in {CHAT_PATH, COMPLETIONS_PATH}:
                return self._exchange(client, request, path)
            if path == _MODELS_PATH or path.startswith(_MODELS_PATH + "/"):
                _require(request, path, b"GET")
                body, headers = self._models(path), [(b"content-type", b"application/json")]
                return _Ready(client, request, lambda: _send(client, request, 200, headers, body))
            raise PathNotFoundError(path)
        except UnicodeDecodeError:
            return self._refusal(client, request, PathNotFoundError("not ASCII"))
        except RouterError as error:
            return self._refusal(client, request, error)

    def request_id(self, request: Request) -> bytes:
        """The client's request id if it is fit to be one, else a fresh one."""
        given = get_header(request.headers, REQUEST_ID)
        if given is not None and valid_request_id(given):
            return given
        return b"req-" + os.urandom(16).hex().encode()

    def send_error(
        self, client: Downstream, request: Request, error: RouterError, request_id: bytes
    ) -> None:
        """Write a whole error answer."""
        headers = [
            (b"content-type", b"application/json"),
            (REQUEST_ID, request_id),
        ]
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after_s))
        if error.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
        if isinstance(error, MethodNotAllowedError):
            headers.append((b"allow", error.allowed.encode()))
        _send(client, request, error.status, headers, error.body())

    def ended(self, exchange: Exchange, record: RequestRecord) -> None:
        """An exchange is over."""
        self._exchanges.discard(exchange)
        self.metrics.observe(record, known_model=self.placer.fleet.knows(record.model))
        if record.status >= 500 or record.outcome.value == "cut":
            _log.warning(
                "request failed: outcome=%s status=%d replica=%s attempts=%d",
                record.outcome.value,
                record.status,
                record.replica,
                record.attempts,
            )

    def _exchange(self, client: Downstream, request: Request, path: str) -> Exchange:
        _require(request, path, b"POST")
        encoding = get_header(request.headers, b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            raise EncodingError(encoding.decode("latin-1"))
        exchange = Exchange(self, client, request, read_routing_fields(path, request.body))
        self._exchanges.add(exchange)
        return exchange

    def _refusal(self, client: Downstream, request: Request, error: RouterError) -> Answering:
        self.metrics.refused(error.status)
        request_id = self.request_id(request)
        return _Ready(client, request, lambda: self.send_error(client, request, error, request_id))

    def _models(self, path: str) -> bytes:
        served = self.placer.fleet.models()
        entries = [
            {"id": model, "object": "model", "created": 0, "owned_by": "roost-router"}
            for model in sorted(served)
        ]
        wanted = unquote(path.removeprefix(_MODELS_PATH).removeprefix("/"))
        if not wanted:
            return msgspec.json.encode({"object": "list", "data": entries})
        for entry in entries:
            if entry["id"] == wanted:
                return msgspec.json.encode(entry)
        raise ModelNotFoundError(wanted, sorted(served))


class _Ready:
    """An answer that is known at once."""

    def __init__(self, client: Downstream, request: Request, send: Callable[[], None]) -> None:
        self._client = client
        self._request = request
        self._send = send

    def start(self) -> None:
        """Write it."""
        self._send()
        self._client.finish(keep_alive=self._request.keep_alive)

    def client_gone(self) -> None:
        """Nothing is under way."""

    def pause(self) -> None:
        """The answer is written already."""

    def resume(self) -> None:
        """The answer is written already."""


def _require(request: Request, path: str, method: bytes) -> None:
    if request.method != method:
        raise MethodNotAllowedError(request.method.decode("latin-1"), path, method.decode())


def _send(
    client: Downstream,
    request: Request,
    status: int,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
) -> None:
    framing = [b"content-length: %d" % len(body)]
    head = response_head(status, headers, framing=framing, keep_alive=request.keep_alive)
    client.write(head + (b"" if request.method == b"HEAD" else body))
