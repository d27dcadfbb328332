"""GET /fleet: all that a router knows of its replicas and of itself, at one moment. Pure.

For machines as for people: `roost top`, `roost doctor` and the dashboard show nothing else. The
structs are the format; they are read again with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from roost_router.findings import Finding, find
from roost_router.fleet.health import Circuit
from roost_router.policy.shadow import ShadowReport
from roost_router.rungs import RUNGS, ModelLadder, Rung
from roost_router.traffic import Told, Traffic
from roost_wire.load_report import LoadReport

if TYPE_CHECKING:
    from roost_router.discovery.roster import SourceStatus
    from roost_router.fleet.replica import Replica
    from roost_router.kv.follow import StreamStatus
    from roost_router.metrics import RouterMetrics
    from roost_router.placement import Placer


class Ejection(msgspec.Struct):
    """Why a replica that is up gets no requests, or one at a time."""

    reason: str
    left_s: float  # 0: it is being probed with single requests


class KvStreamRow(msgspec.Struct):
    """One stream of KV events: of a replica, or of one of its data-parallel ranks."""

    rank: int
    dialect: str
    trust: str  # exact, catching_up, approximate, blind: kv/trust.py
    reason: str  # why it is not exact; "none" where it is
    undecodable: int  # batches
    losses: dict[str, int] = {}  # how often it was not exact, by reason; most are mended since


class ReplicaRow(msgspec.Struct):
    """One replica as the router sees it."""

    name: str
    url: str
    state: str  # joining, up, down; draining: it answers, and is to get no new requests
    dialect: str  # which server it is, by its own words
    models: tuple[str, ...]
    ejection: Ejection | None
    in_flight: int  # requests placed there and not ended
    decoding: int  # of these, streams that run
    queued_tokens: int  # uncached prompt tokens placed there, not yet computed
    resident_blocks: int  # text blocks that the index believes it holds
    kv_capacity_tokens: int | None  # None: it does not tell
    prefill_tokens_per_s: float  # as fitted
    token_gap_s: float | None  # between tokens of a stream, averaged; None: not seen yet
    reported: LoadReport  # its own figures, as last polled or told
    traffic: Traffic
    told: Told
    #: How it is known what it holds: "placements", or KV events by the trust in the least trusted
    #: stream, or "drifting" where they are of no use because it counts tokens differently.
    known_by: str
    kv_streams: list[KvStreamRow] | None  # None: KV events are not followed
    drifting: list[str]  # models whose tokens it counts differently


class SourceRow(msgspec.Struct):
    """A place where replicas are found; discovery/roster.py."""

    name: str
    replicas: int  # that it tells of
    failing_s: float | None  # None: its last word was an answer
    reason: str  # why it fails


class Totals(msgspec.Struct):
    """The fleet as a whole."""

    replicas: int
    replicas_up: int  # that take new requests
    in_flight: int
    decoding: int
    queued_tokens: int
    held_requests: int  # in the router, until a replica can start them
    traffic: Traffic


class FleetPage(msgspec.Struct):
    """The page."""

    at: str  # ISO 8601, UTC, by the router's calendar
    version: str
    is_compiled: bool
    uptime_s: float
    is_draining: bool
    totals: Totals
    replicas: list[ReplicaRow]
    rungs: tuple[Rung, ...]  # of all ladders, from the top
    ladders: list[ModelLadder]
    shadow: ShadowReport | None  # None: no policy is watching
    findings: list[Finding]
    sources: list[SourceRow] = []  # none: all replicas were given with the options


class Moment(msgspec.Struct):
    """When a page is made, by which clocks, and what only the process knows."""

    now: float  # seconds, monotonic
    unix_s: float
    at: str
    uptime_s: float
    version: str
    is_compiled: bool
    is_draining: bool


def fleet_page(
    placer: Placer,
    metrics: RouterMetrics,
    moment: Moment,
    num_held: int,
    streams: Sequence[StreamStatus] | None = None,
    *,
    sources: Sequence[SourceStatus] = (),
) -> FleetPage:
    """The page at `moment`. O(replicas + models + streams).

    `num_held`: requests that wait in the router. `streams`: of KV events; None: not followed.
    `sources`: of replicas.
    """
    now, fleet = moment.now, placer.fleet
    replicas = [*fleet.replicas, *fleet.leaving]
    rows = [_row(placer, metrics, replica, streams, now) for replica in replicas]
    source_rows = [_source_row(source, now) for source in sources]
    return FleetPage(
        moment.at,
        moment.version,
        moment.is_compiled,
        moment.uptime_s,
        moment.is_draining,
        Totals(
            len(rows),
            sum(replica.is_open for replica in replicas),
            sum(row.in_flight for row in rows),
            sum(row.decoding for row in rows),
            sum(row.queued_tokens for row in rows),
            num_held,
            metrics.recent.total(now),
        ),
        rows,
        RUNGS,
        metrics.ladders(placer, now),
        None if metrics.shadow is None else metrics.shadow.report(now),
        find(rows, moment.unix_s, source_rows),
        source_rows,
    )


def _source_row(source: SourceStatus, now: float) -> SourceRow:
    since = source.failing_since
    if since is None:
        return SourceRow(source.name, source.num_told, None, "")
    return SourceRow(source.name, source.num_told, now - since, source.reason)


def _row(
    placer: Placer,
    metrics: RouterMetrics,
    replica: Replica,
    streams: Sequence[StreamStatus] | None,
    now: float,
) -> ReplicaRow:
    pairs = [] if placer.told is None else placer.told.drifting()
    drifting = [model for model, name in pairs if name == replica.name]
    kv_streams = None if streams is None else _kv_streams(streams, replica.name)
    return ReplicaRow(
        name=replica.name,
        url=replica.url,
        state=replica.condition,
        dialect=replica.dialect,
        models=replica.models,
        ejection=_ejection(replica, now),
        in_flight=replica.num_in_flight,
        decoding=replica.num_decoding,
        queued_tokens=replica.queued_tokens,
        resident_blocks=placer.index.num_blocks(replica.holder),
        kv_capacity_tokens=replica.kv_capacity_tokens,
        prefill_tokens_per_s=round(placer.fleet.prefill_tokens_per_s(replica), 1),
        token_gap_s=replica.speed.usual_gap_s,
        reported=replica.report,
        traffic=metrics.recent.traffic(replica.name, now),
        told=metrics.recent.told(replica.name, now),
        known_by=_known_by(kv_streams or [], drifting),
        kv_streams=kv_streams,
        drifting=drifting,
    )


def _kv_streams(streams: Sequence[StreamStatus], replica: str) -> list[KvStreamRow]:
    return [
        KvStreamRow(
            s.rank, s.dialect.value, s.trust.value, s.reason.value, s.num_undecodable, s.losses
        )
        for s in streams
        if s.replica == replica
    ]


def _known_by(streams: Sequence[KvStreamRow], drifting: Sequence[str]) -> str:
    if not streams:
        return "placements"
    if drifting:
        return "drifting"
    order = ("exact", "approximate", "catching_up", "blind")
    return max((stream.trust for stream in streams), key=order.index).replace("_", " ")


def _ejection(replica: Replica, now: float) -> Ejection | None:
    health = replica.health
    if health.ejected_until is None or health.circuit(now) is Circuit.CLOSED:
        return None
    return Ejection(health.ejection_reason, max(0.0, health.ejected_until - now))
