"""What takes in the blocks of a stream; index/token_index.py behind it in production."""

from __future__ import annotations

from typing import Protocol

from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_events import KvEvent


class KvSink(Protocol):
    """Hears of one stream: a replica, or one of its data-parallel ranks."""

    def apply(self, events: list[KvEvent]) -> None:
        """These happened, in this order."""
        ...

    def drop_all(self) -> None:
        """Nothing that was told holds any more."""
        ...

    def trust_changed(self, trust: Trust, reason: Reason) -> None:
        """From now on what was told can be relied upon so far."""
        ...
