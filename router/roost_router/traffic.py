"""What recent requests were like, as it is shown. Pure.

Apart from recent.py, which counts and is compiled: what msgspec decodes may not be.
"""

from __future__ import annotations

import msgspec


class Traffic(msgspec.Struct):
    """What ended in the last minute."""

    requests_per_s: float
    #: Of a replica: attempts lost there, also those made good elsewhere. Of all: requests that
    #: failed for their clients.
    failures_per_s: float
    hit_rate: float | None  # share of prompt tokens that replicas reported as cached
    ttft_p50_s: float | None  # of streams
    ttft_p99_s: float | None


class Told(msgspec.Struct):
    """What a replica's good answers of the last ten minutes told of their prompts."""

    num_answers: int = 0
    num_with_usage: int = 0  # told how long the prompt was
    num_with_cached: int = 0  # told `cached_tokens`, be it 0
    matched_tokens: int = 0  # expected from cache by the router, of those with usage
    cached_tokens: int = 0  # reported as such
