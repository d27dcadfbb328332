"""In-batch prefix sharing: who waits because another request is computing its prefix just now.

Of requests that arrive together with one prefix, the first computes it and the others take it
from the cache afterwards. Without this all of them would compute it at once. A follower waits at
most for its leader's prefill; once that is over, or the leader is gone, it is looked at again.

Idea: SGLang's schedule_policy delays such requests by a round.

Not here: what is in the cache (blocks.py), who goes first otherwise (scheduler.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from roost_engine.request import Request, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from roost_engine.blocks import BlockPool


class _Leader(msgspec.Struct, frozen=True):
    """Whom a waiting request waits for, and until how many of its tokens are computed."""

    request: Request
    num_tokens: int

    @property
    def is_filling(self) -> bool:
        running = self.request.state is RequestState.RUNNING
        return running and self.request.num_computed < self.num_tokens


class PrefixSharing:
    """The chains of all unfinished requests, and who follows whom."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._chains: dict[str, list[int]] = {}
        self._leaders: dict[str, _Leader] = {}

    def add(self, request: Request) -> None:
        """Hash a request's tokens; again when it comes back with more of them. O(tokens)."""
        self._chains[request.id] = self._pool.chain(request.token_ids)

    def remove(self, request: Request) -> None:
        """Forget a request that has ended."""
        del self._chains[request.id]
        self._leaders.pop(request.id, None)

    def shareable_chain(self, request: Request) -> list[int]:
        """The chain as far as it may be hit: one token at least is computed, for its logits."""
        most_blocks = (len(request.token_ids) - 1) // self._pool.block_size
        return self._chains[request.id][:most_blocks]

    def must_wait(self, request: Request, prefilling: Iterable[Request]) -> bool:
        """Whether one of `prefilling` is just computing a prefix that this request needs too.

        O(1) while it follows somebody, else O(prefilling · log blocks).
        """
        leader = self._leaders.get(request.id)
        if leader is None:
            leader = self._find_leader(request, prefilling)
            if leader is None:
                return False
            self._leaders[request.id] = leader
        if leader.is_filling:
            return True
        del self._leaders[request.id]
        return False

    def _find_leader(self, request: Request, prefilling: Iterable[Request]) -> _Leader | None:
        """Who will fill most of this one's prefix beyond what is cached, if anybody does.

        The chains are compared, not the tokens: a collision would cost a wait, nothing else.
        """
        chain = self.shareable_chain(request)
        num_shared, leader = max(
            ((_common_prefix(chain, self._chains[other.id]), other) for other in prefilling),
            key=lambda pair: pair[0],
            default=(0, request),
        )
        num_tokens = num_shared * self._pool.block_size
        if num_tokens <= leader.num_computed:
            return None
        if len(self._pool.lookup(request.token_ids, chain)) >= num_shared:
            return None
        return _Leader(leader, num_tokens)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of equal hashes at the start. Equal chain hashes mean equal chains: bisection."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
