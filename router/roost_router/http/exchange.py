"""One request to replicas and their answer back: the life of a request on the data path.

    start ──► place ──► dial, send ──► head, body … ──► end
                ▲                             │
                └── AGAIN, RESUME ◄── verdict ◄┘ lost, stalled, refused

What a loss leads to is decided in answer/phases.py, where a request goes in placement.py, which
replicas are out in fleet/. This shell moves bytes and does what they say. Everything runs in
event-loop callbacks; the one await is dialling. Each callback is guarded: a defect of ours ends
this request with a 500, or cuts it, and nothing else.

The service asks ten times a second which exchanges are due: deadlines, and streams whose replica
makes no progress.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from math import inf, isfinite
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec

from roost_router.answer.phases import Answer, Phase, Verdict
from roost_router.answer.resume import CannotResumeError
from roost_router.errors import (
    BadRequestError,
    DeadlineError,
    HeldTooManyError,
    NoReplicaError,
    RetryBudgetError,
    RouterError,
    StoppedError,
    UpstreamError,
    error_body,
)
from roost_router.fleet.watch import MIN_ITL_S, is_stalled, itl_limit_s, ttft_limit_s, usual_gap_s
from roost_router.http.error_shape import openai_shaped
from roost_router.http.head import (
    REQUEST_TIMEOUT,
    ResponseHead,
    client_head,
    replica_head,
)
from roost_router.http.record import LostLeg, Outcome, RequestRecord
from roost_router.kv.report_mode import ask_for_reuse
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement
from roost_router.policy.fair_queue import Held

if TYPE_CHECKING:
    from roost_router.http.downstream import Downstream
    from roost_router.http.service import DataService
    from roost_router.http.serving import Request
    from roost_router.http.upstream import Upstream
    from roost_wire.told_load import ToldLoad

_Arguments = ParamSpec("_Arguments")
_log = logging.getLogger(__name__)

#: Statuses that speak against a replica. 429 and 503 do not: it works, and says it is busy.
_FAILURES: Final = frozenset({500, 502, 504})
#: Seconds before a replica that just failed is tried again because there is no other.
_BACKOFF_S: Final = (0.01, 0.05)
#: Bodies up to here are copied behind their head: cheaper than a write of two parts.
_MAX_JOINED_BYTES: Final = 16 << 10
#: Seconds that a whole answer may still take on a replica that answers no poll any more.
_GONE_S: Final = 10.0
#: Of a stream that breaks off for good.
_CUT_CODE: Final = "upstream_lost"


def _guarded(
    step: Callable[Concatenate[Exchange, _Arguments], None],
) -> Callable[Concatenate[Exchange, _Arguments], None]:
    """A request boundary: whatever `step` raises ends its request, and is logged.

    What runs for each request or chunk says the same itself: a wrapper costs as much as a step.
    """

    def run(exchange: Exchange, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            step(exchange, *args, **kwargs)
        except Exception:  # noqa: BLE001
            exchange._defect()  # noqa: SLF001

    return run


class Exchange:
    """Serves one completion request."""

    # What a fresh exchange has; a default of the class costs nothing for each request.
    _placement: Placement | None = None
    _held: Held[Exchange] | None = None  # while no replica could start it
    _first_placement: Placement | None = None  # what the client is told of
    _upstream: Upstream | None = None
    _dialling: asyncio.Task[None] | None = None
    _waiting: asyncio.TimerHandle | None = None
    _tried: frozenset[str] = frozenset()
    _lost_legs: tuple[LostLeg, ...] = ()
    _head: ResponseHead | None = None  # of the present leg's answer
    _has_begun = False  # the head went to the client
    _is_chunked = False  # and so does what follows it
    _keep_alive = False  # what it said
    _is_over = False
    _is_paused = False  # the client does not read
    _was_paused = False  # then the pace of events is the client's, not the replica's
    _ttft_s: float | None = None
    # of the present leg:
    _num_events = 0
    _widest_gap_s = 0.0

    def __init__(
        self, service: DataService, client: Downstream, request: Request, fields: RoutingFields
    ) -> None:
        now = service.now()
        self._service = service
        self._client = client
        self._request = request
        self.fields = fields
        self._request_id = service.request_id(request)
        self._started_at = now
        self._deadline = now + _timeout_s(request)
        budget = service.placer.fleet.retry_budget(fields.model)
        if request.head.is_retry:
            budget.charge(now)
        else:
            budget.deposit(now)
        self._answer = Answer(request.body, service.limits, budget, self._deadline)
        self._body = request.body  # of the present leg
        self._last_at = now  # when the present leg was sent, or last showed a token

    def start(self) -> None:
        """Place the request and send it; ends in `_finish`, `_fail`, `_cut` or `client_gone`."""
        service = self._service
        try:
            taken, displaced = service.dispatcher.offer(
                self, service.now(), self._request.head.tenant
            )
            if displaced is not None:
                displaced.request.refuse(HeldTooManyError(service.dispatcher.num_held))
            if isinstance(taken, Held):
                self._held = taken
                service.look_soon()
            else:
                self._placed(taken)
                self._connect()
            tokens = service.tokens
            if tokens is not None:  # now that its bytes are on their way
                request = self._request
                tokens.passed(request.head.path.decode(), request.body, self.fields)
        except RouterError as error:
            self._fail(error)
        except Exception:  # noqa: BLE001
            self._defect()

    @_guarded
    def bind(self, placement: Placement) -> None:
        """A replica can start it now: it was held until now."""
        self._held = None
        self._placed(placement)
        self._connect()

    @_guarded
    def refuse(self, error: RouterError) -> None:
        """It was held, and no replica will start it."""
        self._fail(error)

    def client_gone(self) -> None:
        """The client closed: closing the replica's connection aborts its work."""
        if not self._is_over:
            self._end("client_gone", 499)

    def _defect(self) -> None:
        """Something that must not happen did: answer 500 if nothing was sent, else cut."""
        _log.exception("request failed by a defect of the router")
        if self._is_over or self._has_begun:
            if not self._is_over:
                self._end("cut", self._answer.status)
            self._client.abort()
        else:
            self._fail(RouterError("the router failed to serve this request"))

    def pause(self) -> None:
        """Back-pressure from the client goes to the replica."""
        self._is_paused = self._was_paused = True
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """The client has caught up."""
        self._is_paused = False
        self._last_at = self._service.now()
        if self._upstream is not None:
            self._upstream.resume()

    def is_due(self, now: float) -> bool:
        """Whether time is up for this request, or its replica has stalled; see `expire`."""
        return now >= self._deadline or self._has_stalled(now)

    @_guarded
    def expire(self, now: float) -> None:
        """Give up on a request whose time is up, or on a replica that has stalled."""
        if self._is_over:
            return
        if self._placement is None:
            self._fail(DeadlineError())
            return
        if now < self._deadline:
            self._service.placer.fleet.failed(self._placement.replica, now, stalled=True)
            self._lost(f"the replica made no progress for {now - self._last_at:.1f} s", "stall")
        else:
            self._lost("the time that the client gave is over", "deadline")

    @_guarded
    def stop(self) -> None:
        """The router ends before this request does: its client is told."""
        if self._is_over:
            return
        if self._placement is None:
            self._fail(StoppedError())
            return
        self._answer.deadline = self._service.now()
        self._lost("the router was stopped", "stop")

    def _has_stalled(self, now: float) -> bool:
        placement = self._placement
        if self._upstream is None or placement is None or self._is_paused:
            return False
        replica, silent_s = placement.replica, now - self._last_at
        if silent_s < MIN_ITL_S:
            return False
        if not self.fields.stream:  # shows nothing until it is complete
            limit_s = inf if replica.is_up else _GONE_S
        elif self._num_events:
            usual_s = usual_gap_s(replica, self._service.placer.fleet.replicas)
            limit_s = itl_limit_s(replica, usual_s, self._widest_gap_s)
        else:
            limit_s = ttft_limit_s(replica, placement.work_tokens, placement.most_tokens)
        return is_stalled(replica, self._last_at, limit_s, now)

    # the replica's side (upstream.Listener)

    @_guarded
    def on_head(self, head: ResponseHead) -> None:
        """The leg's answer begins."""
        self._begin_answer(head)

    def on_answer(self, head: ResponseHead, body: bytes) -> None:
        """The leg's answer, all at once."""
        try:
            self._upstream = None  # it is back in its pool
            if head.status == 200 and not head.is_stream and self._answer.phase is Phase.SENT:
                self._send_whole(head, body)
                return
            self._begin_answer(head)
            if not body or self._read(body):
                self._end_answer()
        except Exception:  # noqa: BLE001
            self._defect()

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        """More of the leg's answer. `framed`: the same as a chunk, if it came as one."""
        try:
            self._read(data, framed)
        except Exception:  # noqa: BLE001
            self._defect()

    @_guarded
    def on_end(self) -> None:
        """The leg's answer is complete."""
        self._end_answer()

    def _begin_answer(self, head: ResponseHead) -> None:
        assert self._placement is not None
        self._head = head
        self._answer.head(head.status, is_stream=head.is_stream, seed=head.seed)
        if head.load is not None:
            self._hear_load(head.load, is_running=head.is_stream)
        if head.status == 200:
            self._learn(head.prompt_tokens, head.cached_tokens)
            if (
                not head.is_stream
            ):  # an error computed nothing: its blocks are taken back at the end
                placer, now = self._service.placer, self._service.now()
                placer.first_byte(self._placement, now, streamed=False)

    def _read(self, data: bytes, framed: bytes | None = None) -> bool:
        """Forward what can be; whether the leg goes on."""
        answer = self._answer
        events = answer.body(data)
        reader = answer.reader
        if reader is not None:
            if reader.num_events != self._num_events:
                self._note_progress(reader.num_events)
            if reader.fault is not None:
                self._write(events)
                self._failed_here()
                self._lost(reader.fault, "fault")
                return False
        if events is data and framed is not None and self._has_begun and self._is_chunked:
            self._client.write(framed)
        elif events:
            self._write(events)
        return True

    def _end_answer(self) -> None:
        assert self._placement is not None
        self._upstream = None
        answer, now = self._answer, self._service.now()
        replica = self._placement.replica
        verdict, events = answer.end(now, self._has_others)
        if answer.status in _FAILURES or (answer.reader is not None and not answer.is_done):
            self._failed_here()
        elif answer.status < 429:
            replica.health.succeeded()
        else:
            replica.health.left()
        self._write(events)
        usage = answer.usage
        if usage is not None and not answer.num_resumes:
            self._learn(usage.prompt_tokens, usage.cached_tokens)
        self._act(verdict, "status" if answer.reader is None else "cut")

    @_guarded
    def on_lost(self, reason: str) -> None:
        """The replica broke off."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None and upstream.was_stale:
            self._dialling = asyncio.ensure_future(self._dial())
            return
        if not self._answer.is_done:
            self._failed_here()
        self._lost(f"the replica broke off: {reason}", "lost")

    # legs

    def _place(self, dialects: frozenset[str] | None) -> None:
        """Choose a replica for another attempt."""
        self._placed(
            self._service.placer.place(self.fields, self._service.now(), self._tried, dialects)
        )

    def _placed(self, placement: Placement) -> None:
        self._placement = placement
        if self._first_placement is None or not self._has_begun:
            self._first_placement = self._placement
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %s", self._request_id.decode(), self._placement.explain())

    def _connect(self) -> None:
        assert self._placement is not None
        self._answer.begin()
        upstream = self._service.pool(self._placement.replica).try_idle()
        if upstream is None:
            self._dialling = asyncio.ensure_future(self._dial())
        else:
            self._send(upstream)

    async def _dial(self) -> None:
        assert self._placement is not None
        replica, dialled_at = self._placement.replica, self._service.now()
        try:
            upstream = await self._service.pool(replica).dial()
        except OSError as error:
            self._dialling = None
            if isinstance(error, ConnectionRefusedError):
                self._service.placer.fleet.refused(replica)
            self._failed_here()
            self._lost(f"the replica cannot be reached: {error}", "unreachable")
        else:
            self._dialling = None
            replica.dialled(self._service.now() - dialled_at)
            self._dialled(upstream)

    @_guarded
    def _dialled(self, upstream: Upstream) -> None:
        self._send(upstream)

    @_guarded
    def _reconnect(self) -> None:
        self._connect()

    def _send(self, upstream: Upstream) -> None:
        assert self._placement is not None
        self._upstream = upstream
        self._head = None
        self._num_events, self._widest_gap_s = 0, 0.0
        self._last_at = self._service.now()
        request, pool = self._request, self._service.pool(self._placement.replica)
        body, follower = self._body, self._service.follower
        if follower is not None and self._placement.replica.name in follower.reseeding:
            body = ask_for_reuse(request.head.path, body)
        start = replica_head(
            request.head,
            base_path=pool.base_path,
            host=pool.host,
            request_id=self._request_id,
            is_resumable=self.fields.stream,
            body_bytes=len(body),
        )
        upstream.send(self, [start + body] if len(body) <= _MAX_JOINED_BYTES else [start, body])
        if self._is_paused:  # since before this leg
            upstream.pause()

    def _note_progress(self, num_events: int) -> None:
        """Tokens came. The head says nothing: many servers send it at once."""
        assert self._placement is not None
        now = self._service.now()
        if not self._num_events:
            if self._ttft_s is None:
                self._ttft_s = now - self._started_at
            self._service.placer.first_byte(self._placement, now, streamed=True)
            self._service.released(now)
        elif now - self._last_at > self._widest_gap_s:
            self._widest_gap_s = now - self._last_at
        self._num_events = num_events
        self._last_at = self._placement.replica.last_event_at = now

    def _has_others(self) -> bool:
        """Whether a replica is left that was not tried for this request."""
        assert self._placement is not None
        tried = self._tried | {self._placement.replica.name}
        return self._service.placer.fleet.has_fresh(self.fields.model, tried)

    def _failed_here(self) -> None:
        assert self._placement is not None
        self._service.placer.fleet.failed(self._placement.replica, self._service.now())

    def _lost(self, reason: str, label: str) -> None:
        """The present leg is over, and was not enough."""
        self._act(self._answer.lost(reason, self._service.now()), label)

    def _act(self, verdict: Verdict, label: str) -> None:
        """Do what answer/phases.py says; `label` of a loss goes to metrics and receipt."""
        if verdict is Verdict.COMPLETE:
            self._complete(self._answer.closing())
        elif verdict is Verdict.WHOLE:
            self._send_held()
        elif verdict is Verdict.AGAIN:
            self._note_lost(label, "retried")
            self._leave_replica()
            self._service.metrics.retried(label)
            self._again()
        elif verdict is Verdict.RESUME:
            self._note_lost(label, "resumed")
            self._leave_replica()
            self._service.metrics.resumed(label)
            self._continue()
        elif verdict is Verdict.FAIL:
            self._note_lost(label, "failed")
            self._fail(self._error())
        else:
            self._note_lost(label, "cut")
            self._cut(self._answer.reason)

    def _note_lost(self, label: str, then: str) -> None:
        assert self._placement is not None
        why = f"{label} {self._answer.status}" if label == "status" else label
        self._lost_legs += (LostLeg(self._placement, why, then),)

    def _leave_replica(self) -> None:
        """Release what the present leg holds."""
        assert self._placement is not None
        if self._upstream is not None:
            self._upstream.abandon()
            self._upstream = None
        self._service.placer.finish(self._placement, self._service.now())
        self._tried |= {self._placement.replica.name}

    def _again(self) -> None:
        """Place the request elsewhere; after a moment, if elsewhere is where it just failed."""
        assert self._placement is not None
        before = self._placement.replica
        try:
            self._place(None)
        except RouterError as error:
            self._fail(self._error() if isinstance(error, NoReplicaError) else error)
            return
        if self._placement.replica is before or self._placement.replica.name in self._tried:
            self._later(self._reconnect)
        else:
            self._connect()

    @_guarded
    def _continue(self) -> None:
        """Send the rest of a broken stream to another replica."""
        reason = f"{self._answer.reason}; no replica is left that could continue"
        for dialects in self._answer.dialects():
            try:
                self._place(dialects)
            except RouterError:
                continue
            assert self._placement is not None
            try:
                body = self._answer.next_body(self._placement.replica.dialect)
            except CannotResumeError as error:
                reason = f"{self._answer.reason}; {error}"
                self._note_lost("cannot_resume", "not sent")
                self._service.placer.finish(self._placement, self._service.now())
                continue
            if body is None:
                self._complete(self._answer.closing(is_exhausted=True))
                return
            self._body = body
            if self._placement.replica.name in self._tried:
                self._later(self._reconnect)
            else:
                self._connect()
            return
        self._cut(reason)

    def _later(self, step: Callable[[], None]) -> None:
        def run() -> None:
            self._waiting = None
            step()

        delay_s = self._service.rng.uniform(*_BACKOFF_S)
        self._waiting = asyncio.get_running_loop().call_later(delay_s, run)

    # the client's side

    def _write(self, data: bytes) -> None:
        """Forward bytes of the answer, its head before the first of them."""
        if not data:
            return
        start = b"" if self._has_begun else self._begin()
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._client.write(start + data)

    def _begin(self) -> bytes:
        """The head; to be written with what comes first, for each write is a system call."""
        self._has_begun = True
        assert self._head is not None
        self._is_chunked = not self._request.is_http_1_0
        framing = b"transfer-encoding: chunked\r\n" if self._is_chunked else b""
        return self._client_head(self._head, framing)

    def _send_whole(self, head: ResponseHead, body: bytes) -> None:
        """A 200 that is no stream came at once: the usual end of a request, in one go."""
        placement, service = self._placement, self._service
        assert placement is not None
        usage = self._answer.whole(body)
        if head.load is not None:
            self._hear_load(head.load, is_running=False)
        if head.prompt_tokens is not None:
            self._learn(head.prompt_tokens, head.cached_tokens)
        service.placer.first_byte(placement, service.now(), streamed=False)
        placement.replica.health.succeeded()
        if usage is not None:
            self._learn(usage.prompt_tokens, usage.cached_tokens)
        framing = b"content-length: %d\r\n" % len(body)
        self._client.write(self._client_head(head, framing) + body)
        self._finish()

    def _send_held(self) -> None:
        answer = self._answer
        body = b"".join(answer.held)
        head = self._head
        assert head is not None
        if head.status >= 400:
            head, body = openai_shaped(head, body)
        start = self._client_head(head, b"content-length: %d\r\n" % len(body))
        self._client.write(start + body)
        self._finish()

    def _client_head(self, head: ResponseHead, framing: bytes) -> bytes:
        assert self._placement is not None
        self._keep_alive = self._service.keeps_alive(self._request)
        return client_head(
            head,
            request_id=self._request_id,
            replica=self._placement.replica.name.encode(),
            matched_tokens=self._placement.matched_tokens,
            attempts=self._answer.num_attempts,
            cached_tokens=self._answer.cached_tokens,
            framing=framing,
            keep_alive=self._keep_alive,
        )

    def _hear_load(self, load: ToldLoad, *, is_running: bool) -> None:
        """What the leg's replica has to do. `is_running`: this request is part of it."""
        placement = self._placement
        assert placement is not None
        self._service.placer.fleet.load_told(
            placement.replica,
            load,
            num_ended=0 if is_running else 1,
            done_tokens=0 if placement.is_decoding else placement.uncached_tokens,
        )

    def _learn(self, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        """What a leg told of the prompt; the first leg's word is the client's."""
        assert self._placement is not None
        if prompt_tokens is None:
            return
        if not self._answer.num_resumes:
            self._answer.prompt_tokens, self._answer.cached_tokens = prompt_tokens, cached_tokens
        self._service.placer.learn(self._placement, prompt_tokens, cached_tokens)

    # ends

    def _complete(self, closing: bytes) -> None:
        """The client has the whole answer, once `closing` is written."""
        self._write(closing)
        end = b"" if self._has_begun else self._begin()
        if self._is_chunked:
            end += b"0\r\n\r\n"
        if end:
            self._client.write(end)
        self._finish()

    def _finish(self) -> None:
        self._end(_outcome(self._answer.status), self._answer.status)
        self._client.finish(keep_alive=self._keep_alive)

    def _fail(self, error: RouterError) -> None:
        """Answer `error`; nothing was sent to the client before."""
        self._service.send_error(self._client, self._request, error, self._request_id)
        self._end(_outcome(error.status), error.status, error.code)
        self._client.finish(keep_alive=self._service.keeps_alive(self._request))

    def _error(self) -> RouterError:
        """The last loss, as the client is told of it."""
        answer = self._answer
        if answer.budget_is_spent:
            return RetryBudgetError(answer.reason)
        if self._service.now() >= self._deadline:
            return DeadlineError()
        if not self._service.placer.fleet.is_served(self.fields.model):
            return NoReplicaError(self.fields.model, answer.num_attempts)
        return UpstreamError(answer.reason)

    def _cut(self, reason: str) -> None:
        """Tell a client that has part of the answer that the rest will not come."""
        if self._answer.phase is Phase.STREAMING:
            message = f"the stream was cut: {reason}"
            event = error_body(message, "server_error", None, _CUT_CODE)
            self._write(b"data: " + event + b"\n\n")
        self._end("cut", self._answer.status, _CUT_CODE)
        self._client.abort()

    def _end(self, outcome: Outcome, status: int, error_code: str | None = None) -> None:
        """Release everything and report; every way out comes through here, once."""
        assert not self._is_over
        self._is_over = True
        now, service, placement = self._service.now(), self._service, self._placement
        if self._held is not None:
            service.dispatcher.cancel(self._held)
            self._held = None
        if self._dialling is not None:
            self._dialling.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        if self._upstream is not None:
            self._upstream.abandon()
            self._upstream = None
        record = RequestRecord(
            self._request_id,
            self.fields.model,
            self._answer,
            placement=placement,
            first=self._first_placement,
            lost_legs=self._lost_legs,
            outcome=outcome,
            status=status,
            error_code=error_code,
            started_at=self._started_at,
            duration_s=now - self._started_at,
            ttft_s=self._ttft_s,
        )
        try:
            if placement is not None:
                if outcome == "client_gone":
                    placement.replica.health.left()
                num_events = 0 if self._was_paused else self._num_events
                service.placer.finish(placement, now, num_events)
        finally:
            service.ended(self, record)


def _outcome(status: int) -> Outcome:
    if status >= 500:
        return "server_error"
    return "client_error" if status >= 400 else "ok"


def _timeout_s(request: Request) -> float:
    """Seconds that the client gives its request. BadRequestError if it is no positive number."""
    value = request.head.timeout
    if value is None:
        return inf
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not (isfinite(seconds) and seconds > 0):
        raise BadRequestError(f"{REQUEST_TIMEOUT.decode()} must be a positive number")
    return seconds
