"""Token chain: the identity of a block of KV cache, the same on every replica.

    local_i = xxh3_64(tokens of block i as little-endian u32, seed 1337)
    hash_0  = local_0
    hash_i  = xxh3_64(hash_{i-1} || local_i, both little-endian u64, seed 1337)

Seed and layout are those of Dynamo's `compute_block_hash_for_seq` and sequence hash, so that
an index built from our events can be compared with theirs. The hash is a *name*, not a proof:
fixed inputs that collide exist for XXH3, therefore whoever shares memory by it compares the
tokens as well (roost_engine.blocks does). Only full blocks have a hash.

Cost: two C calls a block, about 0.4 µs; O(number of tokens).
"""

from collections.abc import Callable, Sequence
from struct import pack

from xxhash import xxh3_64_intdigest

XXH3_SEED = 1337


def next_block_hash(parent_hash: int | None, block_tokens: Sequence[int]) -> int:
    """Hash of the block `block_tokens` that follows the block named `parent_hash`.

    `parent_hash` is None for the first block of a prompt. Token ids must fit in 32 bits
    (struct.error otherwise).
    """
    return join_local(parent_hash, local_hash(block_tokens))


def local_hash(block_tokens: Sequence[int]) -> int:
    """Hash of a block's tokens alone. struct.error for a token id of more than 32 bits."""
    return xxh3_64_intdigest(pack(f"<{len(block_tokens)}I", *block_tokens), XXH3_SEED)


def join_local(parent_hash: int | None, local: int) -> int:
    """Hash of the block whose tokens have the hash `local`, and that follows `parent_hash`."""
    if parent_hash is None:
        return local
    return xxh3_64_intdigest(pack("<QQ", parent_hash, local), XXH3_SEED)


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    hash_block: Callable[[int | None, Sequence[int]], int] = next_block_hash,
) -> list[int]:
    """Chain of all full blocks of `token_ids`; a last partial block has no hash.

    `hash_block` is replaced only by tests, to force collisions.
    """
    hashes: list[int] = []
    parent: int | None = None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes
