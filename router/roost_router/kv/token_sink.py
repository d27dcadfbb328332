"""Puts the blocks of one stream into the token index, under a holder of its own. Pure.

A replica that begins anew, whose stream is learnt anew, or of which events were lost for good, gets
another holder: dropping the old one is O(1). Requests look up the holders of replicas by `holder`,
which changes then.

Where events were lost, removals may be among them, and what the index has must be true. It is then
less than the replica has (as after a late join), until the replica tells again what it reuses,
clears its cache, or sends a snapshot.

Not here: what a lookup is worth at which trust (told_residency.py).
"""

from __future__ import annotations

from collections.abc import Callable

from roost_router.index.token_index import TokenIndex
from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_events import KvEvent


class TokenSink:
    """A KvSink."""

    def __init__(
        self,
        index: TokenIndex,
        changed: Callable[[], None],
        *,
        hashes_are_chain: bool = False,
        counts_copies: bool = False,
    ) -> None:
        """`changed`: told when `holder` or `trust` are others from now on.

        `hashes_are_chain`, `counts_copies`: see TokenIndex.open_holder.
        """
        self._index = index
        self._changed = changed
        self._hashes_are_chain = hashes_are_chain
        self._counts_copies = counts_copies
        self._tells_reuse = False
        self.holder = self._open()
        self.reason = Reason.NOT_HEARD
        self._trust = Trust.BLIND
        self._was_whole = True

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
        self._look_whether_whole()

    def drop_all(self) -> None:
        """Nothing that was told holds any more."""
        self._index.retire(self.holder)
        self.holder = self._open()
        self._was_whole = True
        self._changed()

    def trust_changed(self, trust: Trust, reason: Reason) -> None:
        """From now on what was told can be relied upon so far."""
        self._trust, self.reason = trust, reason
        self._changed()

    def report_reuse(self, *, is_asked: bool) -> None:
        """Whether the engine tells of blocks that are reused as if they were stored now."""
        self._tells_reuse = is_asked
        self._index.count_copies(self.holder, self._counts_copies and not is_asked)

    def close(self) -> None:
        """Forget its holder; nothing may be applied any more."""
        self._index.retire(self.holder)
        self._changed()

    def _look_whether_whole(self) -> None:
        is_whole = self._index.is_whole(self.holder)
        if is_whole is not self._was_whole:
            self._was_whole = is_whole
            self._changed()

    def _open(self) -> int:
        return self._index.open_holder(
            hashes_are_chain=self._hashes_are_chain,
            counts_copies=self._counts_copies and not self._tells_reuse,
        )
