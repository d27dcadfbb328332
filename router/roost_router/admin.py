"""The admin plane, on a port of its own: what operators and orchestrators ask.

GET /health    200 while the process lives (liveness)
GET /ready     200 while requests can be placed, else 503 (readiness); 503 while draining
GET /metrics   Prometheus
GET /replicas  what the router believes of its replicas, as JSON
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from roost_router.fleet.replica import Replica
from roost_router.http.service import DataService
from roost_router.placement import Placer


def make_admin_app(service: DataService) -> web.Application:
    """The aiohttp application of the admin port."""

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

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/replicas", replicas)
    return app


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
