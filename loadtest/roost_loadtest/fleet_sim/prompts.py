"""Text and tokens that stand for a trace's prompts, which has ids of blocks only. Pure.

A token is four bytes of text, its id those bytes as a number, and a block its id over and over.
"""

from __future__ import annotations

from array import array
from struct import pack
from typing import TYPE_CHECKING, Final

from roost_router.fleet.fleet import PRIOR_BYTES_PER_TOKEN

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.trace import Request

#: What routers expect of text before they have seen any.
TOKEN_BYTES: Final = int(PRIOR_BYTES_PER_TOKEN)
_ID_BYTES = 8
#: Ids may be of any size and sign.
ID_MASK: Final = (1 << 64) - 1


def canonical_prompt(request: Request, block_tokens: int, number: int) -> bytes:
    """Bytes that agree with those of another request exactly as far as the block ids do.

    `number`: of the request; fills the end of a prompt that has no ids. O(bytes).
    """
    block_bytes, num_bytes = block_tokens * TOKEN_BYTES, request.prompt_tokens * TOKEN_BYTES
    times, rest = divmod(block_bytes, _ID_BYTES)
    if rest:  # an odd number of tokens a block
        blocks = [(pack("<Q", i & ID_MASK) * (times + 1))[:block_bytes] for i in request.block_ids]
    else:
        blocks = [pack("<Q", i & ID_MASK) * times for i in request.block_ids]
    missing = num_bytes - len(blocks) * block_bytes
    if missing > 0:
        blocks.append(pack("<Q", ~number & ID_MASK) * (missing // _ID_BYTES + 1))
    return b"".join(blocks)[:num_bytes]


def prompt_tokens(prompt: bytes) -> array[int]:
    """Token ids of such bytes. O(tokens)."""
    return array("I", prompt)
