"""Writing new keys and values into the paged cache.

Layout of the cache, per layer and for K and V alike:

    (num_blocks · block_size, num_kv_heads, head_dim)        row = slot

        block 0            block 1            block 2
    | 0 1 2 … 15 | 16 17 18 … 31 | 32 33 …          slot = block · block_size + offset

A token's row is contiguous over its heads, so writing one token and gathering a context are
plain row copies, and a block is one contiguous piece of memory (to swap or to send).
"""

from __future__ import annotations

import torch


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write row i of `k` and `v` to row `slots[i]` of the caches, in place.

    `k`, `v`: (num_tokens, num_kv_heads, head_dim), dtype of the caches. `slots`: (num_tokens,)
    int64, all different; IndexError if one is outside the cache.
    """
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)


def store_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """The same, one row at a time."""
    for row, slot in enumerate(slots.tolist()):
        k_cache[slot] = k[row]
        v_cache[slot] = v[row]
