"""When a replica would start a request, and what that costs, in seconds. Pure.

    p_i     = (uncached_i - hoped_i) / prefill_i                     own prefill
    f_i     = 1 + decoding_i * decode_s_i * prefill_i / CHUNK_TOKENS
    w_i     = f_i * queued_i / prefill_i                             the queue before it
    m_i     = max(0, queued_i + uncached_i - free_i) / release_i     until its KV blocks are free
    s_i     = (over_i + 1) * answer_i / slots_i, where all its slots are taken
    start_i = max(w_i, m_i, s_i)
    cost_i  = start_i + p_i * (f_i + mu + DECODE_WEIGHT * decoding_i)
              + DECODE_STEPS * decoding_i * decode_s_i
    mu      = MAX_PRICE * (1 - (1 - share of the candidates with a queue of ours) ** (all / ours))

The first two terms are the wait of this request. mu is what it costs the others: a second of
prefill on a busy fleet keeps many waiting, on an idle one nobody, and there a second holder of a
hot prefix costs nothing and is worth something.

The exponent is for other routers: of the queues that they cause nothing is seen here, but replicas
tell how many requests they have, and that of `all` requests there only so many are ours. Where we
see the queues of one in four requests, a replica without one of ours may well have one of theirs.
Our own engine tells what it has to compute: there, theirs are among queued_i.

The last term is its decoding: a step takes decode_s longer for each stream that is running, and
DECODE_STEPS of them count. Of a few hundred that an answer has, since a second more of decoding is
not as bad as one before the first token; but without it, whoever wants a hot prefix goes where it
is cached, however crowded.

f_i is decode interference: each chunk of CHUNK_TOKENS of prefill also runs one decode step, which
`decode_s` for each running stream makes longer. What waits in the router for i is added to start_i
by late_binding.py.

free_i is capacity less what i reported in use. Tokens queued and already counted in that report are
counted twice: too careful rather than too bold. m_i is 0 where i tells no capacity, where nothing
of ours runs on i (its report is late), and for a prompt that i could never hold (its to refuse).

s_i is for servers that run only so many requests at once and tell how many (llama.cpp): over_i wait
there already, and an answer takes answer_i seconds lately.

The smallest cost wins. Costs within TIE_S of the best are a tie: no user feels a millisecond, but
always taking the first would starve the rest. Among ties the replica with the least prefill work
lately is taken (its cache has the most room for this prompt), then one at random. Replicas whose
cache is thin take few misses (slow_start.py).

Sources: the shape is that of the design which docs/decisions/0004 quotes; 0018 has our own
simulations. Rejected there: a price averaged over ten seconds, x / (1 - x) of the share x, and
constant ones: 0 is best for 32 idle replicas, 2 for 8 busy ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from roost_router.policy.interface import Candidate, Decision
from roost_router.policy.slow_start import MAX_WAIT_S, may_take_miss

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

CHUNK_TOKENS: Final = 2048
DECODE_WEIGHT: Final = 0.03
DECODE_STEPS: Final = 10.0
MAX_PRICE: Final = 10.0
TIE_S: Final = 0.001
_NOTHING: Final[dict[str, float]] = {}


class CostPolicy:
    """Picks the least cost."""

    def __init__(self, *, holds: bool = False) -> None:
        """`holds`: requests wait in the router until a replica can start them (dispatch.py)."""
        self.holds: Final = holds

    def pick(self, candidates: Sequence[Candidate], rng: Random) -> Decision:
        """For a request that goes out at once. O(candidates)."""
        return self.pick_behind(list(candidates), rng, _NOTHING)[0]

    def pick_behind(
        self, candidates: list[Candidate], rng: Random, waiting_s: dict[str, float]
    ) -> tuple[Decision, float]:
        """The cheapest candidate, and the seconds until it would start this request.

        `waiting_s`: by name of a replica, prefill that waits in the router for it and goes first:
        it is in the cost, but not in when this one would start, for there it is not. O(candidates).
        """
        mu = price(candidates)
        starts: list[float] = []
        costs: list[float] = []
        for candidate in candidates:
            starts_s = start_s(candidate)
            starts.append(starts_s)
            if waiting_s:
                starts_s += interference(candidate) * waiting_s.get(candidate.name, 0.0)
            costs.append(cost_s(candidate, starts_s, mu))
        chosen = _pick_least(candidates, costs, rng)
        if candidates[chosen].is_thin:
            chosen = _pick_fuller(candidates, costs, chosen, rng)
        return Decision(chosen, costs), starts[chosen]


def prefill_s(candidate: Candidate) -> float:
    """p_i: seconds that the uncached tokens take, with nothing else running."""
    return (candidate.uncached_tokens - candidate.hoped_tokens) / candidate.prefill_tokens_per_s


def interference(candidate: Candidate) -> float:
    """f_i: how many times as long prefill takes beside the streams that are running."""
    decode_s = candidate.num_decoding * candidate.decode_s
    return 1.0 + decode_s * candidate.prefill_tokens_per_s / CHUNK_TOKENS


def queue_s(candidate: Candidate) -> float:
    """w_i: seconds until the prefill that is queued there is done."""
    return interference(candidate) * candidate.queued_tokens / candidate.prefill_tokens_per_s


def start_s(candidate: Candidate) -> float:
    """Seconds until the replica starts this request: its queue, a slot, room in its KV cache."""
    waits_s = max(queue_s(candidate), candidate.slot_wait_s)
    capacity = candidate.kv_capacity_tokens
    release = candidate.kv_release_tokens_per_s
    if not candidate.num_in_flight or not release or candidate.prompt_tokens > capacity:
        return waits_s
    free = capacity * (1.0 - candidate.kv_usage)
    short = candidate.queued_tokens + candidate.uncached_tokens - free
    return max(waits_s, short / release)


def price(candidates: list[Candidate]) -> float:
    """mu: seconds that a second of prefill costs others."""
    num_busy = num_ours = num_others = 0
    for candidate in candidates:
        num_ours += candidate.num_in_flight
        if not candidate.tells_queue:
            num_others += candidate.num_others
        if candidate.queued_tokens > 0:
            num_busy += 1
    share = num_busy / len(candidates)
    if num_others and num_ours:
        share = 1.0 - (1.0 - share) ** (1.0 + num_others / num_ours)
    return MAX_PRICE * share


def cost_s(candidate: Candidate, starts_s: float, mu: float) -> float:
    """Seconds that the request waits there, and that it makes others wait at price `mu`."""
    factor = interference(candidate) + mu + DECODE_WEIGHT * candidate.num_decoding
    decode_s = DECODE_STEPS * candidate.num_decoding * candidate.decode_s
    return starts_s + prefill_s(candidate) * factor + decode_s


def _pick_least(candidates: list[Candidate], costs_s: list[float], rng: Random) -> int:
    """Index of the least cost; among ties the least work lately, then one at random."""
    limit = min(costs_s) + TIE_S
    tied = [i for i, cost in enumerate(costs_s) if cost <= limit]
    if len(tied) == 1:
        return tied[0]
    recent = [candidates[i].recent_uncached_tokens for i in tied]
    least = min(recent)
    best = [i for i in tied if candidates[i].recent_uncached_tokens <= least]
    return best[0] if len(best) == 1 else rng.choice(best)


def _pick_fuller(
    candidates: list[Candidate], costs_s: list[float], chosen: int, rng: Random
) -> int:
    """Instead of a replica with a thin cache, one without, where slow_start.py says so."""
    most_matched = max([candidate.matched_tokens for candidate in candidates])
    if 2 * most_matched >= candidates[0].prompt_tokens or may_take_miss(rng):
        return chosen
    fuller = [i for i, candidate in enumerate(candidates) if not candidate.is_thin]
    if not fuller:
        return chosen
    costs = [costs_s[i] for i in fuller]
    second = fuller[_pick_least([candidates[i] for i in fuller], costs, rng)]
    return second if costs_s[second] - costs_s[chosen] <= MAX_WAIT_S else chosen
