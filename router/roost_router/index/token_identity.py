"""What a token chain begins with: the adapter and the salt that tell equal tokens apart. Pure.

    root = xxh3_64(adapter 0x1f salt, seed 1337); None without either

A chain that begins at `root` goes on as roost_wire/token_chain.py has it. Without adapter and salt
it is the chain of our engine's own hashes. Both sides come by here: what replicas tell
(token_index.py) and what prompts are bound to (binding.py). Many blocks are hashed in one go.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from struct import Struct

from xxhash import xxh3_64_intdigest

from roost_wire.token_chain import XXH3_SEED


def chain_root(adapter: str | None, salt: str | None) -> int | None:
    """The hash that stands before the first block of a chain; None is the plain beginning."""
    if not adapter and not salt:
        return None
    return xxh3_64_intdigest(f"{adapter or ''}\x1f{salt or ''}".encode(), XXH3_SEED)


_LINK = Struct("<QQ")


def local_hashes(token_ids: Sequence[int], block_size: int) -> list[int]:
    """Hashes of the tokens of each whole block, as token_chain.local_hash has it.

    The same for many blocks in a third of the time. OverflowError for an id of more than 32 bits.
    """
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    tokens, step = packed.tobytes(), 4 * block_size
    if len(tokens) == step:
        return [xxh3_64_intdigest(tokens, XXH3_SEED)]
    return [
        xxh3_64_intdigest(tokens[end - step : end], XXH3_SEED)
        for end in range(step, len(tokens) + 1, step)
    ]


def follow(parent: int | None, locals_: Iterable[int]) -> list[int]:
    """Chain hashes of consecutive blocks after `parent`, as token_chain.join_local has them."""
    pack, chain = _LINK.pack, []
    for local in locals_:
        parent = local if parent is None else xxh3_64_intdigest(pack(parent, local), XXH3_SEED)
        chain.append(parent)
    return chain
