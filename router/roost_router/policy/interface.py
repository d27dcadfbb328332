"""What a policy is given and what it answers: filter -> score -> pick. Pure.

Filtering (up, serves the model, not tried yet) is done before: a policy sees only candidates
that could answer. It scores each, ours in seconds, and picks one. A policy is one small class in a
file of its own; least_outstanding.py is the smallest example, registry.py knows all by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from random import Random


class Candidate:
    """One replica that could take the request, with all that a policy may look at."""

    def __init__(
        self,
        name: str,
        *,
        matched_tokens: int,
        uncached_tokens: int,
        queued_tokens: int,
        num_decoding: int,
        prefill_tokens_per_s: float,
        decode_s: float,
        recent_uncached_tokens: float,
        num_in_flight: int = 0,
        kv_usage: float = 0.0,
        kv_capacity_tokens: int = 0,
        kv_release_tokens_per_s: float = 0.0,
        hoped_tokens: float = 0.0,
        is_thin: bool = False,
        is_speed_known: bool = True,
        wait_scale: float = 1.0,
        is_told: bool = False,
        num_others: int = 0,
        tells_queue: bool = False,
        slot_wait_s: float = 0.0,
        prompt_key: int = 0,
    ) -> None:
        self.name: Final = name
        self.matched_tokens: Final = matched_tokens  # of this prompt, believed in its KV cache
        self.uncached_tokens: Final = uncached_tokens  # of this prompt, to be computed there
        #: Uncached tokens of requests placed there before, not yet computed; see tells_queue.
        self.queued_tokens: Final = queued_tokens
        self.num_decoding: Final = num_decoding  # streams running
        self.prefill_tokens_per_s: Final = prefill_tokens_per_s
        self.decode_s: Final = decode_s  # seconds that one running stream adds to a step
        #: Prefill work placed there lately, fading.
        self.recent_uncached_tokens: Final = recent_uncached_tokens
        #: Requests placed there and not finished; those not decoding show no token yet.
        self.num_in_flight: Final = num_in_flight
        self.kv_usage: Final = kv_usage  # share of its KV blocks in use, as of its last report
        self.kv_capacity_tokens: Final = kv_capacity_tokens  # 0 where it does not tell
        #: How fast requests that end free KV; positive where the capacity is known.
        self.kv_release_tokens_per_s: Final = kv_release_tokens_per_s
        #: Expected in its cache beyond matched_tokens (index/unseen.py), less what of those is
        #: expected to be gone (Replica.kept): negative where more is.
        self.hoped_tokens: Final = hoped_tokens
        self.is_speed_known: Final = is_speed_known  # fitted to first tokens, not just assumed
        #: By how much shorter than predicted waits there have turned out to be; at most 1.
        self.wait_scale: Final = wait_scale
        self.num_others: Final = num_others  # requests of others there, as last reported
        self.tells_queue: Final = tells_queue  # their uncached tokens are among queued_tokens
        self.slot_wait_s: Final = slot_wait_s  # until it can run one more, 0 where it can
        self.is_told: Final = is_told  # most of matched_tokens, by its KV events
        self.is_thin: Final = is_thin  # its cache holds far less than the others' (slow_start.py)
        #: Of the prompt's first block, or of all of a shorter prompt: 64 bits, for all the same.
        self.prompt_key: Final = prompt_key

    @property
    def prompt_tokens(self) -> int:
        """Of the whole prompt; for all the same."""
        return self.matched_tokens + self.uncached_tokens


class Decision:
    """The pick, and enough to explain it."""

    def __init__(self, chosen: int, costs_s: list[float]) -> None:
        self.chosen: Final = chosen  # index into the candidates
        #: One for each candidate, the least is the best: seconds where a policy prices time, else
        #: its own unit. Infinite where it rules a candidate out.
        self.costs_s: Final = costs_s


class Policy(Protocol):
    """Chooses one of `candidates` (at least one). Pure: same arguments, same answer."""

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """Score every candidate and pick one. O(candidates)."""
        ...


def retain(policy: Policy, names: frozenset[str]) -> None:
    """Replicas have gone: what a policy keeps of others than `names` is of no use any more.

    A policy that keeps something by name has a method of this name; most keep nothing. What it
    raises goes no further: a user's own policy must not keep a replica from leaving.
    """
    told = getattr(policy, "retain", None)
    if told is not None:
        with suppress(Exception):
            told(names)
