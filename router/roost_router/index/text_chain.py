"""Text chain: the identity of a prompt's prefix, computed from bytes, without a tokenizer.

    hash_i = xxh3_64(bytes of block i, seed = hash_{i-1}),   hash_{-1} = 0

over blocks of the canonical prompt (openai_request.py makes it: model and endpoint first, then
tools, roles and contents), so two prompts share exactly as many hashes as they share whole
blocks from the start. Tokenising 16 KB costs 6 ms, this 5 µs.

Blocks grow with depth, so that their number grows with the logarithm of the prompt:

    depth     0 to 8 KB     to 16 KB     to 32 KB     to 64 KB    ...
    block      256 bytes         512        1,024        2,048        (a doubling: 16 blocks)

A common prefix is thus known to 1/16 of its length at worst, 1/32 on average, and what a prompt
costs (hashing, look-up, recording) hardly grows: 80 blocks at 64 KB instead of 256. What the
choice weighs is the difference between holding a long prefix and not holding it. 64-byte blocks
would cost four times as much at the start of a prompt and find at most 192 bytes more.

A collision can only misroute: the replica compares tokens before it shares memory.
"""

from bisect import bisect_right

from xxhash import xxh3_64_intdigest

#: The first blocks, in bytes.
TEXT_BLOCK_BYTES = 256
_NUM_SMALL = 32
_NUM_PER_DOUBLING = 16
_NUM_DOUBLINGS = 24  # up to 128 GB, beyond any body

#: Bytes of each block, by its place in the chain.
BLOCK_BYTES = [TEXT_BLOCK_BYTES] * _NUM_SMALL + [
    TEXT_BLOCK_BYTES << (doubling + 1)
    for doubling in range(_NUM_DOUBLINGS)
    for _ in range(_NUM_PER_DOUBLING)
]
_ENDS = [sum(BLOCK_BYTES[: place + 1]) for place in range(len(BLOCK_BYTES))]


def text_chain(prompt: bytes) -> list[int]:
    """Hashes of all whole blocks of `prompt`; a rest has none. O(bytes)."""
    chain: list[int] = []
    parent = start = 0
    for end in _ENDS[: num_whole_blocks(len(prompt))]:
        parent = xxh3_64_intdigest(prompt[start:end], parent)
        chain.append(parent)
        start = end
    return chain


def chain_bytes(num_blocks: int) -> int:
    """Bytes that the first `num_blocks` blocks of a chain cover."""
    return _ENDS[num_blocks - 1] if num_blocks else 0


def num_whole_blocks(num_bytes: int) -> int:
    """Blocks of which every byte is among the first `num_bytes`."""
    return bisect_right(_ENDS, num_bytes)
