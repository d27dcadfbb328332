"""What a policy is given and what it answers: filter -> score -> pick. Pure.

Filtering (up, serves the model, not tried yet) is done before: a policy sees only candidates
that could answer. It scores each in seconds and picks one. A policy is one small class in a
file of its own; cost.py is the smallest example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from random import Random


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One replica that could take the request, with all that a policy may look at."""

    name: str
    matched_tokens: int  # of this prompt, believed to be in its KV cache
    uncached_tokens: int  # of this prompt, to be computed there
    queued_tokens: int  # uncached tokens of requests placed there before, not yet computed
    num_decoding: int  # streams running
    prefill_tokens_per_s: float
    decode_s: float  # seconds that one running stream adds to a step
    recent_uncached_tokens: float  # prefill work placed there lately, fading


class Decision(msgspec.Struct, frozen=True):
    """The pick, and enough to explain it."""

    chosen: int  # index into the candidates
    costs_s: list[float]  # one for each candidate, in seconds; what they hold is the policy's


class Policy(Protocol):
    """Chooses one of `candidates` (at least one). Pure: same arguments, same answer."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """Score every candidate and pick one. O(candidates)."""
        ...
