"""The rungs of the hit-rate ladder in words, and its figures as they are shown. Pure.

Apart from hit_ladder.py, which counts and is compiled: what msgspec decodes may not be.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Rung(msgspec.Struct, frozen=True):
    """One rung in words."""

    name: str
    loss: str  # why less arrives here than at the rung above
    cure: str  # "": there is none


#: From the top; Ladder's lists are in this order.
RUNGS: Final = (
    Rung("ideal", "prompts that nobody sent before", ""),
    Rung(
        "capacity-bound",
        "evicted before they were asked for again: the caches are too small together",
        "more KV memory (vLLM --gpu-memory-utilization, --kv-cache-dtype fp8; SGLang "
        "--mem-fraction-static; roost serve --kv-tokens, --host-kv-tokens) or more replicas",
    ),
    Rung(
        "known",
        "copies of one prefix on several replicas, restarts, or caches that the router does not "
        "see: other routers fill them, or their engines evict what it believes they hold",
        "KV events and a reported KV capacity, so that it sees; fewer, larger replicas, so that "
        "there are fewer copies",
    ),
    Rung(
        "routed",
        "the replica that held the prefix had so much to do that another was faster",
        "more replicas, or less load: at this load computing again is the better choice",
    ),
    Rung(
        "delivered",
        "the replica did not have what it was believed to have: evicted, prefix caching off, or "
        "a chat template that puts something new before the prompt",
        "prefix caching on (vLLM --enable-prefix-caching, SGLang without --disable-radix-cache), "
        "KV events, and no dates or ids at the start of prompts",
    ),
)


class Ladder(msgspec.Struct):
    """The rungs of one model over one span of time; shares of its prompt tokens, 0 to 1."""

    num_requests: int
    prompt_tokens: int
    #: In the order of RUNGS. None: nothing to tell it from.
    shares: list[float | None]
    #: What each rung lost of the one above; of `delivered` only where replicas told.
    lost: list[float | None]
    told_share: float  # of prompt tokens came with a replica's `cached_tokens`
    doubled: float | None  # the capacity bound with twice the KV memory


class ModelLadder(msgspec.Struct):
    """What is known of one model."""

    model: str
    capacity_bytes: int  # of prompts, that the caches of its replicas are believed to hold
    sampled_share: float  # of blocks, that the first two rungs are estimated from
    recent: Ladder  # ten minutes
    since_start: Ladder
