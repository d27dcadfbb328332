"""The admin plane, on a port of its own: what operators and orchestrators ask.

GET /health        200 while the process lives (liveness)
GET /ready         200 while requests can be placed, else 503 (readiness); 503 while draining
GET /metrics       Prometheus
GET /fleet         replicas, totals, hit ladder, findings, as JSON (fleet_page.py)
GET /explain/{id}  why the request of that x-request-id went where it went (explanation.py)
POST /explain      where the request in the body would go now; it goes nowhere
GET /              the dashboard: a page, with its files beside it, that shows /fleet

With admin keys, all but the first two and the dashboard ask for one: orchestrators probe without,
and a browser cannot send a key before a page asks for it. The dashboard's files hold no secret.
HEAD is answered wherever GET is: some load balancers probe with it. Every error is in OpenAI's
shape, as on the data port, and connections are bounded as there, in a smaller number: a service
beside the data plane's for the same Downstream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from typing import NamedTuple, cast
from urllib.parse import unquote_to_bytes

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from roost_router.access import Access
from roost_router.compiled import is_compiled
from roost_router.dashboard.files import PAGE_HEADERS, load_files
from roost_router.errors import (
    KeyRequiredError,
    MethodNotAllowedError,
    OverloadError,
    PathNotFoundError,
    ReceiptNotFoundError,
    RouterError,
)
from roost_router.explanation import dry_run, explain
from roost_router.fleet_page import FleetPage, Moment, fleet_page
from roost_router.http.downstream import Downstream
from roost_router.http.head import Headers, get_header
from roost_router.http.ready import Ready, error_headers, whole_answer
from roost_router.http.service import DataService
from roost_router.http.serving import Answering, Request, ServiceLimits
from roost_router.openai_request import guess_path, read_routing_fields
from roost_router.receipts import MAX_RECEIPTS

#: Probes and scrapers are few. service.py leaves file descriptors for so many.
MAX_CONNECTIONS = 64
#: Only POST /explain reads a body: prompts of a million tokens fit.
_MAX_BODY_BYTES = 4 << 20
#: How often connections are looked at, in seconds: their limits are of many.
_CHECK_S = 1.0
#: Seconds for the last answers to be sent.
_FLUSH_S = 0.5
#: Clocks that part by more were not read late: the calendar was set.
_CALENDAR_SET = timedelta(seconds=1)
_EXPLAIN = "/explain/"
_DRY_RUN = "/explain"
_log = logging.getLogger(__name__)


class _Page(NamedTuple):
    body: bytes
    status: int = 200
    content_type: bytes = b"application/json"
    headers: Sequence[tuple[bytes, bytes]] = ()


class AdminService:
    """Everything that the connections of the admin port share."""

    def __init__(self, service: DataService, access: Access, limits: ServiceLimits) -> None:
        """`service`: what the pages tell of. `limits`: how long clients may take."""
        self.limits = limits
        self.max_body_bytes = _MAX_BODY_BYTES
        self.is_draining = False  # told by /ready; the port itself is open until it closes
        self._service = service
        self._access = access
        self._connections: dict[Downstream, None] = {}
        self._all_closed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._check: asyncio.TimerHandle | None = None
        self._epoch = self._clock_epoch()
        self._started_at = service.now()
        self._version = version("roost")
        self._pages: dict[str, Callable[[], _Page]] = {
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/fleet": self._fleet,
        }
        dashboard = {
            path: partial(_Page, body, 200, content_type, PAGE_HEADERS)
            for path, (content_type, body) in load_files().items()
        }
        self._pages.update(dashboard)
        self._open_paths = {"/health", "/ready", *dashboard}

    async def listen(self, sock: socket.socket) -> None:
        """Accept clients on `sock`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: cast("asyncio.Protocol", Downstream(self)), sock=sock, backlog=MAX_CONNECTIONS
        )
        self._watch()

    async def close(self) -> None:
        """Stop listening and end connections, answers sent. Again: nothing."""
        if self._server is not None:
            self._server.close()
        if self._check is not None:
            self._check.cancel()
        self._all_closed.clear()
        for connection in list(self._connections):
            connection.close()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._all_closed.wait()

    def _watch(self) -> None:
        self._check = asyncio.get_running_loop().call_later(_CHECK_S, self._watch)
        self.check_connections(self._service.now())

    def check_connections(self, now: float) -> None:
        """End connections whose clients take too long."""
        for connection in list(self._connections):
            connection.check(now)

    # Downstream's side

    def opened(self, client: Downstream, address: object) -> RouterError | None:  # noqa: ARG002
        """A client connected; an error if it is one too many."""
        self._connections[client] = None
        if len(self._connections) <= MAX_CONNECTIONS:
            return None
        return OverloadError("the admin port has too many connections", code="too_many_connections")

    def closed(self, client: Downstream) -> None:
        """A client is gone."""
        del self._connections[client]
        if not self._connections:
            self._all_closed.set()

    def answer(self, client: Downstream, request: Request) -> Answering:
        """The page asked for, or why not. A request boundary: a defect of ours ends here."""
        try:
            page = self._page(request)
        except RouterError as error:
            return _answer(client, request, error.status, error_headers(error), error.body())
        except Exception:  # noqa: BLE001
            _log.exception("an admin page failed by a defect of the router")
            failed = RouterError("the router failed to make this page")
            return _answer(client, request, failed.status, error_headers(failed), failed.body())
        headers = [(b"content-type", page.content_type), *page.headers]
        return _answer(client, request, page.status, headers, page.body)

    def _page(self, request: Request) -> _Page:
        path = request.head.path.decode("latin-1")
        keys = self._access.admin_keys
        if keys is not None and path not in self._open_paths:
            given = get_header(request.headers, b"authorization")
            if keys.owner(given) is None:
                raise KeyRequiredError(has_key=bool(given))
        make: Callable[[], _Page] | None
        if path == _DRY_RUN:
            if request.method != b"POST":
                raise MethodNotAllowedError(request.method.decode("latin-1"), path, "POST")
            return self._dry_run(request.body)
        if path.startswith(_EXPLAIN):
            make = partial(self._explain, path.removeprefix(_EXPLAIN))
        else:
            make = self._pages.get(path)
        if make is None:
            raise PathNotFoundError(path)
        if request.method not in {b"GET", b"HEAD"}:
            raise MethodNotAllowedError(request.method.decode("latin-1"), path, "GET, HEAD")
        return make()

    # the pages

    def _health(self) -> _Page:
        return _Page(b'{"status":"alive"}')

    def _ready(self) -> _Page:
        service = self._service
        up = [replica.name for replica in service.placer.fleet.replicas if replica.is_open]
        is_ready = bool(up) and not service.is_draining and service.access.is_complete
        body = {"ready": is_ready, "draining": service.is_draining, "replicas_up": up}
        return _Page(msgspec.json.encode(body), status=200 if is_ready else 503)

    def _metrics(self) -> _Page:
        page = generate_latest(self._service.metrics.registry)
        return _Page(page, content_type=CONTENT_TYPE_LATEST.encode())

    def _fleet(self) -> _Page:
        return _Page(msgspec.json.encode(self.fleet_page()))

    def fleet_page(self) -> FleetPage:
        """What /fleet says now."""
        service = self._service
        now = service.now()
        moment = Moment(
            now,
            datetime.now(UTC).timestamp(),
            self._date(now),
            now - self._started_at,
            self._version,
            is_compiled(),
            service.is_draining,
        )
        num_held = service.dispatcher.num_held
        streams = None if service.follower is None else service.follower.status()
        sources = () if service.discovery is None else service.discovery.status()
        return fleet_page(
            service.placer, service.metrics, moment, num_held, streams, sources=sources
        )

    def _explain(self, quoted_id: str) -> _Page:
        receipts = self._service.receipts
        request_id = unquote_to_bytes(quoted_id)
        packed = receipts.get(request_id)
        if packed is None:
            raise ReceiptNotFoundError(len(receipts), MAX_RECEIPTS)
        return _Page(msgspec.json.encode(explain(request_id, packed, self._date)))

    def _dry_run(self, body: bytes) -> _Page:
        service = self._service
        fields = read_routing_fields(guess_path(body), body)
        options = service.placer.weigh(fields, service.now())
        return _Page(msgspec.json.encode(dry_run(options, service.placer.decide(options))))

    def _date(self, moment: float) -> str:
        """`moment` on the router's own clock, as a date.

        The same each time it is asked for, unless the machine's calendar was set in between: two
        clocks read one after the other are never apart by quite the same.
        """
        epoch = self._clock_epoch()
        if abs(epoch - self._epoch) > _CALENDAR_SET:
            self._epoch = epoch
        return (self._epoch + timedelta(seconds=moment)).isoformat(timespec="milliseconds")

    def _clock_epoch(self) -> datetime:
        """When the router's own clock stood at 0."""
        return datetime.now(UTC) - timedelta(seconds=self._service.now())


def _answer(
    client: Downstream, request: Request, status: int, headers: Headers, body: bytes
) -> Ready:
    keep_alive = request.keep_alive
    answer = whole_answer(request, status, headers, body, keep_alive=keep_alive)
    return Ready(client, answer, keep_alive=keep_alive)
