"""The admin plane, on a port of its own: what operators and orchestrators ask.

GET /health    200 while the process lives (liveness)
GET /ready     200 while requests can be placed, else 503 (readiness); 503 while draining
GET /metrics   Prometheus
GET /replicas  what the router believes of its replicas, as JSON

With admin keys, /metrics and /replicas ask for one; orchestrators probe the other two without.
Every error is in OpenAI's shape, as on the data port.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from roost_router.access import Access
from roost_router.errors import (
    KeyRequiredError,
    MethodNotAllowedError,
    PathNotFoundError,
    RouterError,
)
from roost_router.fleet.replica import Replica
from roost_router.http.service import DataService
from roost_router.placement import Placer

_OPEN_PATHS = frozenset({"/health", "/ready"})
_log = logging.getLogger(__name__)


def make_admin_app(service: DataService, access: Access) -> web.Application:
    """The aiohttp application of the admin port."""

    @web.middleware
    async def judge(request: web.Request, handler: Handler) -> web.StreamResponse:
        """A request boundary: who has no key is refused, and every error has OpenAI's shape."""
        try:
            if access.admin_keys is not None and request.path not in _OPEN_PATHS:
                given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
                if access.admin_keys.owner(given) is None:
                    return _error(KeyRequiredError(has_key=bool(given)))
            return await handler(request)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            return _error(MethodNotAllowedError(request.method, request.path, allowed))
        except web.HTTPNotFound:
            return _error(PathNotFoundError(request.path))
        except Exception:  # noqa: BLE001
            _log.exception("an admin page failed by a defect of the router")
            return _error(RouterError("the router failed to make this page"))

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(_: web.Request) -> web.Response:
        up = [replica.name for replica in service.placer.fleet.replicas if replica.is_up]
        is_ready = bool(up) and not service.is_draining
        body = {"ready": is_ready, "draining": service.is_draining, "replicas_up": up}
        return web.json_response(body, status=200 if is_ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        page = generate_latest(service.metrics.registry)
        return web.Response(body=page, headers={"content-type": CONTENT_TYPE_LATEST})

    async def replicas(_: web.Request) -> web.Response:
        placer = service.placer
        body = msgspec.json.encode([_describe(placer, r) for r in placer.fleet.replicas])
        return web.Response(body=body, content_type="application/json")

    app = web.Application(middlewares=[judge])
    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/replicas", replicas)
    return app


def _error(error: RouterError) -> web.Response:
    headers = {}
    if isinstance(error, KeyRequiredError):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(error, MethodNotAllowedError):
        headers["allow"] = error.allowed
    return web.Response(
        body=error.body(), status=error.status, content_type="application/json", headers=headers
    )


def _describe(placer: Placer, replica: Replica) -> dict[str, Any]:
    return {
        "name": replica.name,
        "url": replica.url,
        "state": replica.state.value,
        "models": replica.models,
        "kv_capacity_tokens": replica.kv_capacity_tokens,
        "resident_blocks": placer.index.num_blocks(replica.holder),
        "in_flight": replica.num_in_flight,
        "decoding": replica.num_decoding,
        "queued_tokens": replica.queued_tokens,
        "reported": replica.report,
        "prefill_tokens_per_s": round(placer.fleet.prefill_tokens_per_s(replica), 1),
    }
