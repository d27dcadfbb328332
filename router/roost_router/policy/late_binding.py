"""Late binding: a request is given to a replica only when one can start it soon. Pure.

    offer     the cheapest replica (cost.py) would start it within hold_s: bound; else held
    look      up to MAX_LOOKS held ones are decided again, in fair order (fair_queue.py), with what
              is true by now: the prefix may have arrived somewhere, a queue may have gone
    cancel    the client left, or its time is up

A queue in a replica is final, and blind to what comes later; the same queue here is not. Whoever
drives it (dispatch.py) looks every LOOK_INTERVAL_S while anything is held, and places what is bound
before it asks for the next: each decision is made on candidates as they are then. A look ends where
every replica has more than hold_s of queue: nothing can start.

Nothing is held for a replica that has not shown a first token yet (one whose answers are never
streamed never does): how long its queue is in seconds would be a guess, and a wrong one would keep
it idle.

A newcomer that could start at once waits for the next look all the same where a tenant that holds
requests was served less: else a flood would take each place that becomes free.

Those held are queue, too. Each waits for the replica that was its cheapest when it was last looked
at, and the prefill of those before it that wait for a replica counts as queued there in cost (not
in whether it could start: they are here, not there). Before a newcomer are all, before a held one
those that the look came to first. Else a queue that is kept short in the replicas looks short, all
wait for the one that holds a hot prefix, and the others idle.

Whether one could start is judged by waits as they turn out: where first tokens come sooner than
predicted (fleet/speed.py), by as much. Not so in cost: a queue that looks shorter draws whoever
wants a hot prefix to its holder (32 replicas: up to a third more TTFT).

One object serves requests that have the same replicas to choose from: one for each model.

Source: the simulations that docs/decisions/0004 quotes: mean TTFT is 1.67 times as long without
late binding; hold_s from 0.05 to 0.4 made no difference beyond 3 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic

from roost_router.policy.cost import CostPolicy, prefill_s, queue_s
from roost_router.policy.fair_queue import MAX_HELD, FairQueue, Held, Request
from roost_router.policy.interface import Candidate, Decision

if TYPE_CHECKING:
    from random import Random

HOLD_S: Final = 0.15
LOOK_INTERVAL_S: Final = 0.02
#: Between two looks at the least, however often work is released.
MIN_LOOK_S: Final = 0.002
MAX_LOOKS: Final = 32


class LateBinding(Generic[Request]):
    """The router's own queue before its replicas."""

    def __init__(
        self, policy: CostPolicy, hold_s: float = HOLD_S, max_held: int = MAX_HELD
    ) -> None:
        self.queue: FairQueue[Request] = FairQueue(max_held)
        self._policy: Final = policy
        self._hold_s: Final = hold_s

    def offer(
        self,
        request: Request,
        candidates: list[Candidate],
        now: float,
        rng: Random,
        tenant: str = "",
    ) -> tuple[Decision | Held[Request] | None, Held[Request] | None]:
        """Bind a request that just came to one of `candidates` (at least one), or hold it.

        Returns what became of it, and who had to make room for it, if anybody. None where the queue
        is full and `tenant` has its share of it: the request is to be refused, it may come again
        later. O(candidates), and O(tenants) while anything is held.
        """
        decision, starts_s = self._policy.pick_behind(candidates, rng, self.queue.waiting_s)
        best = candidates[decision.chosen]
        own_s = prefill_s(best)
        if _starts_soon(best, starts_s, self._hold_s) and self.queue.may_pass(tenant):
            self.queue.served(tenant, own_s)
            return decision, None
        return self.queue.add(request, tenant, own_s, best.name, now)

    def look(self, rng: Random) -> Look[Request]:
        """Decide held requests again; see Look."""
        return Look(self.queue, self._policy, self._hold_s, rng)

    def cancel(self, held: Held[Request]) -> None:
        """Take one out. Idempotent."""
        self.queue.remove(held)


class Look(Generic[Request]):
    """One look at what is held.

    For each of `requests` ask `decide`, and place it before taking the next, so that it is among
    the others' load. Stop where `is_over`.
    """

    def __init__(
        self,
        queue: FairQueue[Request],
        policy: CostPolicy,
        hold_s: float,
        rng: Random,
    ) -> None:
        self.requests: Final = queue.first(MAX_LOOKS)
        self.is_over = False  # every replica has a queue: nothing can start
        self._queue: Final = queue
        self._policy: Final = policy
        self._hold_s: Final = hold_s
        self._rng: Final = rng
        self._ahead_s: Final[dict[str, float]] = {}  # by replica that it waits for

    def decide(self, held: Held[Request], candidates: list[Candidate]) -> Decision | None:
        """Where a held request goes, which is held no more; None: it waits on. O(candidates)."""
        if not any(_starts_soon(one, queue_s(one), self._hold_s) for one in candidates):
            self.is_over = True
            return None
        decision, starts_s = self._policy.pick_behind(candidates, self._rng, self._ahead_s)
        best = candidates[decision.chosen]
        own_s = prefill_s(best)
        if not _starts_soon(best, starts_s, self._hold_s):
            self._queue.reorder(held, own_s, best.name)
            self._ahead_s[best.name] = self._ahead_s.get(best.name, 0.0) + own_s
            return None
        self._queue.served(held.tenant, own_s)
        self._queue.remove(held)
        return decision


def _starts_soon(candidate: Candidate, starts_s: float, hold_s: float) -> bool:
    return candidate.wait_scale * starts_s <= hold_s or not candidate.is_speed_known
