"""What each kind of source is to discover.py: a stream of views and failures."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

from roost_router.discovery.roster import Told


class Failed(NamedTuple):
    """A source could not be asked, or answered nonsense."""

    reason: str


class Source(Protocol):
    """A place where replicas are found."""

    @property
    def name(self) -> str:
        """For logs and tables; no other source's."""
        ...

    @property
    def linger_s(self) -> float:
        """Seconds for which a replica stays that an answer lacks."""
        ...

    def answers(self) -> AsyncGenerator[list[Told] | Failed, None]:
        """Whole views, whenever there is something new, and failures; without end."""
        ...

    def hurry(self) -> None:
        """Look now: the operator says that something has changed."""
        ...
