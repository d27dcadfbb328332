"""An event loop in virtual time, for one seed always the same.

Nothing sleeps: when no callback is ready, the clock jumps to the next timer or the next event of
the simulated world (bytes arriving somewhere). What asyncio promises holds here too: callbacks of
`call_soon` run in order. What it leaves open is drawn from the seed: the order of timers and
arrivals that one turn of the loop finds, and how late it finds them (a busy loop handles in one
turn what came meanwhile, before any of the follow-ups).

Timers that the code under test sets are kept apart from the world's events, so that a run can
tell at its end what the code has left behind.

Not here: connections (network.py).
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from random import Random
from typing import Any, Protocol, TypeVar, TypeVarTuple

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

#: How often a turn comes late, and by how much at most.
_LATE_SHARE = 0.1
_MAX_LATE_S = 0.003


class StuckError(Exception):
    """The run went on for longer than any sound run does."""


class Connector(Protocol):
    """The network, as the loop sees it."""

    async def connect(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Dial out. Raises OSError."""
        ...

    def listen(self, factory: Callable[[], asyncio.BaseProtocol]) -> asyncio.AbstractServer:
        """Accept connections."""
        ...


class VirtualLoop(asyncio.AbstractEventLoop):
    """See the module's docstring. Only what the router uses is there."""

    def __init__(self, rng: Random, *, max_steps: int, max_time_s: float) -> None:
        self._rng = rng
        self._now = 0.0
        self._sequence = 0
        self._steps_left = max_steps
        self._max_time_s = max_time_s
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.unhandled: list[str] = []  # what reached the loop's exception handler
        self.network: Connector | None = None

    # running

    def run(self, main: Coroutine[Any, Any, _T]) -> _T:
        """Run until `main` returns. Raises StuckError beyond the limits on turns and time."""
        asyncio._set_running_loop(self)  # noqa: SLF001  a loop's own job
        try:
            task = asyncio.Task(main, loop=self)
            while not task.done():
                self._turn()
            return task.result()
        finally:
            asyncio._set_running_loop(None)  # noqa: SLF001  a loop's own job

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Let something happen in the world at `when` (seconds); it cannot be cancelled."""
        self._sequence += 1
        heapq.heappush(self._events, (when, self._sequence, call, args))

    def pending_timers(self) -> list[str]:
        """Timers of the code under test that would still fire."""
        return [repr(timer) for _, _, timer in self._timers if not timer.cancelled()]

    def pending_tasks(self) -> list[str]:
        """Tasks of the code under test that are not done."""
        return [repr(task.get_coro()) for task in self.tasks if not task.done()]

    def _turn(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise StuckError(f"no end after {self._now:.3f} s: too many turns of the loop")
        num_ready = len(self._ready)
        due = self._due()
        for _ in range(num_ready):
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()  # noqa: SLF001  a loop's own job
        for call, args in due:
            call(*args)

    def _due(self) -> list[tuple[Callable[..., None], tuple[Any, ...]]]:
        """What happens in this turn besides callbacks that are ready, in a drawn order."""
        timers, events = self._timers, self._events
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not self._ready:
            self._advance()
        now = self._now
        due: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        while events and events[0][0] <= now:
            _, _, call, args = heapq.heappop(events)
            due.append((call, args))
        while timers and timers[0][0] <= now:
            due.append((_run_timer, (heapq.heappop(timers)[2],)))
        if len(due) > 1:
            self._rng.shuffle(due)
        return due

    def _advance(self) -> None:
        """Jump to when something happens next, or a little later."""
        timers, events = self._timers, self._events
        if timers and (not events or timers[0][0] < events[0][0]):
            first = timers[0][0]
        elif events:
            first = events[0][0]
        else:
            raise StuckError(f"no end after {self._now:.3f} s: nothing will ever happen")
        self._now = max(self._now, first)
        if self._rng.random() < _LATE_SHARE:
            self._now += self._rng.random() * _MAX_LATE_S
        if self._now > self._max_time_s:
            raise StuckError(f"no end after {self._now:.3f} s of virtual time")

    # what asyncio asks of a loop

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def get_debug(self) -> bool:
        """Off."""
        return False

    def is_running(self) -> bool:
        """Always: nobody sees a loop outside its run."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False

    def call_soon(
        self,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Run in the next turn, in order."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run after `delay` seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run at `when`."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """asyncio tells; cancelled timers are dropped when their time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        """asyncio's own."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, _T] | Awaitable[_T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[_T]:
        """asyncio's own; remembered, to find those that never end."""
        task: asyncio.Task[_T] = asyncio.Task(
            coro,  # type: ignore[arg-type]
            loop=self,
            name=name or "task",
            context=context,
        )
        self.tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Nothing may end here: kept as a finding."""
        self.unhandled.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def create_connection(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: str,
        port: int,
        **options: object,  # noqa: ARG002
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Dial over the simulated network."""
        assert self.network is not None
        return await self.network.connect(protocol_factory, host, port)

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        **options: object,  # noqa: ARG002
    ) -> asyncio.AbstractServer:
        """Listen on the simulated network."""
        assert self.network is not None
        return self.network.listen(protocol_factory)


def _run_timer(timer: asyncio.TimerHandle) -> None:
    if not timer.cancelled():
        timer._run()  # noqa: SLF001  a loop's own job
