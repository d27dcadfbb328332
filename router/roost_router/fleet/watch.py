"""How long a stream may be silent before its replica counts as stalled. Pure.

A replica can live, accept connections and answer its health check while it computes nothing.
Two limits, from what was fitted (speed.py), in seconds:

    before the first token   max(MIN_TTFT_S, TTFT_FACTOR * seconds(work))
    between tokens           max(MIN_ITL_S, ITL_FACTOR * usual gap, GAP_FACTOR * own widest gap)
                             + TTFT_FACTOR * seconds(prefill queued there)

    seconds(tokens) = tokens / fitted speed, beyond the most that was ever observed / CAUTIOUS

Prefill of other requests makes the steps of a running stream long; how much of it there is, the
router knows. A fit is not trusted further than it was seen to hold: a slow machine that has shown
only small prompts is not dead because a large one takes long.

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
ITL_FACTOR: Final = 20.0
GAP_FACTOR: Final = 4.0
PATIENCE: Final = 4.0
CAUTIOUS_TOKENS_PER_S: Final = 200.0
#: Where no replica has shown its pace yet: a large model on a CPU is alive, too.
UNKNOWN_GAP_S: Final = 0.5


def ttft_limit_s(replica: Replica, work_tokens: int) -> float:
    """Seconds that a request with `work_tokens` before its first token may be silent."""
    return max(MIN_TTFT_S, TTFT_FACTOR * _seconds(replica, work_tokens))


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
    queued_s = _seconds(replica, max(0, replica.queued_tokens))
    return max(MIN_ITL_S, usual, GAP_FACTOR * widest_gap_s) + TTFT_FACTOR * queued_s


def is_stalled(replica: Replica, last_at: float, limit_s: float, now: float) -> bool:
    """Whether a stream of `replica`, silent since `last_at`, is to be taken for lost."""
    silent_s = now - last_at
    if silent_s < limit_s:
        return False
    others_progress = replica.last_event_at > last_at and now - replica.last_event_at < limit_s
    return silent_s >= PATIENCE * limit_s or not others_progress


def _seconds(replica: Replica, tokens: int) -> float:
    """Prefill of `tokens`, by what `replica` has shown."""
    speed = replica.speed
    known = min(tokens, speed.most_tokens)
    return known / speed.prefill_tokens_per_s + (tokens - known) / CAUTIOUS_TOKENS_PER_S
