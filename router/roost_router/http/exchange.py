"""One request to a replica and its answer back: the life of a request on the data path.

    start ──► place ──► send ──► head ──► body … ──► end
                ▲         │        └ a stream is relayed as it comes
                └─ lost ──┘        └ anything else is held until complete, then sent at once

Up to the first byte sent to the client a lost replica costs nothing: the request is placed
again, without the replicas that failed or said 503. A whole (non-streamed) answer is held until
complete, since no client can use half of it, so it survives a replica's death until its last
byte; an answer over MAX_HELD_BYTES is relayed like a stream. After the first byte the loss is
reported: one error event, no [DONE], and the connection is cut. A stream that ends without
[DONE] counts as lost, never as a success.

This shell moves bytes and calls the placer at its four moments; what to do where is decided in
placement.py. Everything runs in event-loop callbacks; the one await is dialling. Each callback
is guarded: a defect of ours ends this request with a 500, or cuts it, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import msgspec

from roost_router.errors import NoReplicaError, RouterError, UpstreamError, error_body
from roost_router.http import head
from roost_router.http.head import (
    Headers,
    get_header,
    request_head,
    response_head,
    to_client,
    to_replica,
)
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement
from roost_router.sse import SseObserver, Usage, read_usage

if TYPE_CHECKING:
    from roost_router.http.downstream import Downstream, Request
    from roost_router.http.service import DataService
    from roost_router.http.upstream import Upstream

_Arguments = ParamSpec("_Arguments")
_log = logging.getLogger(__name__)

#: A non-streamed answer up to this size is held until it is complete.
MAX_HELD_BYTES = 4 << 20


class Outcome(Enum):
    """How a request ended; a metric label."""

    OK = "ok"
    CLIENT_ERROR = "client_error"  # 4xx, ours or the replica's
    SERVER_ERROR = "server_error"  # 5xx, ours or the replica's
    CLIENT_GONE = "client_gone"
    CUT = "cut"  # the replica died after the first byte was sent


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What observers are told of a finished request."""

    model: str
    replica: str | None
    outcome: Outcome
    status: int
    attempts: int
    duration_s: float
    ttft_s: float | None
    matched_tokens: int | None  # predicted
    cached_tokens: int | None  # reported
    prompt_tokens: int | None  # reported


def _guarded(
    step: Callable[Concatenate[Exchange, _Arguments], None],
) -> Callable[Concatenate[Exchange, _Arguments], None]:
    """A request boundary: whatever `step` raises ends its request, and is logged."""

    def run(exchange: Exchange, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            step(exchange, *args, **kwargs)
        except Exception:  # noqa: BLE001
            _log.exception("request failed by a defect of the router")
            exchange.give_up()

    return run


class _Leg:
    """What one attempt on one replica has shown so far."""

    def __init__(self) -> None:
        self.status = 0  # 0 until the replica's head came
        self.headers: Headers = []
        self.is_relaying = False  # the head went to the client: no way back
        self.sse: SseObserver | None = None  # set for a stream
        self.held: list[bytes] = []
        self.held_bytes = 0
        self.ttft_s: float | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None


class Exchange:
    """Serves one completion request."""

    def __init__(
        self, service: DataService, client: Downstream, request: Request, fields: RoutingFields
    ) -> None:
        self._service = service
        self._client = client
        self._request = request
        self._fields = fields
        self._request_id = service.request_id(request)
        self._started_at = service.now()
        self._placement: Placement | None = None
        self._upstream: Upstream | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._attempts = 0
        self._tried: frozenset[str] = frozenset()
        self._is_over = False
        self._was_paused = False  # then the pace of events is the client's, not the replica's
        self._leg = _Leg()

    @_guarded
    def start(self) -> None:
        """Place the request and send it; ends in `_finish`, `_fail` or `client_gone`."""
        try:
            self._placement = self._service.placer.place(
                self._fields, self._service.now(), self._tried
            )
        except RouterError as error:
            self._fail(error)
            return
        self._attempts += 1
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %s", self._request_id.decode(), self._placement.explain())
        upstream = self._service.pool(self._placement.replica).try_idle()
        if upstream is None:
            self._dialling = asyncio.ensure_future(self._dial())
        else:
            self._send(upstream)

    def client_gone(self) -> None:
        """The client closed: closing the replica's connection aborts its work."""
        if not self._is_over:
            self._end(Outcome.CLIENT_GONE, 499)

    def give_up(self) -> None:
        """Something that must not happen did: answer 500 if nothing was sent, else cut."""
        if self._is_over or self._leg.is_relaying:
            if not self._is_over:
                self._end(Outcome.CUT, self._leg.status)
            self._client.abort()
        else:
            self._fail(RouterError("the router failed to serve this request"))

    def pause(self) -> None:
        """Back-pressure from the client goes to the replica."""
        self._was_paused = True
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """The client has caught up."""
        if self._upstream is not None:
            self._upstream.resume()

    # the replica's side (upstream.Listener)

    @_guarded
    def on_head(self, status: int, headers: Headers) -> None:
        """The answer begins: relay a stream at once, hold anything else."""
        assert self._placement is not None
        leg = self._leg
        leg.status, leg.headers = status, headers
        self._learn(_int(headers, head.PROMPT_TOKENS), _int(headers, head.CACHED_TOKENS))
        content_type = get_header(headers, b"content-type") or b""
        if status == 200 and content_type.startswith(b"text/event-stream"):
            leg.sse = SseObserver()
            self._relay_head()
        elif status == 200:  # an error computed nothing: its blocks are taken back at the end
            self._service.placer.first_byte(self._placement, self._service.now(), streamed=False)

    @_guarded
    def on_body(self, data: bytes) -> None:
        """More of the answer."""
        leg = self._leg
        if leg.sse is not None:
            leg.sse.feed(data)
            if leg.ttft_s is None and leg.sse.num_events:
                self._note_first_event()
        if leg.is_relaying:
            self._relay(data)
            return
        leg.held.append(data)
        leg.held_bytes += len(data)
        if leg.held_bytes > MAX_HELD_BYTES:
            self._relay_head()
            for part in leg.held:
                self._relay(part)
            leg.held.clear()

    @_guarded
    def on_end(self) -> None:
        """The answer is complete."""
        self._upstream = None
        if self._leg.sse is not None:
            self._leg.sse.end()
            if not self._leg.sse.is_done:
                self._cut("the replica ended the stream before it was complete")
                return
            self._learn_usage(self._leg.sse.usage)
        if self._leg.is_relaying:
            if not self._request.is_http_1_0:
                self._client.write(b"0\r\n\r\n")
            self._finish()
        elif self._leg.status == 503:
            self._again(NoReplicaError(self._fields.model, self._attempts), "refused")
        else:
            self._send_held()

    @_guarded
    def on_lost(self, reason: str) -> None:
        """The replica broke off: again elsewhere, or tell the client."""
        upstream, self._upstream = self._upstream, None
        if self._leg.sse is not None and self._leg.sse.is_done:
            self.on_end()  # all that counts has come
        elif self._leg.is_relaying:
            self._cut(reason)
        elif upstream is not None and upstream.num_requests > 1 and not self._leg.status:
            # A kept connection that the replica closed meanwhile says nothing of the replica.
            self._dialling = asyncio.ensure_future(self._dial())
        else:
            self._again(UpstreamError(f"the replica broke off: {reason}"), "lost")

    # steps

    async def _dial(self) -> None:
        assert self._placement is not None
        replica = self._placement.replica
        try:
            upstream = await self._service.pool(replica).dial()
        except OSError as error:
            self._dialling = None
            if isinstance(error, ConnectionRefusedError):
                self._service.placer.fleet.refused(replica)
            self._again(UpstreamError(f"the replica cannot be reached: {error}"), "unreachable")
        else:
            self._dialling = None
            self._send(upstream)

    @_guarded
    def _send(self, upstream: Upstream) -> None:
        assert self._placement is not None
        self._upstream = upstream
        self._leg = _Leg()
        request, pool = self._request, self._service.pool(self._placement.replica)
        headers = to_replica(request.headers)
        headers.append((head.REQUEST_ID, self._request_id))
        request_bytes = request_head(
            method=request.method,
            target=pool.base_path + request.target,
            host=pool.host,
            headers=headers,
            body_bytes=len(request.body),
        )
        upstream.send(self, [request_bytes, request.body])

    def _note_first_event(self) -> None:
        """The first token is there. The head says nothing: many servers send it at once."""
        assert self._placement is not None
        now = self._service.now()
        self._leg.ttft_s = now - self._started_at
        self._service.placer.first_byte(self._placement, now, streamed=True)

    @_guarded
    def _again(self, error: RouterError, reason: str) -> None:
        """Place the request elsewhere, or give up with `error`."""
        assert self._placement is not None
        self._service.placer.finish(self._placement, self._service.now())
        self._tried |= {self._placement.replica.name}
        if self._attempts >= self._service.max_attempts:
            self._fail(error)
            return
        self._service.metrics.retried(reason)
        self.start()

    def _relay_head(self) -> None:
        self._leg.is_relaying = True
        framing = [] if self._request.is_http_1_0 else [b"transfer-encoding: chunked"]
        self._client.write(
            response_head(
                self._leg.status,
                self._answer_headers(),
                framing=framing,
                keep_alive=self._request.keep_alive,
            )
        )

    def _relay(self, data: bytes) -> None:
        if self._request.is_http_1_0:
            self._client.write(data)
        else:
            self._client.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _send_held(self) -> None:
        body = b"".join(self._leg.held)
        if self._leg.status == 200:
            self._learn_usage(read_usage(body))
        elif self._leg.status >= 400:
            body = _openai_shaped(self._leg.status, body, self._leg.headers)
        start = response_head(
            self._leg.status,
            self._answer_headers(),
            framing=[b"content-length: %d" % len(body)],
            keep_alive=self._request.keep_alive,
        )
        self._client.write(start + body)
        self._finish()

    def _answer_headers(self) -> Headers:
        assert self._placement is not None
        placement, headers = self._placement, to_client(self._leg.headers)
        headers += [
            (head.REQUEST_ID, self._request_id),
            (head.REPLICA, placement.replica.name.encode()),
            (head.MATCHED_TOKENS, b"%d" % placement.matched_tokens),
            (head.ATTEMPTS, b"%d" % self._attempts),
        ]
        if self._leg.cached_tokens is not None:
            headers.append((head.CACHED_TOKENS, b"%d" % self._leg.cached_tokens))
        return headers

    def _learn_usage(self, usage: Usage | None) -> None:
        if usage is not None:
            self._learn(usage.prompt_tokens, usage.cached_tokens)

    def _learn(self, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        assert self._placement is not None
        if prompt_tokens is None or self._leg.prompt_tokens is not None:
            return
        self._leg.prompt_tokens, self._leg.cached_tokens = prompt_tokens, cached_tokens
        self._service.placer.learn(self._placement, prompt_tokens, cached_tokens)

    # ends

    def _finish(self) -> None:
        self._end(_outcome(self._leg.status), self._leg.status)
        self._client.finish(keep_alive=self._request.keep_alive)

    def _fail(self, error: RouterError) -> None:
        """Answer `error`; nothing was sent to the client before."""
        self._service.send_error(self._client, self._request, error, self._request_id)
        self._end(_outcome(error.status), error.status)
        self._client.finish(keep_alive=self._request.keep_alive)

    def _cut(self, reason: str) -> None:
        """Tell a client that has part of the answer that the rest will not come."""
        message = f"the stream was cut: {reason}"
        if self._leg.sse is not None:
            event = error_body(message, "server_error", None, "upstream_lost")
            start = b"\n\n" if self._leg.sse.is_inside_line else b""
            self._relay(start + b"data: " + event + b"\n\n")
        self._end(Outcome.CUT, self._leg.status)
        self._client.abort()

    def _end(self, outcome: Outcome, status: int) -> None:
        """Release everything and report; every way out comes through here, once."""
        assert not self._is_over
        self._is_over = True
        now, service, placement = self._service.now(), self._service, self._placement
        if self._dialling is not None:
            self._dialling.cancel()
        if self._upstream is not None:
            self._upstream.abandon()
            self._upstream = None
        record = RequestRecord(
            model=self._fields.model,
            replica=placement.replica.name if placement is not None else None,
            outcome=outcome,
            status=status,
            attempts=self._attempts,
            duration_s=now - self._started_at,
            ttft_s=self._leg.ttft_s,
            matched_tokens=placement.matched_tokens if placement is not None else None,
            cached_tokens=self._leg.cached_tokens,
            prompt_tokens=self._leg.prompt_tokens,
        )
        try:
            if placement is not None:
                has_pace = self._leg.sse is not None and not self._was_paused
                num_events = self._leg.sse.num_events if self._leg.sse and has_pace else 0
                service.placer.finish(placement, now, num_events)
        finally:
            service.ended(self, record)


def _outcome(status: int) -> Outcome:
    if status >= 500:
        return Outcome.SERVER_ERROR
    return Outcome.CLIENT_ERROR if status >= 400 else Outcome.OK


def _int(headers: Headers, name: bytes) -> int | None:
    """A token count that a replica states in a header, or None."""
    value = get_header(headers, name)
    return int(value) if value is not None and value.isdigit() and len(value) < 10 else None


def _openai_shaped(status: int, body: bytes, headers: Headers) -> bytes:
    """`body` if it is a JSON error already, else its text in OpenAI's shape."""
    if get_header(headers, b"content-encoding") is not None:
        return body  # compressed unasked: not ours to read
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded = None
    if isinstance(decoded, dict) and "error" in decoded:
        return body
    text = decoded.get("message") if isinstance(decoded, dict) else None
    if not isinstance(text, str):
        text = body.decode("utf-8", "replace").strip()[:500] or f"the replica answered {status}"
    headers[:] = [(key, value) for key, value in headers if key != b"content-type"]
    headers.append((b"content-type", b"application/json"))
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return error_body(text, kind, None, "upstream_status")
