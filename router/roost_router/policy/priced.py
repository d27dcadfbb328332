"""When a replica would start a request, and its cost at a price that rises with load. Pure.

    p_i     = uncached_i / prefill_i                                 own prefill, seconds
    f_i     = 1 + decoding_i * decode_s_i * prefill_i / CHUNK_TOKENS
    w_i     = f_i * queued_i / prefill_i                             the queue before it
    m_i     = max(0, queued_i + uncached_i - free_i) / release_i     until its KV blocks are free
    start_i = max(w_i, m_i)
    cost_i  = start_i + p_i * (f_i + mu + DECODE_WEIGHT * decoding_i)

    x  = average over LOAD_MEMORY_S of the share of replicas that have a queue, at most MAX_BUSY
    mu = min(MAX_PRICE, 1 + x / (1 - x))

f_i is decode interference: each chunk of CHUNK_TOKENS of prefill also runs one decode step, which
`decode_s` for each running stream makes longer. mu is a shadow price: on a busy fleet a second of
prefill keeps everybody who comes next waiting; x / (1 - x) is what a queue of that load holds. What
waits in the router for i is added to start_i by late_binding.py.

free_i is capacity less what i reported in use. Tokens queued and already counted in that report are
counted twice: too careful rather than too bold. m_i is 0 where i tells no capacity, where nothing
of ours runs on i (its report is late), and for a prompt that i could never hold (its to refuse).

Source: the design that won the simulations that docs/decisions/0004 quotes: without m_i and mu
its mean TTFT is 1.5 times as long. Half or four times mu, and twice DECODE_WEIGHT, moved it by 3 %
at most.
"""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from roost_router.policy.interface import Candidate

CHUNK_TOKENS: Final = 2048
DECODE_WEIGHT: Final = 0.03
LOAD_MEMORY_S: Final = 10.0
MAX_BUSY: Final = 0.98
MAX_PRICE: Final = 10.0


def prefill_s(candidate: Candidate) -> float:
    """p_i: seconds that the uncached tokens take, with nothing else running."""
    return candidate.uncached_tokens / candidate.prefill_tokens_per_s


def interference(candidate: Candidate) -> float:
    """f_i: how many times as long prefill takes beside the streams that are running."""
    decode_s = candidate.num_decoding * candidate.decode_s
    return 1.0 + decode_s * candidate.prefill_tokens_per_s / CHUNK_TOKENS


def start_s(candidate: Candidate, release_tokens_per_s: float) -> float:
    """Seconds until the replica starts this request: its queue, and room in its KV cache.

    `release_tokens_per_s` (positive): how fast running requests free KV there.
    """
    queue_s = interference(candidate) * candidate.queued_tokens / candidate.prefill_tokens_per_s
    capacity = candidate.kv_capacity_tokens
    prompt_tokens = candidate.prompt_tokens
    if not candidate.num_in_flight or prompt_tokens > capacity:  # of which 0 is unknown
        return queue_s
    free = capacity * (1.0 - candidate.kv_usage)
    short = candidate.queued_tokens + candidate.uncached_tokens - free
    return max(queue_s, short / release_tokens_per_s)


def cost_s(candidate: Candidate, starts_s: float, price: float) -> float:
    """Seconds that the request waits there, and that it makes others wait at `price`."""
    factor = interference(candidate) + price + DECODE_WEIGHT * candidate.num_decoding
    return starts_s + prefill_s(candidate) * factor


class Price:
    """mu, from how many replicas have had a queue lately."""

    def __init__(self) -> None:
        self._busy = 0.0
        self._observed_at: float | None = None

    @property
    def value(self) -> float:
        """From 1 on an idle fleet to MAX_PRICE."""
        busy = min(MAX_BUSY, self._busy)
        return min(MAX_PRICE, 1.0 + busy / (1.0 - busy))

    def observe(self, busy: float, now: float) -> None:
        """At `now` the share `busy` (0 to 1) of the replicas has a queue."""
        if self._observed_at is not None:
            keep = exp(-max(0.0, now - self._observed_at) / LOAD_MEMORY_S)
            self._busy = busy + (self._busy - busy) * keep
        self._observed_at = now
