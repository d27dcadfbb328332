"""What goes through the pipes between a router and its tokenizer workers. Pure.

    message = length (4 bytes, little-endian) MessagePack

The worker's first message is Hello. Then a Job comes in, and its Answer goes out, one at a time.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

import msgspec

LENGTH: Final = Struct("<I")


class Hello(msgspec.Struct, array_like=True):
    """The tokenizers are loaded, or why not."""

    error: str = ""


class Job(msgspec.Struct, array_like=True):
    """A prompt to be tokenised."""

    path: str
    body: bytes
    model: str
    block_sizes: list[int]
    adapter: str | None = None  # as replicas name it in their events


class Answer(msgspec.Struct, array_like=True):
    """Its tokens, or why there are none."""

    error: str = ""
    num_prompt_tokens: int = 0  # as a replica should count them
    token_chains: dict[int, bytes] = {}  # by block size: u64 in this machine's order
    num_tokens: list[int] = []  # certain by the end of each text block


def pack(message: Hello | Job | Answer) -> bytes:
    """A message with its length."""
    payload = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(payload)) + payload
