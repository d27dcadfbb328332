"""The data plane of one router process: routes paths, shares pools, owns the listener.

Paths are denied by default: four are served, none of them administers anything. With keys in
use (gate.py) every path asks for one, also those that do not exist.

    POST /v1/chat/completions, /v1/completions, /v1/embeddings   an Exchange with a replica
    GET  /v1/models, /v1/models/{id}     answered here, the union of all replicas
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable
from math import ceil
from random import Random
from typing import cast
from urllib.parse import unquote

import msgspec

from roost_router.access import Access
from roost_router.config import RouterConfig
from roost_router.discovery.follow import Discovery
from roost_router.dispatch import Dispatcher
from roost_router.errors import (
    EncodingError,
    MethodNotAllowedError,
    ModelNotFoundError,
    OverloadError,
    PathNotFoundError,
    RouterError,
)
from roost_router.fleet.replica import Replica
from roost_router.http.downstream import Downstream
from roost_router.http.exchange import Exchange
from roost_router.http.gate import Gate
from roost_router.http.head import REQUEST_ID
from roost_router.http.ready import Ready, error_headers, whole_answer
from roost_router.http.record import RequestRecord
from roost_router.http.request_ids import RequestIds
from roost_router.http.serving import Answering, Request
from roost_router.http.upstream import UpstreamPool
from roost_router.kv.follow import KvFollower
from roost_router.listening import BACKLOG
from roost_router.metrics import RouterMetrics
from roost_router.openai_request import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    EMBEDDINGS_PATH,
    read_routing_fields,
)
from roost_router.placement import Placement, Placer
from roost_router.policy.late_binding import LOOK_INTERVAL_S, MIN_LOOK_S
from roost_router.quotas import Charge, Quotas
from roost_router.receipts import Receipts
from roost_router.tokens.prompts import PromptTokens

_MODELS_PATH = "/v1/models"
_EXCHANGES = frozenset({CHAT_PATH, COMPLETIONS_PATH, EMBEDDINGS_PATH})
#: How often time is looked at, in seconds: half a second's limit is kept to a tenth.
_SWEEP_S = 0.1
#: Every so many of these looks, connections are looked at: their limits are of many seconds.
_SWEEPS_A_CHECK = 10
#: Failed requests told one by one between two of these; the rest as a number. A fleet that is
#: down must not fill a disk.
_MAX_FAILURES_LOGGED = 10
#: Seconds without a request after which a drain closes a connection: a client that was not told
#: that its connection ends may send the next one at any time, most of them soon or not at all.
_QUIET_S = 1.0
#: Seconds for what the last words to clients take to be sent.
_FLUSH_S = 0.5
#: File descriptors for all else: idle connections to replicas, polls, the admin port, libraries.
_OTHER_FILES = 192
_MANY_FILES = 1 << 20
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
        self.dispatcher: Dispatcher[Exchange] = Dispatcher(placer, rng, config.max_held)
        self.metrics = metrics
        metrics.watch_held(self.dispatcher, placer.fleet)
        self.receipts = Receipts()
        self.tokens: PromptTokens | None = None  # where KV events are followed
        self.follower: KvFollower | None = None  # likewise
        self.discovery: Discovery | None = None  # where replicas may join and leave
        self.now: Callable[[], float] = now
        self.max_body_bytes = config.max_body_bytes
        self.is_draining = False
        self._ids = RequestIds(os.urandom)
        self.access = Access(config, now)
        self._quotas: Quotas = self.access.quotas
        needs_gate = config.asks_for_keys or config.replica_key_file is not None
        self._gate = Gate(self.access) if needs_gate else None
        # Dictionaries for their order: what is done to many at once is done in order of arrival.
        self._connections: dict[Downstream, object] = {}  # with the client's address
        self._num_from: Counter[object] = Counter()  # connections of each address
        self._max_connections = min(config.max_connections, _max_connections())
        self._num_sweeps = 0
        self._num_failed = 0  # requests, since connections were last looked at
        self._all_closed = asyncio.Event()
        self._exchanges: dict[Exchange, Charge] = {}
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._next_look: asyncio.TimerHandle | None = None
        self._look_at = self._looked_at = 0.0  # when that is, and when the last was
        self._loop = loop
        self._pools: dict[str, UpstreamPool] = {}
        placer.fleet.watch(self)

    @property
    def num_exchanges(self) -> int:
        """Requests being served."""
        return len(self._exchanges)

    def joined(self, replica: Replica) -> None:
        """A replica was added to the fleet."""
        timeout_s = self.limits.connect_timeout_s
        self._pools[replica.name] = UpstreamPool(replica.url, self._loop, timeout_s)

    def gone(self, replica: Replica) -> None:
        """It was removed, and its last request is over."""
        self._pools.pop(replica.name).close()

    def pool(self, replica: Replica) -> UpstreamPool:
        """Connections to `replica`."""
        return self._pools[replica.name]

    async def listen(self, sock: socket.socket) -> None:
        """Accept clients on `sock`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: cast("asyncio.Protocol", Downstream(self)), sock=sock, backlog=BACKLOG
        )
        self.watch()

    def watch(self) -> None:
        """Look after time from now on: deadlines, stalled replicas."""
        self._sweep = asyncio.get_running_loop().call_later(_SWEEP_S, self.watch)
        now = self.now()
        for exchange in [e for e in self._exchanges if e.is_due(now)]:
            exchange.expire(now)
        self._num_sweeps += 1
        if self._num_sweeps % _SWEEPS_A_CHECK == 0:
            self.check_connections(now)
            self.metrics.prune(self.placer.fleet, now)
            if self._num_failed > _MAX_FAILURES_LOGGED:
                _log.warning("%d more requests failed", self._num_failed - _MAX_FAILURES_LOGGED)
            self._num_failed = 0

    def look_soon(self) -> None:
        """A request is held: look every LOOK_INTERVAL_S from now on, until none is."""
        if self._next_look is None:
            self._plan_look(self.now(), LOOK_INTERVAL_S)

    def released(self, now: float) -> None:
        """A replica has less to do: look at what is held as soon as may be."""
        if self._next_look is None:
            return
        delay_s = max(0.0, self._looked_at + MIN_LOOK_S - now)
        if now + delay_s < self._look_at:
            self._next_look.cancel()
            self._plan_look(now, delay_s)

    def _plan_look(self, now: float, delay_s: float) -> None:
        self._look_at = now + delay_s
        self._next_look = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        self._next_look = None
        self._looked_at = now = self.now()
        try:
            for exchange, taken in self.dispatcher.look(now):
                if isinstance(taken, Placement):
                    exchange.bind(taken)
                else:
                    exchange.refuse(taken)
        finally:
            if self.dispatcher.num_held:
                self.look_soon()

    def check_connections(self, now: float) -> None:
        """End connections whose clients take too long."""
        for connection in list(self._connections):
            connection.check(now)

    def keeps_alive(self, request: Request) -> bool:
        """What an answer that begins now says of its connection."""
        return request.keep_alive and not self.is_draining

    def stop_accepting(self) -> None:
        """Leave new connections to whoever else holds the listening socket, if anybody."""
        if self._server is not None:
            self._server.close()

    async def drain(self, grace_s: float) -> None:
        """Stop accepting, let requests finish for up to `grace_s` seconds, close the rest.

        Meanwhile kept connections are served, each answer saying that its connection ends. Those
        that stay without a request for _QUIET_S are closed.
        """
        self.is_draining = True
        self.stop_accepting()
        idle: dict[Downstream, tuple[int, float]] = {}
        until = self.now() + grace_s
        while self._connections and self.now() < until:
            self._close_quiet(idle)
            await self._until_all_closed(min(_SWEEP_S, until - self.now()))
        for exchange in list(self._exchanges):
            exchange.stop()
        for connection in list(self._connections):
            connection.close()
        await self._until_all_closed(_FLUSH_S)
        for pool in self._pools.values():
            pool.close()
        if self._sweep is not None:
            self._sweep.cancel()
        if self._next_look is not None:
            self._next_look.cancel()

    def _close_quiet(self, idle: dict[Downstream, tuple[int, float]]) -> None:
        """Close who has been idle for _QUIET_S. `idle`: since when each is, and after how many."""
        now = self.now()
        for connection in [c for c in self._connections if c.is_idle]:
            num_served, since = idle.setdefault(connection, (connection.num_served, now))
            if num_served != connection.num_served:
                idle[connection] = (connection.num_served, now)
            elif now - since >= _QUIET_S:
                connection.close()

    async def _until_all_closed(self, limit_s: float) -> None:
        """Wait until no connection is left, for up to `limit_s` seconds."""
        self._all_closed.clear()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._all_closed.wait()

    def opened(self, client: Downstream, address: object) -> RouterError | None:
        """A client connected from `address`; an error if it is one too many."""
        self._connections[client] = address
        self._num_from[address] += 1
        if len(self._connections) > self._max_connections:
            whose = "this router"
        elif self._num_from[address] > self.limits.max_connections_per_address:
            whose = "your address"
        else:
            return None
        self.metrics.refused(OverloadError.status)
        return OverloadError(f"{whose} has too many connections", code="too_many_connections")

    def closed(self, client: Downstream) -> None:
        """A client is gone."""
        address = self._connections.pop(client)
        self._num_from[address] -= 1
        if not self._num_from[address]:
            del self._num_from[address]
        if not self._connections:
            self._all_closed.set()

    def answer(self, client: Downstream, request: Request) -> Answering:
        """Route a request to what will answer it."""
        try:
            if self._gate is not None:
                request = self._gate.admit(request)
            path = request.head.path.decode("ascii")
            if path in _EXCHANGES:
                return self._exchange(client, request, path)
            if path == _MODELS_PATH or path.startswith(_MODELS_PATH + "/"):
                _require(request, path, b"GET")
                body, headers = self._models(path), [(b"content-type", b"application/json")]
                keep_alive = self.keeps_alive(request)
                answer = whole_answer(request, 200, headers, body, keep_alive=keep_alive)
                return Ready(client, answer, keep_alive=keep_alive)
            raise PathNotFoundError(path)
        except UnicodeDecodeError:
            return self._refusal(client, request, PathNotFoundError("not ASCII"))
        except RouterError as error:
            return self._refusal(client, request, error)

    def request_id(self, request: Request) -> bytes:
        """The client's request id if it is fit to be one, else a fresh one."""
        return request.head.request_id or self._ids.next()

    def send_error(
        self, client: Downstream, request: Request, error: RouterError, request_id: bytes
    ) -> None:
        """Write a whole error answer."""
        client.write(self._error(request, error, request_id))

    def _error(self, request: Request, error: RouterError, request_id: bytes) -> bytes:
        headers = [*error_headers(error), (REQUEST_ID, request_id)]
        keep_alive = self.keeps_alive(request)
        return whole_answer(request, error.status, headers, error.body(), keep_alive=keep_alive)

    def ended(self, exchange: Exchange, record: RequestRecord) -> None:
        """An exchange is over."""
        self._settle(self._exchanges.pop(exchange, None), record)
        self.released(record.started_at + record.duration_s)
        is_known = record.replica is not None or self.placer.fleet.knows(record.model)
        self.metrics.observe(record, known_model=is_known)
        self.receipts.add(record)
        if record.status >= 500 or record.outcome == "cut":
            self._num_failed += 1
            if self._num_failed > _MAX_FAILURES_LOGGED:
                return
            _log.warning(
                "request failed: outcome=%s status=%d replica=%s attempts=%d",
                record.outcome,
                record.status,
                record.replica,
                record.attempts,
            )

    def _exchange(self, client: Downstream, request: Request, path: str) -> Exchange:
        _require(request, path, b"POST")
        encoding = request.head.content_encoding
        if encoding is not None and encoding.lower() != b"identity":
            raise EncodingError(encoding.decode("latin-1"))
        if len(self._exchanges) >= self.limits.max_requests:
            raise OverloadError("this router serves too many requests", code="too_many_requests")
        fields = read_routing_fields(path, request.body)
        num_tokens = ceil(len(fields.prompt) / self.placer.fleet.bytes_per_token(fields.model))
        charge = self._quotas.charge(request.head.tenant, num_tokens, self.now())
        exchange = Exchange(self, client, request, fields)
        self._exchanges[exchange] = charge
        return exchange

    def _settle(self, charge: Charge | None, record: RequestRecord) -> None:
        """What a request cost is known."""
        if charge is None:
            return
        if record.replica is None:
            self._quotas.give_back(charge)
        else:
            self._quotas.settle(charge, record.prompt_tokens)

    def _refusal(self, client: Downstream, request: Request, error: RouterError) -> Answering:
        self.metrics.refused(error.status)
        answer = self._error(request, error, self.request_id(request))
        return Ready(client, answer, keep_alive=self.keeps_alive(request))

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


def _max_connections() -> int:
    """Connections of clients for which there are file descriptors, each with one to a replica.

    Beyond, dialling would fail, and look as if replicas were unreachable.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse what they promise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _MANY_FILES if soft == resource.RLIM_INFINITY else soft
    return max(1, (files - _OTHER_FILES) // 2)


def _require(request: Request, path: str, method: bytes) -> None:
    if request.method != method:
        raise MethodNotAllowedError(request.method.decode("latin-1"), path, method.decode())
