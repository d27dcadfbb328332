"""Engine core: the thread that turns requests into tokens, and its bridge to asyncio.

    event loop                                   engine thread
    ----------                                   -------------
    submit, abort --> inbox (under a condition) --> scheduler.add / abort
                                                    schedule -> forward -> sample -> update
    TokenStream <-- call_soon_threadsafe <--------- tokens of the step, one call a step

The thread sleeps on the condition while there is nothing to do. Scheduler and pool belong to
it; the loop only reads their counters, which are plain integers.

A step that raises ends the thread: every request in flight fails with EngineDeadError, later
ones are refused with it, `is_healthy` turns false, `wait_until_dead` returns, and nobody waits
for ever. A request whose logits are no numbers fails alone (LogitsError), the others go on.

Invariants: each stream gets exactly one end (a finish reason or an error); every error raised
is an object of its own, since a traceback keeps alive what its frames held; `submit`, `abort`,
`stop` and TokenStream are used from the event loop only.

Not here: what a step holds (scheduler.py), text (frontend.py), HTTP (server.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from roost_engine.request import FinishReason, Request
from roost_engine.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from roost_engine.batch import Chunk
    from roost_engine.scheduler import Output, Scheduler

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_STOPPING = "the engine is shutting down"


class EngineError(Exception):
    """A request cannot be served for a reason that is ours."""


class EngineDeadError(EngineError):
    """A step raised; this process computes nothing any more."""


class EngineStoppingError(EngineError):
    """The process is shutting down."""


class EngineBusyError(EngineError):
    """As many requests as may run and wait are here already; to be tried again later."""


class LogitsError(EngineError):
    """The model computed NaN or infinity for this request; the engine lives on."""


class Runner(Protocol):
    """What computes a step; ModelRunner in production, a fake in tests."""

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits (rows, vocab) float32 of the chunks with `wants_logits`, in their order."""
        ...


class Delta(msgspec.Struct, frozen=True):
    """Tokens that came since the last one; `finish_reason` is set on the last delta."""

    token_ids: list[int]
    finish_reason: FinishReason | None


class TokenStream:
    """Tokens of one request, as an asynchronous iterator of Delta. Event loop only."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._error: EngineError | None = None
        self._arrived = asyncio.Event()
        self._is_over = False

    def put(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> None:
        """Add tokens; called by the core through the loop."""
        self._token_ids += token_ids
        self._finish_reason = finish_reason
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """End with an error; tokens that came before are still delivered first."""
        self._error = error
        self._arrived.set()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Delta:
        """Next tokens. EngineError if the engine failed before the request was finished."""
        if self._is_over:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        if self._token_ids or self._finish_reason is not None:
            delta = Delta(self._token_ids, self._finish_reason)
            self._token_ids = []
            self._is_over = delta.finish_reason is not None
            if self._error is not None:
                self._arrived.set()
            return delta
        self._is_over = True
        assert self._error is not None
        raise self._error


class EngineCore:
    """Owns the engine thread. Create, `start`, `submit` ..., `stop`."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._streams: dict[str, TokenStream] = {}  # event loop only
        self._wake = threading.Condition()
        self._inbox: deque[Request | str] = deque()  # under _wake; str: id to abort
        self._should_stop = False  # under _wake
        self._failure: str | None = None  # event loop only; what the step raised
        self._is_dead = asyncio.Event()
        self._is_draining = False  # event loop only
        self._is_idle = asyncio.Event()  # set while draining, once the last stream has ended
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="roost-engine", daemon=True)

    # -- event loop side ----------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; to be called inside the running event loop, once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are accepted and computed."""
        try:
            self.check_healthy()
        except EngineError:
            return False
        return True

    @property
    def num_in_flight(self) -> int:
        """Requests whose stream has not ended."""
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks, for metrics.

        Those on their way to the scheduler are counted, except while the thread takes them over:
        an estimate, which nothing is decided by.
        """
        on_their_way = sum(isinstance(message, Request) for message in self._inbox)
        return on_their_way + self.scheduler.num_waiting

    def check_alive(self) -> None:
        """EngineDeadError if a step has raised, also after `stop`."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)

    def check_healthy(self) -> None:
        """EngineError unless `is_healthy`."""
        self.check_alive()
        if self._is_draining:
            raise EngineStoppingError(_STOPPING)
        if not self._thread.is_alive():
            raise EngineDeadError("the engine thread does not run")

    def check_accepts(self) -> None:
        """EngineError if a request submitted now would be refused, whatever it is.

        Streams are counted, which only the loop changes: the limit is exact.
        """
        self.check_healthy()
        config = self.scheduler.config
        if self.num_in_flight >= config.max_running + config.max_waiting:
            raise EngineBusyError(f"{self.num_in_flight} requests are in flight already")

    def submit(self, request: Request) -> TokenStream:
        """Queue a request; its tokens come out of the stream.

        EngineError if it is refused, PromptTooLong if it could never run.
        """
        self.check_accepts()
        self.scheduler.check_fits(request.num_prompt_tokens, request.sampling.max_tokens)
        assert request.id not in self._streams
        stream = self._streams[request.id] = TokenStream(request)
        self._send(request)
        return stream

    def abort(self, request_id: str) -> None:
        """Stop computing a request and free its blocks; its stream ends with ABORT.

        Without effect on a request that has ended. The blocks are free after the step that is
        being computed now.
        """
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.put([], FinishReason.ABORT)
            self._note_end()
            self._send(request_id)

    async def wait_until_dead(self) -> None:
        """Return once a step has raised; `stop` does not count."""
        await self._is_dead.wait()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `grace_s`, fail the rest, join."""
        self._is_draining = True
        self._note_end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), grace_s)
        self._fail_all(EngineStoppingError, _STOPPING)
        with self._wake:
            self._should_stop = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _send(self, message: Request | str) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            request_id = output.request.id
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # aborted while its token was computed
            if output.token_id is None:
                stream.fail(LogitsError("the model computed no numbers (NaN or infinite logits)"))
            else:
                stream.put([output.token_id], output.finish_reason)
            if output.finish_reason is not None:
                del self._streams[request_id]
                self._note_end()

    def _die(self, failure: str) -> None:
        self._failure = failure
        self._fail_all(EngineDeadError, failure)
        self._is_dead.set()

    def _fail_all(self, kind: type[EngineError], message: str) -> None:
        for stream in self._streams.values():
            stream.fail(kind(message))
        self._streams.clear()
        self._note_end()

    def _note_end(self) -> None:
        if self._is_draining and not self._streams:
            self._is_idle.set()

    # -- engine thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
        except BaseException as error:  # noqa: BLE001
            # Thread boundary: whatever it was, its state cannot be trusted any more, and the
            # requests must hear of it instead of waiting for ever.
            _log.exception("the engine thread failed")
            self._call_loop(self._die, f"a step failed: {type(error).__name__}: {error}")

    def _take_inbox(self) -> bool:
        """Apply submissions and aborts; sleep while there is nothing to do; False: stop."""
        with self._wake:
            while not (self._inbox or self._should_stop or self.scheduler.has_work):
                self._wake.wait()
            messages, self._inbox = self._inbox, deque()
            if self._should_stop:
                return False
        for message in messages:
            if isinstance(message, str):
                self.scheduler.abort(message)
            else:
                self.scheduler.add(message)
        return True

    def _step(self) -> None:
        if not self.scheduler.has_work:
            return  # woken by an abort
        step = self.scheduler.schedule()
        # An empty step changes nothing, so it would be followed by empty steps for ever.
        assert step.scheduled, f"no step for {self.scheduler!r}, which has work"
        logits = self._runner.forward(step.chunks)
        requests = step.sampling
        sampled = sample(
            logits,
            [request.sampling for request in requests],
            [len(request.token_ids) for request in requests],
        )
        outputs = self.scheduler.update(step, sampled)
        if outputs:
            self._call_loop(self._deliver, outputs)

    def _call_loop(self, function: Callable[[_T], None], argument: _T) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop was closed under us, so nobody listens any more
            self._should_stop = True
