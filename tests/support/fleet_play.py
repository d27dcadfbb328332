"""A trace for the fleet simulator, and what drives one of its replicas, of whatever kind."""

from __future__ import annotations

from random import Random

from roost_loadtest.fleet_sim.replica import Happened, Job, Replica
from roost_loadtest.fleet_sim.trace import Request, Trace


def chats(block_tokens: int, *, num_chats: int, first_blocks: int, blocks_a_turn: int) -> Trace:
    """Conversations side by side: each of six turns extends the one before it."""
    rng, requests = Random(0), []
    for chat in range(num_chats):
        at = rng.uniform(0.0, 20.0)
        for turn in range(6):
            num_blocks = first_blocks + blocks_a_turn * turn
            ids = tuple(1000 * (chat + 1) + place for place in range(num_blocks))
            prompt_tokens = num_blocks * block_tokens
            requests.append(Request(prompt_tokens, rng.randrange(1, 60), ids, at))
            at += rng.expovariate(0.2)
    in_order = sorted(requests, key=lambda request: request.arrives_s)
    return Trace("chats", block_tokens, in_order)


def play(replica: Replica, jobs: list[Job]) -> list[tuple[float, Happened, int]]:
    """Drive `replica` through `jobs`, which are in order of arrival."""
    happened, coming = [], list(jobs)
    while coming or replica.ends_s is not None:
        if coming and (replica.ends_s is None or coming[0].arrived_s < replica.ends_s):
            replica.submit(coming[0], coming.pop(0).arrived_s)
            continue
        now = replica.ends_s
        happened += [(round(now, 9), what, j.number) for what, j in replica.step(now)]
    return happened
