"""What a load of 1.0 means: the seconds of work in a trace. Pure.

    work = sum over requests of   prefill of the tokens that one replica's cache misses
                                + (out - 1) · (a + ov/n + g·(in + out/2))

    load = work / (sum of the replicas' speeds · seconds in which the trace's requests arrive)

Hits are those of *one* replica's cache that sees the whole trace in order. So load 1.0 depends on
trace, model and cache, neither on policy nor on the number of replicas, and it is within reach: a
policy that gives every replica a part of the prefixes finds more than one cache holds, and
carries more; one that does not care finds less. Without hits, a load of 1.0 would be idleness on
traces that share much; with those of a cache as large as the whole fleet's, no policy could carry
it.

n, the streams among which a step's fixed part is shared, is how many of the trace's mean request
the cache has room for.

Where replicas are unlike, 1.0 is a speed whose step times are the given ones, and the cache is the
smallest.

To play a trace at a load its arrivals are stretched or compressed, all by one factor. In traces
of sessions that is done to their starts; the time a user thinks stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_loadtest.fleet_sim.cache import BlockCache

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.model import StepTimes
    from roost_loadtest.fleet_sim.trace import Trace


class TooLargeError(Exception):
    """A request that no replica could ever hold."""


def work_s(trace: Trace, times: StepTimes, kv_tokens: int) -> float:
    """Seconds of work of all requests; see the module. O(blocks).

    Raises TooLargeError for a request that does not fit into `kv_tokens`.
    """
    cache = BlockCache(kv_tokens // trace.block_tokens)
    requests = trace.requests
    all_tokens = sum(r.prompt_tokens + r.output_tokens for r in requests)
    step_s = times.step_s / max(1.0, kv_tokens * len(requests) / all_tokens)
    total = 0.0
    for number, request in enumerate(requests):
        num_private = trace.num_private(request)
        matched = cache.take(request.block_ids, num_private)
        if matched is None:
            raise TooLargeError(
                f"{trace.name}: request {number} needs {trace.num_blocks(request)} blocks of "
                f"{trace.block_tokens} tokens, a replica's KV cache has {cache.capacity_blocks}: "
                "raise --kv-tokens"
            )
        cache.free(request.block_ids, num_private)
        cached = min(matched * trace.block_tokens, request.prompt_tokens - 1)
        total += times.prefill_s(request.prompt_tokens - cached, cached)
        context = request.prompt_tokens + request.output_tokens / 2
        each_s = times.token_s + step_s + times.context_s * context
        total += (request.output_tokens - 1) * each_s
    return total


def time_scale(trace: Trace, work: float, speed: float, load: float) -> float:
    """By what the trace's arrival times are multiplied so that they make `load`.

    `speed`: of all replicas together; of alike ones their number.
    1.0 where all come at the same moment: no factor changes that.
    """
    span_s = trace.requests[-1].arrives_s
    return work / (speed * load * span_s) if span_s else 1.0
