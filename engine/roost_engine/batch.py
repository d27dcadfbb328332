"""What a step computes, as plain data: the hand-over from the scheduler to the model runner.

Knows neither torch nor requests. Built by scheduler.py and blocks.py, read by the runner.

A step is: first its `BlockCopy` orders, in their order, then its chunks. Copies come first since
a block that is copied out is one that a chunk overwrites, and a block that is copied in is one
that a chunk reads. Their order matters: a slot may be read by one copy and written by a later one.
"""

from __future__ import annotations

import enum

import msgspec


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """One request's share of a step: consecutive tokens whose keys and values are computed now.

    `block_table` is the request's own list, not a copy: copying cost O(context) a decode, 256
    entries for 4,096 tokens. It is to be read between `schedule` and `update` only; before and
    after, the scheduler changes it.
    """

    token_ids: list[int]  # the tokens of this chunk, at least one
    start: int  # position of the first of them; positions before it are in the cache already
    block_table: list[int]  # block ids that cover positions 0 .. start + len(token_ids) - 1
    wants_logits: bool  # the logits after the last token are asked for (a token is sampled)


class Direction(enum.Enum):
    """Where a block is copied to."""

    OUT = "out"  # device to host
    IN = "in"  # host to device


class BlockCopy(msgspec.Struct, frozen=True, gc=False):
    """An order to copy one block, keys and values of all layers, between the tiers."""

    block: int  # on the device
    host_block: int
    direction: Direction
