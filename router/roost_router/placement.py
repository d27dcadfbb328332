"""Place a request: index, fleet and policy put to work together. Pure.

This is the router's brain. The data path calls it at four moments and does what it says; the
simulator and the tests drive the same object with their own clock:

    place        decide, and at once record the decision: residency and load
    first_byte   the prefill is done
    learn        the replica told its prompt and cached tokens
    finish       the request left, for whatever reason

What is learnt. *Bytes per token* turns block counts into tokens. `cached_tokens` corrects the
index: if a block that we believed resident was not, then with least-recently-used eviction all
blocks of that replica touched no later than it are gone as well. That holds only for blocks
that were *settled*, i.e. whose placement had seen its first byte before this one was made: a
sibling that is still being prefilled is not evicted, only late.

Not here: any I/O, retries, how bytes reach the replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from roost_router.fleet.fleet import PRIOR_BYTES_PER_TOKEN, Fleet
from roost_router.fleet.replica import Replica
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.text_chain import TEXT_BLOCK_BYTES, text_chain
from roost_router.openai_request import RoutingFields
from roost_router.policy.interface import Candidate, Decision, Policy

if TYPE_CHECKING:
    from random import Random

#: Tokens that the prior of bytes per token weighs, and the most that the past may weigh.
_PRIOR_TOKENS = 1_000.0
_MEMORY_TOKENS = 1_000_000.0
#: Bytes by which a prediction may miss before it counts as an eviction: blocks are cut at 256
#: bytes here and at (typically) 16 tokens there, and bytes per token is an average.
_TOLERANCE_BYTES = 2 * TEXT_BLOCK_BYTES
_TOLERANCE_SHARE = 0.15


class Placement(msgspec.Struct, kw_only=True):
    """One request on one replica, from decision to end."""

    replica: Replica
    decision: Decision
    candidates: list[Candidate]
    stamp: int
    placed_at: float  # seconds, monotonic
    prompt_bytes: int
    prompt_tokens: int  # predicted
    matched_tokens: int  # predicted
    uncached_tokens: int  # predicted; what was reserved
    work_tokens: int  # uncached tokens that stood before the first token, queue included
    holder: int  # epoch of the replica at decision time
    chain: list[int]
    matched_blocks: int
    matched_stamps: list[int]  # stamps of the matched blocks before this placement
    oldest_pending: int  # oldest placement of this replica still without a first byte
    first_byte_at: float | None = None
    is_finished: bool = False
    has_learnt: bool = False


class Placer:
    """Decides where requests go and remembers where they went."""

    def __init__(self, index: PrefixIndex, fleet: Fleet, policy: Policy, rng: Random) -> None:
        self.index = index
        self.fleet = fleet
        self._policy = policy
        self._rng = rng
        self._stamp = 0
        self._pending: dict[str, dict[int, None]] = {r.name: {} for r in fleet.replicas}
        self._bytes_seen = PRIOR_BYTES_PER_TOKEN * _PRIOR_TOKENS
        self._tokens_seen = _PRIOR_TOKENS

    @property
    def bytes_per_token(self) -> float:
        """Bytes of canonical prompt a token, over recent traffic."""
        return self._bytes_seen / self._tokens_seen

    def place(
        self, fields: RoutingFields, now: float, tried: frozenset[str] = frozenset()
    ) -> Placement:
        """Pick a replica not in `tried` and record the placement.

        Raises ModelNotFoundError or NoReplicaError. O(prompt bytes + candidates).
        """
        replicas = self.fleet.candidates(fields.model, tried)
        chain = text_chain(fields.prompt)
        holders = 0
        for replica in replicas:
            holders |= 1 << replica.holder
        depths = self.index.lookup(chain, holders)
        prompt_tokens = max(1, round(len(fields.prompt) / self.bytes_per_token))
        candidates = [
            self._candidate(replica, depths.get(replica.holder, 0), prompt_tokens, now)
            for replica in replicas
        ]
        decision = self._policy.pick(candidates, self._rng)
        return self._record(
            replicas[decision.chosen],
            decision=decision,
            candidates=candidates,
            chain=chain,
            matched_blocks=depths.get(replicas[decision.chosen].holder, 0),
            prompt_bytes=len(fields.prompt),
            now=now,
        )

    def first_byte(self, placement: Placement, now: float, *, streamed: bool) -> None:
        """The replica's answer begins. `streamed`: this was the first token, not the whole."""
        if placement.first_byte_at is not None or placement.is_finished:
            return
        placement.first_byte_at = now
        replica = placement.replica
        replica.start_decoding(placement.uncached_tokens)
        self._settle(placement)
        if streamed:
            replica.speed.observe_ttft(placement.work_tokens, now - placement.placed_at)

    def learn(self, placement: Placement, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The replica counted the prompt and, maybe, told what its cache held. Once a request."""
        if placement.has_learnt or prompt_tokens <= 0:
            return
        placement.has_learnt = True
        keep = max(0.0, 1.0 - prompt_tokens / _MEMORY_TOKENS)
        self._bytes_seen = self._bytes_seen * keep + placement.prompt_bytes
        self._tokens_seen = self._tokens_seen * keep + prompt_tokens
        self.fleet.set_bytes_per_token(self.bytes_per_token)
        if cached_tokens is not None and placement.matched_blocks:
            self._correct(placement, prompt_tokens, cached_tokens)

    def finish(self, placement: Placement, now: float, num_events: int = 0) -> None:
        """The request left: answered, failed or aborted. Idempotent."""
        if placement.is_finished:
            return
        placement.is_finished = True
        replica, first_at = placement.replica, placement.first_byte_at
        if first_at is None:
            self._settle(placement)
            if placement.holder == replica.holder:  # it may never have been computed
                unmatched = placement.chain[placement.matched_blocks :]
                self.index.undo(placement.holder, unmatched, placement.stamp)
        elif num_events > 1:
            itl_s = (now - first_at) / (num_events - 1)
            replica.speed.observe_itl(itl_s, max(1, replica.num_decoding))
        replica.release(placement.uncached_tokens, decoding=first_at is not None)

    def _candidate(
        self, replica: Replica, matched_blocks: int, prompt_tokens: int, now: float
    ) -> Candidate:
        matched = min(
            prompt_tokens - 1, int(matched_blocks * TEXT_BLOCK_BYTES / self.bytes_per_token)
        )
        return Candidate(
            name=replica.name,
            matched_tokens=matched,
            uncached_tokens=prompt_tokens - matched,
            queued_tokens=replica.queued_tokens,
            num_decoding=replica.num_decoding,
            prefill_tokens_per_s=self.fleet.prefill_tokens_per_s(replica),
            decode_s=replica.speed.decode_s,
            recent_uncached_tokens=replica.recent_uncached_tokens(now),
        )

    def _record(
        self,
        replica: Replica,
        *,
        decision: Decision,
        candidates: list[Candidate],
        chain: list[int],
        matched_blocks: int,
        prompt_bytes: int,
        now: float,
    ) -> Placement:
        self._stamp += 1
        chosen = candidates[decision.chosen]
        pending = self._pending[replica.name]
        placement = Placement(
            replica=replica,
            decision=decision,
            candidates=candidates,
            stamp=self._stamp,
            placed_at=now,
            prompt_bytes=prompt_bytes,
            prompt_tokens=chosen.matched_tokens + chosen.uncached_tokens,
            matched_tokens=chosen.matched_tokens,
            uncached_tokens=chosen.uncached_tokens,
            work_tokens=chosen.queued_tokens + chosen.uncached_tokens,
            holder=replica.holder,
            chain=chain,
            matched_blocks=matched_blocks,
            matched_stamps=self.index.stamps(replica.holder, chain[:matched_blocks]),
            oldest_pending=next(iter(pending), self._stamp),
        )
        pending[self._stamp] = None
        self.index.add(replica.holder, chain, self._stamp)
        replica.reserve(placement.uncached_tokens, now)
        return placement

    def _settle(self, placement: Placement) -> None:
        self._pending[placement.replica.name].pop(placement.stamp, None)

    def _correct(self, placement: Placement, prompt_tokens: int, cached_tokens: int) -> None:
        """Drop what the replica must have evicted, if it had less than we believed."""
        if placement.holder != placement.replica.holder:
            return
        cached_bytes = cached_tokens * placement.prompt_bytes / prompt_tokens
        believed_bytes = placement.matched_blocks * TEXT_BLOCK_BYTES
        tolerance = max(_TOLERANCE_BYTES, _TOLERANCE_SHARE * believed_bytes)
        if believed_bytes - cached_bytes <= tolerance:
            return
        missing = placement.matched_stamps[int(cached_bytes) // TEXT_BLOCK_BYTES]
        if missing < placement.oldest_pending:
            self.index.forget_older(placement.holder, missing)
