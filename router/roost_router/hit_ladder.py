"""Where cache hits are lost: of all prompt tokens, the share that came from a KV cache. Pure.

    ideal            one infinite cache for the whole fleet: an earlier prompt had the same prefix
                     (one of the last hour, that is: what is older may be forgotten)
    capacity-bound   one least-recently-used cache as large as the fleet's caches together
    known            what the best candidate was believed to hold when the request was placed
    routed           what the chosen one was believed to hold
    delivered        what its replica then reported (`cached_tokens`)

Each rung is at most the one above it, but for two things: all but the last count in whole blocks
of the text chain (256 bytes; in long prompts 1/16 of their length), so a replica may deliver a
little more than was known; and the first two are estimated from a sample (reuse_distance.py, which
names the source), the others counted. The capacity bound ignores what running requests and
outputs take of a cache, so it is a bound from above.

By model, over the last ten minutes and since the start. Fed with requests as they end; those that
were never computed, or refused, do not count. Costs a request O(candidates + chain) for the
candidate that holds most and the choice of its sampled blocks, then about 1 us for each of these,
of which at most 256 a second are looked at.

Bounded: MAX_MODELS models share MAX_BLOCKS sampled blocks; further models are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from roost_router.index.text_chain import chain_bytes
from roost_router.reuse_distance import NEVER, ReuseSample
from roost_router.rungs import RUNGS, Ladder, ModelLadder
from roost_router.sliding import LogHistogram, Sliding

if TYPE_CHECKING:
    from roost_router.http.record import RequestRecord

#: 8,192 suffice for miss ratios to a hundredth (SHARDS, section 4); one model gets so many.
MAX_BLOCKS_OF_A_MODEL: Final = 8_192
MAX_BLOCKS: Final = 32_768
MAX_MODELS: Final = 64
#: Ten minutes.
_SLOT_S: Final = 30.0
_NUM_SLOTS: Final = 20


class _Counts:
    """Tokens by what became of them, in one span of time."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.prompt = 0.0
        self.new = 0.0  # never asked for before
        self.known = 0.0
        self.routed = 0.0
        #: Of answers that told `cached_tokens`:
        self.told = 0.0
        self.told_routed = 0.0
        self.told_cached = 0.0
        self.reused = LogHistogram()  # by stack distance in bytes

    def add(self, other: _Counts) -> None:
        """Add all of `other`."""
        self.num_requests += other.num_requests
        self.prompt += other.prompt
        self.new += other.new
        self.known += other.known
        self.routed += other.routed
        self.told += other.told
        self.told_routed += other.told_routed
        self.told_cached += other.told_cached
        self.reused.merge(other.reused)


class _Model:
    def __init__(self) -> None:
        self.sample = ReuseSample(MAX_BLOCKS_OF_A_MODEL)
        self.recent = Sliding(_Counts, _SLOT_S, _NUM_SLOTS)
        self.newest = _Counts()  # slot of `recent`
        self.before = _Counts()  # all of the slots before it, since the start


class HitLadder:
    """The ladders of one router process."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    @property
    def models(self) -> list[str]:
        """Those that requests were counted of."""
        return list(self._models)

    def add(self, record: RequestRecord) -> None:
        """Count a request that ended. In order of their ends."""
        placement = record.placement
        if placement is None or placement.first_byte_at is None or record.status >= 400:
            return
        model = self._models.get(placement.model) or self._new_model(placement.model)
        if model is None:
            return
        now = record.started_at + record.duration_s
        predicted_tokens = placement.matched_tokens + placement.uncached_tokens
        tokens = record.prompt_tokens or predicted_tokens
        scale = tokens / max(1, predicted_tokens)
        most_matched = max([candidate.matched_tokens for candidate in placement.candidates])
        tokens_per_byte = tokens / max(1, placement.prompt_bytes)
        rest_bytes = placement.prompt_bytes - chain_bytes(len(placement.chain))
        found = model.sample.touch(placement.chain, now)
        counts = model.recent.at(now)
        if counts is not model.newest:
            model.before.add(model.newest)
            model.newest = counts
        counts.num_requests += 1
        counts.prompt += tokens
        counts.known += most_matched * scale
        counts.routed += placement.matched_tokens * scale
        # A resumed answer tells of its first leg, and was placed for its last.
        if record.cached_tokens is not None and not record.resumes:
            counts.told += tokens
            counts.told_routed += placement.matched_tokens * scale
            counts.told_cached += record.cached_tokens
        counts.new += rest_bytes * tokens_per_byte
        for num_bytes, distance in found:
            if distance == NEVER:
                counts.new += num_bytes * tokens_per_byte
            else:
                counts.reused.add(distance, num_bytes * tokens_per_byte)

    def ladder(self, model: str, capacity_bytes: int, now: float) -> ModelLadder:
        """The ladders of `model`, one of `models`; its caches hold `capacity_bytes` of prompts."""
        found = self._models[model]
        return ModelLadder(
            model,
            capacity_bytes,
            1.0 / (1 << found.sample.num_halvings),
            _ladder(found.recent.recent(now), capacity_bytes),
            _ladder([found.before, found.newest], capacity_bytes),
        )

    def _new_model(self, name: str) -> _Model | None:
        if len(self._models) >= MAX_MODELS:
            return None
        model = self._models[name] = _Model()
        for each in self._models.values():
            each.sample.resize(min(MAX_BLOCKS_OF_A_MODEL, MAX_BLOCKS // len(self._models)))
        return model


def _ladder(parts: list[_Counts], capacity_bytes: int) -> Ladder:
    counts = _Counts()
    for part in parts:
        counts.add(part)

    def bound(num_bytes: float) -> float:
        return max(0.0, 1.0 - (counts.new + counts.reused.above(num_bytes)) / counts.prompt)

    shares: list[float | None] = [None] * len(RUNGS)
    lost: list[float | None] = [None] * len(RUNGS)
    if not counts.prompt:
        return Ladder(0, 0, shares, lost, 0.0, None)
    known, routed = counts.known / counts.prompt, counts.routed / counts.prompt
    shares = [
        max(0.0, 1.0 - counts.new / counts.prompt),
        bound(capacity_bytes),
        known,
        routed,
        None,
    ]
    above = 1.0
    for place, share in enumerate(shares):
        if share is not None:
            lost[place], above = max(0.0, above - share), share
    if counts.told:
        shares[-1] = counts.told_cached / counts.told
        lost[-1] = max(0.0, (counts.told_routed - counts.told_cached) / counts.told)
    return Ladder(
        counts.num_requests,
        int(counts.prompt),
        shares,
        lost,
        counts.told / counts.prompt,
        bound(2 * capacity_bytes),
    )
