"""Replicas that have registered themselves, each for a life that is renewed. Pure.

A process beside a replica writes into a store, each second, that it is here (registrar.py).
A router hears all of it, again and again, and counts each life from when it heard something new:
clocks of machines are never compared. So who is not in the store for a moment (a store that was
flushed, a failover that lost the last writes) stays until its life is over, and is back before;
and who says goodbye is gone at once, for that is written like everything else.

While the store is away nobody expires: that is a source that fails (roster.py). When it is back,
everybody has a whole life more to be heard again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from roost_router.discovery.roster import Told


class Registration(NamedTuple):
    """What a store has of a member."""

    member: bytes  # a process and one of its replicas
    mark: bytes  # another one each time that it is renewed
    url: str
    life_s: float
    left_s: float  # of its life, by the store's clock
    is_here: bool  # False: it has said goodbye


class _Heard(NamedTuple):
    registration: Registration
    expires: float


class Register:
    """What one router has heard."""

    def __init__(self) -> None:
        self._heard: dict[bytes, _Heard] = {}

    def hear(self, there: Iterable[Registration], now: float) -> list[Told]:
        """`there`: all that the store has. Returns who is here. O(members)."""
        listed = set()
        for registration in there:
            listed.add(registration.member)
            known = self._heard.get(registration.member)
            # What is not new does not live on, whatever a clock that was set back says is left.
            if known is None or known.registration.mark != registration.mark:
                left_s = min(registration.left_s, registration.life_s)
                self._heard[registration.member] = _Heard(registration, now + left_s)
        for member, heard in list(self._heard.items()):
            if heard.expires <= now and member not in listed:
                del self._heard[member]
        here = [heard for heard in self._heard.values() if heard.registration.is_here]
        return registered(((heard.registration.url, heard.expires) for heard in here), now)

    def reprieve(self, now: float) -> None:
        """The store was away: nobody could be heard. O(members)."""
        for member, heard in self._heard.items():
            expires = max(heard.expires, now + heard.registration.life_s)
            self._heard[member] = heard._replace(expires=expires)


def registered(entries: Iterable[tuple[str, float]], now: float) -> list[Told]:
    """Those that have not expired. Each entry is a URL and when it expires, on `now`'s clock."""
    return [Told(url) for url, expires in entries if now < expires]
