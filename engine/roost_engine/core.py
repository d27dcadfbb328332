"""Engine core: the thread that turns requests into tokens, and its bridge to asyncio.

    event loop                                   engine thread
    ----------                                   -------------
    submit, abort --> inbox (under a condition) --> scheduler.add / abort
                                                    schedule -> forward -> sample -> update
    TokenStream <-- call_soon_threadsafe <--------- tokens of the step, one call a step

The thread sleeps on the condition while there is nothing to do. Scheduler and pool belong to
it; the loop only reads their counters, which are plain integers.

Beside tokens a step gives log probabilities to who asked for them, and it ends what the scheduler
does not know the end of: a stop token of the request's own, a grammar that allows nothing more.

Requests whose deadline passed while they waited end with DeadlineError.

A step that aborts have made useless is interrupted, where the runner can be (interruption.py).
It is as if it had not been computed, except that its copies were made: `update` is not called,
nobody's tokens, rules or cached blocks change, and the next step computes what is still wanted.

A step that raises ends the thread: every request in flight fails with EngineDeadError, later
ones are refused with it, `is_healthy` turns false, `wait_until_dead` returns, and nobody waits
for ever. A request whose logits are no numbers fails alone (LogitsError), the others go on.

Invariants: each stream gets exactly one end (a finish reason or an error); every error raised
is an object of its own, since a traceback keeps alive what its frames held; `submit`, `abort`,
`stop` and TokenStream are used from the event loop only.

KV events that are due after a step go to the event loop as tokens do; see kv_teller.py.

Not here: what a step holds (scheduler.py), text (frontend.py), HTTP (server.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import msgspec
import numpy as np

from roost_engine.engine_errors import (
    DeadlineError,
    EngineBusyError,
    EngineDeadError,
    EngineError,
    EngineStoppingError,
    LogitsError,
)
from roost_engine.interruption import Interruption, StepInterruptedError
from roost_engine.kv_teller import HEARTBEAT_S
from roost_engine.logits import token_logprobs
from roost_engine.request import FinishReason, Request, TokenLogprobs
from roost_engine.retry_after import EndRate
from roost_engine.sampling import sample, sample_plain
from roost_engine.scheduler import Output
from roost_engine.token_stream import TokenStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from roost_engine.batch import BlockCopy, Chunk
    from roost_engine.kv_teller import KvTeller
    from roost_engine.sampling import Draw, RowEdit
    from roost_engine.scheduler import Scheduler, Step
    from roost_wire.told_load import ToldLoad

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_STOPPING = "the engine is shutting down"


class Runner(Protocol):
    """What computes a step; NativeRunner or ModelRunner in production, a fake in tests."""

    def forward(self, chunks: Sequence[Chunk]) -> npt.ArrayLike:
        """Logits (rows, vocab) float32 of the chunks with `wants_logits`, in their order.

        Whatever numpy can view; it is read before the next call.
        """
        ...


@runtime_checkable
class Interruptible(Protocol):
    """A runner whose `forward` can be ended from another thread."""

    def interrupt(self) -> None:
        """Make the `forward` under way raise StepInterruptedError soon, unless it is done."""
        ...


class _Sampled(msgspec.Struct, frozen=True, gc=False):
    """An output on its way to its stream."""

    output: Output
    logprobs: TokenLogprobs | None


class EngineCore:
    """Owns the engine thread. Create, `start`, `submit` ..., `stop`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        copy_blocks: Callable[[Sequence[BlockCopy]], None] | None = None,
        draw: Draw = sample_plain,
        kv_teller: KvTeller | None = None,
    ) -> None:
        """`copy_blocks` executes orders of a host tier, in their order; None: there is no tier.

        `draw` draws tokens from final rows of logits. `kv_teller` has the log of the scheduler's
        pool; its listeners are called on the event loop.
        """
        self.scheduler = scheduler
        self._runner = runner
        self._copy_blocks = copy_blocks
        self._draw = draw
        self._kv_teller = kv_teller
        self._streams: dict[str, TokenStream] = {}  # event loop only
        self._ends = EndRate()  # event loop only
        self._wake = threading.Condition()
        self._inbox: deque[Request | str] = deque()  # under _wake; str: id to abort
        self._interrupt = runner.interrupt if isinstance(runner, Interruptible) else None
        self._interruption = Interruption()  # under _wake
        self._should_stop = False  # under _wake
        self._is_kv_due = False  # under _wake; somebody asked for a snapshot
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
        return len(self._on_their_way()) + self.scheduler.num_waiting

    @property
    def load(self) -> ToldLoad:
        """What is to be done, those on their way to the scheduler included; as `num_waiting`."""
        on_their_way, load = self._on_their_way(), self.scheduler.load
        num_tokens = sum(len(request.token_ids) for request in on_their_way)
        return msgspec.structs.replace(
            load,
            num_waiting=load.num_waiting + len(on_their_way),
            queued_tokens=load.queued_tokens + num_tokens,
        )

    def _on_their_way(self) -> list[Request]:
        return [message for message in self._inbox if isinstance(message, Request)]

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

    def check_accepts(self, count: int = 1) -> None:
        """EngineError if `count` requests submitted now would be refused, whatever they are.

        Streams are counted, which only the loop changes: the limit is exact.
        """
        self.check_healthy()
        config = self.scheduler.config
        if self.num_in_flight + count > config.max_running + config.max_waiting:
            raise EngineBusyError(
                f"{self.num_in_flight} requests are in flight already", self.retry_after_s()
            )

    def retry_after_s(self) -> int:
        """When who is refused now should come back; see retry_after.py."""
        return self._ends.retry_after_s(self.num_waiting, time.monotonic())

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
        being computed now, which is interrupted if it was mostly for this request.
        """
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.put([], FinishReason.ABORT)
            self._note_end()
            self._send(request_id)

    def ask_kv_snapshot(self) -> None:
        """Have the teller tell all blocks that are resident, soon."""
        assert self._kv_teller is not None
        with self._wake:
            self._kv_teller.ask_snapshot()
            self._is_kv_due = True
            self._wake.notify()

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
            if isinstance(message, str) and self._interrupt and self._interruption.leave(message):
                self._interrupt()  # under the lock: the next step must not hear of it

    def _deliver(self, sampled: Sequence[_Sampled]) -> None:
        now = time.monotonic()
        for each in sampled:
            output = each.output
            request_id = output.request.id
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # aborted while its token was computed
            if output.token_id is None:
                stream.fail(self._why_no_token(output))
            else:
                stream.put([output.token_id], output.finish_reason, each.logprobs)
            if output.finish_reason is not None:
                del self._streams[request_id]
                self._ends.note(now)
                self._note_end()

    def _why_no_token(self, output: Output) -> EngineError:
        if output.finish_reason is FinishReason.ABORT:
            waited_s = time.monotonic() - output.request.arrival_s
            return DeadlineError(
                f"the deadline passed while the request waited, for {waited_s:.1f} s",
                self.retry_after_s(),
            )
        rules = output.request.rules
        failure = rules.failure if rules is not None else None
        return LogitsError(failure or "the model computed no numbers (NaN or infinite logits)")

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
                self._tell_kv()
        except BaseException as error:  # noqa: BLE001
            # Thread boundary: whatever it was, its state cannot be trusted any more, and the
            # requests must hear of it instead of waiting for ever.
            _log.exception("the engine thread failed")
            self._call_loop(self._die, f"a step failed: {type(error).__name__}: {error}")

    def _take_inbox(self) -> bool:
        """Apply submissions and aborts; sleep while there is nothing to do; False: stop."""
        with self._wake:
            while not (
                self._inbox or self._should_stop or self._is_kv_due or self.scheduler.has_work
            ):
                # Without followers it sleeps until it is woken.
                if not self._wake.wait(HEARTBEAT_S if self._kv_teller is not None else None):
                    break
            self._is_kv_due = False
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
        overdue = self.scheduler.expire(time.monotonic())
        if overdue:
            self._call_loop(self._deliver, [_Sampled(output, None) for output in overdue])
        if not self.scheduler.has_work:
            return  # woken by an abort, or nobody waits any more
        step = self.scheduler.schedule()
        # An empty step changes nothing, so it would be followed by empty steps for ever.
        assert step.scheduled, f"no step for {self.scheduler!r}, which has work"
        if self._kv_teller is not None and self._kv_teller.is_load_news(self.scheduler):
            self._tell_kv()  # before the step, which may take long
        if step.copies:
            assert self._copy_blocks is not None, "a host tier needs somebody who copies"
            self._copy_blocks(step.copies)
        rows = self._compute(step)
        if rows is None:
            self.scheduler.discard()
            return
        requests = step.sampling
        tokens = sample(
            rows,
            [request.sampling for request in requests],
            [len(request.token_ids) for request in requests],
            [_edit(request) for request in requests],
            self._draw,
        )
        _settle(requests, tokens)
        logprobs = _logprobs(rows, requests, tokens)
        outputs = [self._end_early(output) for output in self.scheduler.update(step, tokens)]
        if outputs:
            sampled = [_Sampled(output, logprobs.get(output.request.id)) for output in outputs]
            self._call_loop(self._deliver, sampled)

    def _tell_kv(self) -> None:
        """Hand to the event loop what is due."""
        if self._kv_teller is not None:
            for listener, batch in self._kv_teller.due(self.scheduler, time.monotonic()):
                self._call_loop(listener, batch)

    def _compute(self, step: Step) -> npt.NDArray[np.float32] | None:
        """Logits of the step; None if it was interrupted."""
        with self._wake:
            self._interruption.begin(step)
            have_left = [message for message in self._inbox if isinstance(message, str)]
            is_useless = any(self._interruption.leave(request_id) for request_id in have_left)
        rows = None
        if not is_useless:
            with contextlib.suppress(StepInterruptedError):
                rows = np.asarray(self._runner.forward(step.chunks))
        with self._wake:
            self._interruption.end(was_interrupted=rows is None)
        return rows

    def _end_early(self, output: Output) -> Output:
        """End a request that says itself where it ends."""
        request, token_id = output.request, output.token_id
        if token_id is None or output.finish_reason is not None:
            return output
        rules = request.rules
        is_over = token_id in request.sampling.stop_token_ids or (
            rules is not None and rules.is_complete(request.token_ids, request.num_prompt_tokens)
        )
        if not is_over:
            return output
        self.scheduler.abort(request.id)
        return Output(request, token_id, FinishReason.STOP)

    def _call_loop(self, function: Callable[[_T], None], argument: _T) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop was closed under us, so nobody listens any more
            self._should_stop = True


def _settle(requests: Sequence[Request], tokens: list[int | None]) -> None:
    """Put what continued answers still owe in place of what was sampled."""
    for row, request in enumerate(requests):
        sampled = tokens[row]
        if request.owed_ids and sampled is not None:
            tokens[row] = request.settle(sampled)


def _edit(request: Request) -> RowEdit | None:
    """What changes the request's row before sampling."""
    if request.rules is None:
        return None
    return partial(
        request.rules.apply,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
    )


def _logprobs(
    rows: npt.NDArray[np.float32], requests: Sequence[Request], tokens: Sequence[int | None]
) -> dict[str, TokenLogprobs]:
    """Log probabilities of those who asked for them, by request id."""
    return {
        request.id: token_logprobs(row, token_id, request.sampling.logprobs)
        for row, request, token_id in zip(rows, requests, tokens, strict=True)
        if request.sampling.logprobs is not None and token_id is not None
    }
