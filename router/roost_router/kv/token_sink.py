"""Puts the blocks of one stream into the token index, under a holder of its own. Pure.

A replica that begins anew, or whose stream is learnt anew, gets another holder: dropping the old
one is O(1). Requests look up the holders of replicas by `holder`, which changes then.

Not here: what a lookup is worth at which trust (placement).
"""

from __future__ import annotations

from roost_router.index.token_index import TokenIndex
from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_events import KvEvent


class TokenSink:
    """A KvSink."""

    def __init__(
        self, index: TokenIndex, *, hashes_are_chain: bool = False, counts_copies: bool = False
    ) -> None:
        """`hashes_are_chain`, `counts_copies`: see TokenIndex.open_holder."""
        self._index = index
        self._hashes_are_chain = hashes_are_chain
        self._counts_copies = counts_copies
        self.holder = self._open()
        self.reason = Reason.NOT_HEARD
        self._trust = Trust.BLIND

    @property
    def trust(self) -> Trust:
        """How far lookups of this holder can be relied upon."""
        if self._trust is Trust.EXACT and not self._index.is_whole(self.holder):
            return Trust.APPROXIMATE  # the index was full
        return self._trust

    def apply(self, events: list[KvEvent]) -> None:
        """These happened, in this order."""
        for event in events:
            self._index.apply(self.holder, event)

    def drop_all(self) -> None:
        """Nothing that was told holds any more."""
        self._index.retire(self.holder)
        self.holder = self._open()

    def trust_changed(self, trust: Trust, reason: Reason) -> None:
        """From now on what was told can be relied upon so far."""
        self._trust, self.reason = trust, reason

    def _open(self) -> int:
        return self._index.open_holder(
            hashes_are_chain=self._hashes_are_chain, counts_copies=self._counts_copies
        )
