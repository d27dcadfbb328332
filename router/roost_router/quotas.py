"""What keys may ask for in a minute: requests, and tokens of prompts. Pure.

Each limit is a token bucket that all routers share: it holds a minute's worth at most, and is
filled as fast as the limit says. The store has the buckets (store/scripts/spend.lua); a router
tells it what it spent, soon afterwards, and hears the level L. Until it hears more it may spend its
part of that, and of what flows in:

    allowance = L / routers - what was spent since + seconds * rate / routers

So no request waits for the store; routers that see the same level never spend more than it has; and
a router that is alone goes on with its part of the limit. A request comes in while there is any
allowance, and may bring it below zero, for a prompt may be larger than the bucket: on the whole
that is no more than the limit, for debts are paid first. Tokens are estimated when a request comes
and corrected when its replica has counted them; one that no replica got is paid back.

Not here: where limits come from (keys.py), telling the store (store/spending.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Final, NamedTuple

from roost_router.errors import QuotaError

MINUTE_S: Final = 60.0


class Limits(NamedTuple):
    """Of one name, a minute; 0: none."""

    num_requests: int = 0
    num_tokens: int = 0


class Meter:
    """A bucket as this router sees it."""

    __slots__ = ("allowance", "at", "in_flight", "limit", "name", "spent")

    def __init__(self, name: str, limit: int, allowance: float, now: float) -> None:
        self.name: Final = name  # of the bucket
        self.limit: Final = limit  # a minute; as many as it holds
        self.allowance = allowance
        self.at = now  # when that was
        self.spent = 0.0  # what the store does not know of yet ...
        self.in_flight = 0.0  # ... and what it is being told of

    def allow(self, num_routers: int, now: float) -> float:
        """Let flow in what has come, and return the allowance."""
        part = self.limit / num_routers
        inflow = (now - self.at) * part / MINUTE_S
        self.allowance = min(part, self.allowance + inflow)
        self.at = now
        return self.allowance

    def spend(self, amount: float) -> None:
        """Less is left; or more, if `amount` is negative."""
        self.allowance -= amount
        self.spent += amount


class Charge(NamedTuple):
    """What a request cost, as it was estimated."""

    requests: Meter | None
    tokens: Meter | None
    num_tokens: int


_FREE: Final = Charge(None, None, 0)


class Quotas:
    """What one router knows of all buckets."""

    def __init__(self) -> None:
        self.num_routers = 1  # that share the limits, as last heard
        self._meters: dict[str, Meter] = {}

    @property
    def has_limits(self) -> bool:
        """Whether anybody has one."""
        return bool(self._meters)

    def set_limits(self, limits: Mapping[str, Limits], now: float) -> None:
        """From now on these hold, by name. O(names)."""
        meters: dict[str, Meter] = {}
        for owner, limit in limits.items():
            for kind, most in (("r", limit.num_requests), ("t", limit.num_tokens)):
                if most:
                    name = f"{kind}:{owner}"
                    known = self._meters.get(name)
                    if known is None or known.limit != most:
                        known = Meter(name, most, most / self.num_routers, now)
                    meters[name] = known
        self._meters = meters

    def charge(self, owner: str, num_tokens: int, now: float) -> Charge:
        """A request of that name comes in. Raises QuotaError. O(1)."""
        if not self._meters:
            return _FREE
        requests = self._meters.get(f"r:{owner}")
        tokens = self._meters.get(f"t:{owner}")
        for meter, what in ((requests, "requests"), (tokens, "tokens")):
            if meter is not None and meter.allow(self.num_routers, now) <= 0:
                rate = meter.limit / MINUTE_S / self.num_routers
                raise QuotaError(what, meter.limit, max(1, ceil(-meter.allowance / rate)))
        if requests is not None:
            requests.spend(1.0)
        if tokens is not None:
            tokens.spend(num_tokens)
        return Charge(requests, tokens, num_tokens)

    def settle(self, charge: Charge, num_tokens: int | None) -> None:
        """The request's prompt had so many tokens; None: nobody counted them."""
        if charge.tokens is not None and num_tokens is not None:
            charge.tokens.spend(num_tokens - charge.num_tokens)

    def give_back(self, charge: Charge) -> None:
        """No replica got the request."""
        if charge.requests is not None:
            charge.requests.spend(-1.0)
        if charge.tokens is not None:
            charge.tokens.spend(-charge.num_tokens)

    def take(self, *, every: bool) -> list[Meter]:
        """Meters to tell the store of: those with something spent, or all. O(names).

        Their `in_flight` is what is told; then `heard` or `failed` is called for each.
        """
        taken = [meter for meter in self._meters.values() if every or meter.spent]
        for meter in taken:
            meter.in_flight, meter.spent = meter.spent, 0.0
        return taken

    def heard(self, meter: Meter, level: float, now: float) -> None:
        """The store took it, and has so much left for all."""
        meter.in_flight = 0.0
        meter.allowance = level / self.num_routers - meter.spent
        meter.at = now

    @staticmethod
    def failed(meters: Iterable[Meter]) -> None:
        """They were not told, or perhaps: once is counted, and not twice."""
        for meter in meters:
            meter.in_flight = 0.0
