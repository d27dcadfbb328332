"""Simulated replicas by the wall clock: fleet_sim's own, awaited instead of skipped through.

    seconds of the simulation = seconds of the wall * speed-up

A timer may be late. The replica then catches up: each of its steps ends when it had to, whatever
the clock says meanwhile, so that lateness never adds up and shows once, where a client waits.
How late timers were is kept, for whoever judges a run.

Not here: HTTP (mock_engines.py), what a step holds (fleet_sim/replica.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from roost_loadtest.fleet_sim.replica import Happened, Job, SimReplica


class Timer(Protocol):
    """What can be cancelled, as asyncio.TimerHandle."""

    def cancel(self) -> None:
        """Do not call any more."""
        ...


class SteppedReplica(SimReplica):
    """One whose streams can be watched between two events."""

    @property
    def num_steps(self) -> int:
        """Steps of all stretches that have ended."""
        return self._num_steps

    def steps_by(self, now: float) -> int:
        """Steps done by `now`: a stream gets a token in each. O(1).

        Within a stretch they are taken to be alike.
        """
        if self.ends_s is None or self.ends_s <= self._began_s:
            return self._num_steps
        done = (now - self._began_s) / (self.ends_s - self._began_s)
        return self._num_steps + int(self._steps * min(1.0, max(0.0, done)))


class PacedReplica:
    """One simulated replica under a clock."""

    def __init__(
        self,
        replica: SteppedReplica,
        *,
        clock: Callable[[], float],
        call_at: Callable[[float, Callable[[], None]], Timer],
        tell: Callable[[Happened, Job], None],
    ) -> None:
        """`clock` and `call_at` in seconds of the simulation; `tell` hears what happens."""
        self.replica = replica
        self.late_s: list[float] = []  # of each timer, in seconds of the simulation
        self._clock = clock
        self._call_at = call_at
        self._tell = tell
        self._timer: Timer | None = None
        self._planned_s = 0.0

    def submit(self, job: Job) -> None:
        """Take a request now."""
        now = self._clock()
        self._catch_up(now)
        job.arrived_s = now
        self.replica.submit(job, now)
        self._plan()

    def tokens_of(self, job: Job, first_step: int) -> int:
        """Tokens that a stream has by now, if its first came when `first_step` steps were done."""
        done = self.replica.steps_by(self._clock()) - first_step
        return min(job.request.output_tokens, 1 + max(0, done))

    def _due(self) -> None:
        now = self._clock()
        self.late_s.append(max(0.0, now - self._planned_s))
        self._timer = None
        self._catch_up(now)
        self._plan()

    def _catch_up(self, now: float) -> None:
        replica = self.replica
        while replica.ends_s is not None and replica.ends_s <= now:
            for what, job in replica.step(replica.ends_s):
                self._tell(what, job)

    def _plan(self) -> None:
        due = self.replica.ends_s
        if due is None or (self._timer is not None and self._planned_s == due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._planned_s = due
        self._timer = self._call_at(due, self._due)
