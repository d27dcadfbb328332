"""Late binding: a request is given to a replica only when one can start it soon. Pure.

    offer     the cheapest replica (priced.py) would start it within hold_s: bound; else held
    look      up to MAX_LOOKS held ones are decided again, in fair order (fair_queue.py), with what
              is true by now: the prefix may have arrived somewhere, a queue may have gone
    cancel    the client left
    dropped   whose deadline is over, and who had to make room

A queue in a replica is final, and blind to what comes later; the same queue here is not. Whoever
drives it (the router, or a simulator with its own clock) looks when work on a replica is released
and every LOOK_INTERVAL_S, and places what is bound before it asks for the next: each decision
is made on candidates as they are then.

A newcomer that could start at once waits for the next look all the same where a tenant that holds
requests was served less: else a flood would take each place that becomes free.

Those held are queue, too. Each waits for the replica that was its cheapest when it was last looked
at, and the prefill of those before it that wait for a replica counts as queued there in cost (not
in whether it could start: they are here, not there). Before a newcomer are all, before a held one
those that the look came to first. Else a queue that is kept short in the replicas looks short, all
wait for the one that holds a hot prefix, and the others idle.

One object serves requests that have the same replicas to choose from: one for each model.

Source: the simulations that docs/decisions/0004 quotes: mean TTFT is 1.67 times as long without
late binding; hold_s from 0.05 to 0.4 made no difference beyond 3 %.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, Generic

from roost_router.policy.cost import pick_least
from roost_router.policy.fair_queue import MAX_HELD, FairQueue, Held, Request
from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.kv_release import KvRelease
from roost_router.policy.priced import Price, cost_s, interference, prefill_s, start_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from random import Random

HOLD_S: Final = 0.15
LOOK_INTERVAL_S: Final = 0.02
MAX_LOOKS: Final = 32


class LateBinding(Generic[Request]):
    """The router's own queue before its replicas."""

    def __init__(self, hold_s: float = HOLD_S, max_held: int = MAX_HELD) -> None:
        self.queue: FairQueue[Request] = FairQueue(max_held)
        self.price = Price()
        self._hold_s = hold_s
        self._releases = KvRelease()
        self._displaced: list[Held[Request]] = []

    def offer(  # noqa: PLR0917
        self,
        request: Request,
        candidates: Sequence[Candidate],
        now: float,
        rng: Random,
        tenant: str = "",
        deadline_at: float | None = None,
    ) -> Decision | Held[Request] | None:
        """Bind a request that just came to one of `candidates` (at least one), or hold it.

        None where the queue is full and `tenant` has its share of it: the request is to be refused,
        it may come again later. `deadline_at`: seconds, monotonic. O(candidates), and O(tenants)
        while anything is held.
        """
        decision, starts_s = self._decide(candidates, now, rng, self.queue.waiting_s)
        best = candidates[decision.chosen]
        own_s = prefill_s(best)
        if starts_s <= self._hold_s and self.queue.may_pass(tenant):
            self.queue.served(tenant, own_s)
            return decision
        held, displaced = self.queue.add(request, tenant, own_s, best.name, now, deadline_at)
        if displaced is not None:
            self._displaced.append(displaced)
        return held

    def look(
        self, now: float, rng: Random, candidates_of: Callable[[Request], Sequence[Candidate]]
    ) -> Iterator[tuple[Held[Request], Decision]]:
        """Yield what can start now, each with its decision among `candidates_of(request)`.

        Place each before taking the next, so that it is among the others' load. A request without
        candidates stays; late ones are not bound any more. O(MAX_LOOKS * candidates).
        """
        ahead_s: defaultdict[str, float] = defaultdict(float)  # by replica that it waits for
        for held in self.queue.first(MAX_LOOKS):
            if not held.is_held or held.is_late(now):  # cancelled meanwhile
                continue
            candidates = candidates_of(held.request)
            if not candidates:
                continue
            decision, starts_s = self._decide(candidates, now, rng, ahead_s.__getitem__)
            best = candidates[decision.chosen]
            own_s = prefill_s(best)
            if starts_s > self._hold_s:
                self.queue.reorder(held, own_s, best.name)
                ahead_s[best.name] += own_s
                continue
            self.queue.served(held.tenant, own_s)
            self.queue.remove(held)
            yield held, decision

    def cancel(self, held: Held[Request]) -> None:
        """Its client left. Idempotent."""
        self.queue.remove(held)

    def dropped(self, now: float) -> list[Held[Request]]:
        """Take out those whose deadline is over; with them who made room for others. O(held)."""
        late = [held for held in self.queue.held() if held.is_late(now)]
        for held in late:
            self.queue.remove(held)
        dropped, self._displaced = self._displaced + late, []
        return dropped

    def released(self, name: str, tokens: int, now: float) -> None:
        """A request that held `tokens` of KV (prompt and answer) left the replica `name`."""
        self._releases.released(name, tokens, now)

    def _decide(
        self,
        candidates: Sequence[Candidate],
        now: float,
        rng: Random,
        waiting_s: Callable[[str], float],
    ) -> tuple[Decision, float]:
        """The cheapest candidate, and the seconds until it would start.

        `waiting_s`: by name of a replica, prefill that waits here for it and goes first.
        """
        num_busy = sum(c.queued_tokens > 0 for c in candidates)
        self.price.observe(num_busy / len(candidates), now)
        price = self.price.value
        rate = self._releases.tokens_per_s
        starts = [start_s(c, rate(c.name, c.kv_capacity_tokens, now)) for c in candidates]
        costs = [
            cost_s(c, start + interference(c) * waiting_s(c.name), price)
            for c, start in zip(candidates, starts, strict=True)
        ]
        chosen = pick_least(candidates, costs, rng)
        return Decision(chosen, costs), starts[chosen]
