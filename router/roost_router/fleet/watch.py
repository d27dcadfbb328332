"""How long a stream may be silent before its replica counts as stalled. Pure.

A replica can live, accept connections and answer its health check while it computes nothing.
Two limits, from what was fitted (speed.py), in seconds:

    before the first token   max(MIN_TTFT_S, prefill(before it, itself included))
    between tokens           max(MIN_ITL_S, ITL_FACTOR * usual gap, GAP_FACTOR * own widest gap)
                             + prefill(queued there)

    prefill(tokens) = slack * max(TTFT_FACTOR * seconds(uncached), MISS_FACTOR * seconds(all))
    seconds(tokens) = tokens / fitted speed, beyond the most that was ever observed / CAUTIOUS

Prefill of other requests makes the steps of a running stream long; how much of it there is, the
router knows. But not for sure: what is believed cached may have to be computed, so the prompts as
a whole count as well. A fit is not trusted further than it was seen to hold: a slow machine that
has shown only small prompts is not dead because a large one takes long.

A wrong verdict costs more than a late one: its stream is computed once more elsewhere, which makes
the others late, too, and what it had to wait for is never observed. Before two llama.cpp on a core
each, 20 of 60 requests were moved so, some of them four times. Hence the slack: it doubles with
each verdict on a replica and shrinks with its successes (health.py).

A stream that is silent while others on its replica progress is rather waiting its turn: then it
may take PATIENCE times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from roost_router.fleet.replica import Replica

MIN_TTFT_S: Final = 2.0
MIN_ITL_S: Final = 1.0
TTFT_FACTOR: Final = 5.0
MISS_FACTOR: Final = 2.0
ITL_FACTOR: Final = 20.0
GAP_FACTOR: Final = 4.0
PATIENCE: Final = 4.0
CAUTIOUS_TOKENS_PER_S: Final = 200.0
#: Where no replica has shown its pace yet: a large model on a CPU is alive, too.
UNKNOWN_GAP_S: Final = 0.5


def ttft_limit_s(replica: Replica, work_tokens: int, most_tokens: int) -> float:
    """Seconds that a request may be silent before its first token.

    `work_tokens` uncached ones come before that; `most_tokens` if nothing of them is cached.
    """
    return max(MIN_TTFT_S, _prefill_limit_s(replica, work_tokens, most_tokens))


def usual_gap_s(replica: Replica, replicas: Iterable[Replica]) -> float:
    """Seconds between events on `replica`; before any was seen, the slowest of the others'."""
    if replica.speed.usual_gap_s is not None:
        return replica.speed.usual_gap_s
    others = [r.speed.usual_gap_s for r in replicas if r.speed.usual_gap_s is not None]
    return max(others, default=UNKNOWN_GAP_S)


def itl_limit_s(replica: Replica, usual_s: float, widest_gap_s: float) -> float:
    """Seconds that a running stream may be silent.

    `usual_s`: between events there; `widest_gap_s`: between this stream's own, so far.
    """
    usual = ITL_FACTOR * usual_s
    queued_s = _prefill_limit_s(replica, replica.queued_tokens, replica.queued_prompt_tokens)
    return max(MIN_ITL_S, usual, GAP_FACTOR * widest_gap_s) + queued_s


def is_stalled(replica: Replica, last_at: float, limit_s: float, now: float) -> bool:
    """Whether a stream of `replica`, silent since `last_at`, is to be taken for lost."""
    silent_s = now - last_at
    if silent_s < limit_s:
        return False
    others_progress = replica.last_event_at > last_at and now - replica.last_event_at < limit_s
    return silent_s >= PATIENCE * limit_s or not others_progress


def _prefill_limit_s(replica: Replica, uncached_tokens: int, prompt_tokens: int) -> float:
    """Seconds that prefill may take."""
    likely_s = TTFT_FACTOR * _seconds(replica, uncached_tokens)
    missed_s = MISS_FACTOR * _seconds(replica, prompt_tokens)
    return replica.health.slack * max(likely_s, missed_s)


def _seconds(replica: Replica, tokens: int) -> float:
    """Prefill of `tokens`, by what `replica` has shown."""
    speed = replica.speed
    known = min(tokens, speed.most_tokens)
    tokens_per_s = speed.prefill_tokens_per_s
    if shown := speed.prefill.shown_tokens_per_s:
        tokens_per_s = min(tokens_per_s, shown)
    return known / tokens_per_s + (tokens - known) / CAUTIOUS_TOKENS_PER_S
