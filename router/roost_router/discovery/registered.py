"""Replicas that have registered themselves, each until a time of its own. Pure.

A replica, or a process beside it, writes its URL and an expiry into a store, again and again.
Whoever reads the store makes a view of it with `registered`; when the store cannot be read, that is
a source that fails (roster.py), and nobody expires meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable

from roost_router.discovery.roster import Told


def registered(entries: Iterable[tuple[str, float]], now: float) -> list[Told]:
    """Those that have not expired. Each entry is a URL and when it expires, on `now`'s clock."""
    return [Told(url) for url, expires in entries if now < expires]
