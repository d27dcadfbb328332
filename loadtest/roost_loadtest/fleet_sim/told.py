"""KV events in a simulated fleet: what replicas tell, and what a router makes of it. Pure.

    replica ─► BlockNews ─ KvEvents, EventDelays.events_after_s later ─► EventView ─► Placer
    request ─────────────── its tokens, EventDelays.tokens_after_s later ─────┘

A router's side is the real one: told_residency.py over the token index, the binding of text to
tokens and a sink for each replica, whose stream is exact. It asks for a prompt's tokens where the
data path does, when the prompt is on its way or held.

A trace has ids of blocks and no tokens. For the closed-form replica an id stands for the hash of
its block's tokens, as in Dynamo's events, which carry such hashes and no tokens; so everything from
the index on is computed as in the router, but for no tokenizer, and text of four bytes a token
exactly. The engine as a replica (engine_replica.py) tells its own events, of tokens.

Left out: gaps, restarts, drift; every event comes, in order. The closed-form replica does not tell
of blocks without an id (answers, tails): nobody could ask for them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from roost_loadtest.fleet_sim.prompts import ID_MASK, TOKEN_BYTES, prompt_tokens
from roost_router.index.text_chain import chain_bytes
from roost_router.index.token_identity import follow
from roost_router.index.token_knowledge import TokenKnowledge, hash_prompt
from roost_router.kv.trust import Reason, Trust
from roost_router.told_residency import ToldResidency
from roost_wire.kv_events import BlockRemoved, BlockStored, KvEvent, Tier

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.trace import Request, Trace
    from roost_router.fleet.fleet import Fleet
    from roost_router.openai_request import RoutingFields
    from roost_router.tokens.drift import DriftChange

#: Engines' pages of fewer tokens are joined by their tokens, which a trace has not.
_MIN_BLOCK_TOKENS: Final = 16
#: What `roost route` gives to both by default.
_INDEX_BYTES: Final = 192 << 20
_BINDING_BYTES: Final = 64 << 20


class EventDelays(msgspec.Struct, frozen=True, kw_only=True):
    """How late routers know what KV events and prompts say, in seconds."""

    events_after_s: float = 0.05  # after a block was stored or removed
    tokens_after_s: float = 0.02  # after a request came; 0: before it is decided


class NoEventsError(Exception):
    """A trace whose blocks cannot be told of."""


def check_can_tell(trace: Trace) -> None:
    """Raise NoEventsError if KV events cannot tell of the trace's blocks."""
    if trace.block_tokens < _MIN_BLOCK_TOKENS:
        raise NoEventsError(
            f"{trace.name}: blocks of {trace.block_tokens} tokens; KV events are simulated from "
            f"{_MIN_BLOCK_TOKENS} tokens on"
        )


class BlockNews:
    """What one replica has to tell since it was asked last."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._events: list[KvEvent] = []

    def stored(self, block_ids: Sequence[int], first: int, end: int) -> None:
        """The blocks from place `first` to before `end` of a prompt are computed. O(blocks)."""
        if first >= end:
            return
        names = _names(block_ids[first:end])
        parent = block_ids[first - 1] & ID_MASK if first else None
        size = self._block_tokens
        self._events.append(BlockStored(names, parent, (), size, Tier.DEVICE, local_hashes=names))

    def removed(self, block_ids: Sequence[int]) -> None:
        """These were evicted. O(blocks)."""
        self._events.append(BlockRemoved(_names(block_ids), Tier.DEVICE))

    def take(self) -> list[KvEvent]:
        """All of it, in order, once."""
        events, self._events = self._events, []
        return events


class EventView:
    """What one router knows by events."""

    def __init__(self, fleet: Fleet, model: str, block_tokens: int | None) -> None:
        """`block_tokens`: of the trace, whose ids are told; None: tokens are."""
        self.told = ToldResidency(TokenKnowledge(_INDEX_BYTES, _BINDING_BYTES), [model], _no_drift)
        self._block_tokens = block_tokens
        self._sinks = [self.told.sink(replica, 0) for replica in fleet.replicas]
        for sink in self._sinks:
            sink.trust_changed(Trust.EXACT, Reason.NONE)

    def apply(self, replica: int, events: list[KvEvent]) -> None:
        """`replica` tells these."""
        self._sinks[replica].apply(events)

    def wants_tokens(self, fields: RoutingFields) -> bool:
        """Whether a prompt that passes by is to be tokenised, as tokens/prompts.py decides it."""
        knowledge = self.told.knowledge
        if knowledge.wants_tokens(fields.chain):
            return True
        knowledge.touch(fields.chain)
        return False

    def bind(self, fields: RoutingFields, request: Request) -> None:
        """The tokens of a prompt are known. O(text blocks + token blocks)."""
        size, chain, knowledge = self._block_tokens, fields.chain, self.told.knowledge
        num_tokens = [chain_bytes(place) // TOKEN_BYTES for place in range(1, len(chain) + 1)]
        if size is None:
            tokens = prompt_tokens(fields.prompt)
            token_chains = hash_prompt(tokens, knowledge.block_sizes(), None, None)
        else:
            whole = request.block_ids[: request.prompt_tokens // size]
            token_chains = {size: array("Q", follow(None, _names(whole)))}
        knowledge.bind(chain, token_chains, num_tokens)


def _names(block_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(block & ID_MASK for block in block_ids)


def _no_drift(change: DriftChange) -> None:
    raise AssertionError(f"prompts are counted alike on both sides: {change}")
