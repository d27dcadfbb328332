"""How fast a replica is, fitted online from what its streams show. Pure.

Prefill: time to first token is close to linear in the uncached tokens that had to be computed
before it (those queued ahead included),

    ttft_s = overhead_s + work_tokens / prefill_tokens_per_s

fitted by least squares with exponential forgetting (each observation weighs _KEEP times the
next), so that it follows a replica whose speed changes. Two weak priors keep it sound when there
is little to see: an idle point (0 tokens, the usual overhead), so that one cold prompt tells a
speed; and a pull of the slope towards a usual speed, so that many requests of one size, all
warm for instance, tell nothing about it. And whatever the points look like, no replica is taken to
be more than _MAX_LEAP times as fast as its fastest first token showed: what was believed cached and
had to be computed, and steps that running streams made long, may leave no slope at all.

Replicas that are alike (fleet.py says which) share one fit. Where a router does not see all that
is queued (other routers place there, too), or running streams slow a prefill down, a replica's own
twenty observations are mostly noise; and a replica that looks fast by chance is fed until it is
slow. Simulated (`roost sim`, 8 replicas, load 0.95, 6,000 requests of three traces): mean TTFT with
own fits 0.77, 0.26 and 1.07 s, with a common one 0.65, 0.17 and 0.95; with four routers 11.4, 22.4
and 8.3 against 1.9, 0.6 and 2.0.

Decode: `decode_s` is what one more running stream adds to a step, an average of inter-token
latency / streams running.

Waits: all this is extrapolated from what was seen so far, and may be far off where a replica is
suddenly asked for much more: what 64 streams at a slow pace showed says nothing of 5,000. A wait
that is believed too long keeps requests in the router that could start. So the seconds that first
tokens took are compared with those predicted: `wait_scale` is their ratio where they were fewer.

Rejected: a constant in tokens for a running stream (150 in the prototype). It is right for one
machine only; seconds carry over to any.
"""

_KEEP = 0.95  # for each replica that shares the fit: all of them are remembered as long
_PRIOR_WEIGHT = 0.1  # of the idle point, in observations
_PRIOR_OVERHEAD_S = 0.02
_PRIOR_S_PER_TOKEN = 1.0 / 2000.0
_PRIOR_SPREAD = 100.0**2  # tokens squared: what the pull weighs against the spread of the work
_PRIOR_DECODE_S = 0.005
_PRIOR_WAIT_S = 0.1  # waits as predicted, before any was seen
_MIN_S_PER_TOKEN = 1e-6  # a million tokens/s: beyond any hardware, keeps the slope positive
_MAX_LEAP = 2.0
_TELLING_TOKENS = 256  # what shorter prompts take is mostly overhead
_KEEP_SHOWN = 0.999  # of the fastest first token, by each later one

_Sums = tuple[float, ...]


class Prefill:
    """The fit of one or of several replicas that are alike."""

    def __init__(self) -> None:
        self.num_replicas = 0
        self.num_observed = 0
        self._prior = _sums(_PRIOR_WEIGHT, 0.0, _PRIOR_OVERHEAD_S)
        self._data: _Sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        #: Work a second before the fastest first token lately, all else that took time included;
        #: 0 before a prompt that was long enough to tell.
        self.shown_tokens_per_s = 0.0
        #: Slope of the fit, inverted; always positive and finite.
        self.tokens_per_s = self._slope_inverted()
        #: Seconds until first tokens came / as predicted, where it is below 1.
        self.wait_scale = 1.0
        self._predicted_s = self._waited_s = 0.0  # sums with forgetting

    def observe(self, work_tokens: float, ttft_s: float) -> None:
        """A first token came `ttft_s` after `work_tokens` uncached tokens stood before it."""
        keep = self._keep()
        decayed = tuple(keep * part for part in self._data)
        self._data = _added(decayed, _sums(1.0, work_tokens, ttft_s))
        self.num_observed += 1
        if work_tokens >= _TELLING_TOKENS:
            shown = work_tokens / max(ttft_s, _MIN_S_PER_TOKEN)
            self.shown_tokens_per_s = max(_KEEP_SHOWN * self.shown_tokens_per_s, shown)
        self.tokens_per_s = self._slope_inverted()
        if self.shown_tokens_per_s:
            self.tokens_per_s = min(self.tokens_per_s, _MAX_LEAP * self.shown_tokens_per_s)

    def observe_wait(self, predicted_s: float, ttft_s: float) -> None:
        """A first token was predicted after `predicted_s`, and came after `ttft_s`."""
        keep = self._keep()
        self._predicted_s = keep * self._predicted_s + predicted_s
        self._waited_s = keep * self._waited_s + ttft_s
        ratio = (self._waited_s + _PRIOR_WAIT_S) / (self._predicted_s + _PRIOR_WAIT_S)
        self.wait_scale = min(1.0, ratio)

    def _keep(self) -> float:
        return float(_KEEP ** (1.0 / max(1, self.num_replicas)))

    def _slope_inverted(self) -> float:
        weight, x, y, xx, xy = _added(self._prior, self._data)
        spread = max(0.0, xx - x * x / weight)
        slope = (xy - x * y / weight + _PRIOR_SPREAD * _PRIOR_S_PER_TOKEN) / (
            spread + _PRIOR_SPREAD
        )
        return 1.0 / max(slope, _MIN_S_PER_TOKEN)


class Speed:
    """Fitted speeds of one replica."""

    def __init__(self) -> None:
        self.prefill = Prefill()
        self.prefill.num_replicas = 1
        self.most_tokens = 0.0  # most work that a first token was observed to follow
        self.decode_s = _PRIOR_DECODE_S
        self.answer_s = 0.0  # from the first token to the end, lately
        #: Between events of a stream, whatever else is running; None before the first observation.
        self.usual_gap_s: float | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        """As fitted; always positive and finite."""
        return self.prefill.tokens_per_s

    @property
    def wait_scale(self) -> float:
        """By how much shorter than predicted waits turned out; at most 1."""
        return self.prefill.wait_scale

    @property
    def num_observed(self) -> int:
        """First tokens seen, here and on replicas that are alike."""
        return self.prefill.num_observed

    def share(self, prefill: Prefill) -> None:
        """Use the fit of replicas that are alike; what was observed alone is left behind."""
        if prefill is not self.prefill:
            self.prefill.num_replicas -= 1
            prefill.num_replicas += 1
            self.prefill = prefill

    def observe_ttft(self, work_tokens: float, ttft_s: float) -> None:
        """A first token came `ttft_s` after `work_tokens` uncached tokens stood before it."""
        self.most_tokens = max(self.most_tokens, work_tokens)
        self.prefill.observe(work_tokens, ttft_s)

    def observe_wait(self, predicted_s: float, ttft_s: float) -> None:
        """A first token was predicted after `predicted_s`, and came after `ttft_s`."""
        self.prefill.observe_wait(predicted_s, ttft_s)

    def observe_answer(self, answer_s: float) -> None:
        """A stream took `answer_s` from its first token to its end."""
        self.answer_s += 0.2 * (answer_s - self.answer_s)

    def observe_itl(self, itl_s: float, num_streams: int) -> None:
        """A stream saw `itl_s` seconds between tokens while `num_streams` (>= 1) were running."""
        self.decode_s += 0.2 * (itl_s / num_streams - self.decode_s)
        before = itl_s if self.usual_gap_s is None else self.usual_gap_s
        self.usual_gap_s = before + 0.2 * (itl_s - before)


def _sums(weight: float, x: float, y: float) -> _Sums:
    """Weighted sums of one point: 1, work x, ttft y, x², xy."""
    return (weight, weight * x, weight * y, weight * x * x, weight * x * y)


def _added(left: _Sums, right: _Sums) -> _Sums:
    return tuple(a + b for a, b in zip(left, right, strict=True))
