"""What a step computes, as plain data: the hand-over from the scheduler to the model runner.

Knows neither torch nor requests. Built by scheduler.py, read by runner.py.
"""

from __future__ import annotations

import msgspec


class Chunk(msgspec.Struct, frozen=True):
    """One request's share of a step: consecutive tokens whose keys and values are computed now."""

    token_ids: list[int]  # the tokens of this chunk, at least one
    start: int  # position of the first of them; positions before it are in the cache already
    block_table: list[int]  # block ids that cover positions 0 .. start + len(token_ids) - 1
    wants_logits: bool  # the logits after the last token are asked for (a token is sampled)
