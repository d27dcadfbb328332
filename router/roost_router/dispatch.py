"""Dispatch: a new request is placed at once, or held until a replica can start it. Pure.

    offer     a request came: placed, or held
    look      what was held and can start by now is placed; what never can is given up
    cancel    its client left, or its time is up

The data path and the simulator drive the same object, each with its own kind of request: offer each
new one; while any is held look every LOOK_INTERVAL_S, and when a first token or an end releases
work, but MIN_LOOK_S apart at least. Only under our own policy are requests held
(policy/late_binding.py); under any other, all are placed at once. Requests that come back from a
replica that failed them have waited already: Placer.place is for those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from roost_router.errors import HeldTooManyError, RouterError
from roost_router.placement import Placement, Placer
from roost_router.policy.cost import CostPolicy
from roost_router.policy.fair_queue import MAX_HELD, Held
from roost_router.policy.late_binding import LateBinding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from roost_router.fleet.replica import Replica
    from roost_router.openai_request import RoutingFields


class Asking(Protocol):
    """A request, as its owner keeps it."""

    @property
    def fields(self) -> RoutingFields:
        """What it is placed by."""
        ...


Request = TypeVar("Request", bound=Asking)


class Dispatcher(Generic[Request]):
    """New requests on their way to replicas."""

    def __init__(self, placer: Placer, rng: Random, max_held: int = MAX_HELD) -> None:
        """`max_held`: of each model, at most."""
        self._placer: Final = placer
        self._rng: Final = rng
        self._max_held: Final = max_held
        self._late: Final[dict[str, LateBinding[Request]]] = {}  # by model
        placer.fleet.watch(self)

    def __repr__(self) -> str:
        return f"<Dispatcher {self.num_held} held | {len(self._late)} models>"

    def joined(self, replica: Replica) -> None:
        """A replica was added; nothing is kept before a request waits for it."""

    def gone(self, replica: Replica) -> None:
        """It was removed, and its last request is over."""
        for late in self._late.values():
            late.queue.forget(replica.name)

    @property
    def num_held(self) -> int:
        """Requests that wait, of all models."""
        return sum([len(late.queue) for late in self._late.values()])

    def waiting_s(self) -> dict[str, float]:
        """Prefill seconds of all that wait, by the replica that was cheapest at their last look.

        O(models * replicas).
        """
        waiting_s: dict[str, float] = {}
        for late in self._late.values():
            for replica, prefill_s in late.queue.waiting_s.items():
                waiting_s[replica] = waiting_s.get(replica, 0.0) + prefill_s
        return waiting_s

    def held(self) -> list[Held[Request]]:
        """All that wait, by model, then by arrival. O(held * log)."""
        return [held for late in self._late.values() for held in late.queue.held()]

    def offer(
        self, request: Request, now: float, tenant: str = ""
    ) -> tuple[Placement | Held[Request], Held[Request] | None]:
        """Place or hold a request that just came.

        Returns its placement, or its handle while it is held; and the handle of another that had
        to make room for it, if one had to, which is to be refused with HeldTooManyError.

        Raises ModelNotFoundError, NoReplicaError, or HeldTooManyError for `request` itself.
        O(candidates).
        """
        placer, model = self._placer, request.fields.model
        options = placer.weigh(request.fields, now)
        policy = placer.policy(model)
        if not isinstance(policy, CostPolicy) or not policy.holds:
            return placer.bind(options, placer.decide(options), now), None
        late = self._late.get(model)
        if late is None:
            late = self._late[model] = LateBinding(policy, max_held=self._max_held)
        taken, displaced = late.offer(request, options.candidates, now, self._rng, tenant)
        if taken is None:
            raise HeldTooManyError(len(late.queue))
        if isinstance(taken, Held):
            return taken, displaced
        return placer.bind(options, taken, now), displaced

    def look(self, now: float) -> Iterator[tuple[Request, Placement | RouterError]]:
        """Place what can start by now; yields each with its placement, or why it never can.

        O(models * MAX_LOOKS * candidates).
        """
        placer = self._placer
        for late in list(self._late.values()):
            look = late.look(self._rng)
            for held in look.requests:
                if not held.is_held:  # cancelled meanwhile
                    continue
                try:
                    options = placer.weigh(held.request.fields, now)
                except RouterError as error:  # its replicas have gone
                    late.cancel(held)
                    yield held.request, error
                    continue
                decision = look.decide(held, options.candidates)
                if decision is not None:
                    yield held.request, placer.bind(options, decision, now)
                elif look.is_over:
                    break

    def cancel(self, held: Held[Request]) -> None:
        """Hold it no more. Idempotent."""
        late = self._late.get(held.request.fields.model)
        if late is not None:
            late.cancel(held)
