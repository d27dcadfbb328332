"""Text chain: two prompts share exactly their whole common blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roost_router.index.text_chain import (
    BLOCK_BYTES,
    TEXT_BLOCK_BYTES,
    chain_bytes,
    num_whole_blocks,
    text_chain,
)

#: Some reach into the blocks that grow.
PREFIXES = st.builds(lambda data, times: data * times, st.binary(max_size=900), st.integers(1, 60))


def test_a_partial_block_has_no_hash():
    assert [
        len(text_chain(b"a" * n))
        for n in (0, TEXT_BLOCK_BYTES - 1, TEXT_BLOCK_BYTES, 2 * TEXT_BLOCK_BYTES - 1, 512)
    ] == [0, 0, 1, 1, 2]


def test_equal_blocks_at_different_depths_differ():
    chain = text_chain(b"a" * 10 * TEXT_BLOCK_BYTES)

    assert len(set(chain)) == 10


@given(PREFIXES, st.binary(max_size=600), st.binary(max_size=600))
def test_shared_hashes_are_shared_whole_blocks(prefix, left, right):
    one, two = prefix + left, prefix + right
    common = 0
    while common < min(len(one), len(two)) and one[common] == two[common]:
        common += 1

    a, b = text_chain(one), text_chain(two)

    shared = num_whole_blocks(common)
    assert a[:shared] == b[:shared]
    assert not set(a[shared:]) & set(b[shared:])


def test_blocks_grow_with_depth():
    """Never more than 1/16 of what stands before them, and 16 more with each doubling."""
    depth = 0
    for size in BLOCK_BYTES:
        assert size <= max(TEXT_BLOCK_BYTES, depth / 16)
        depth += size
    lengths = [8 << 10, 16 << 10, 32 << 10, 64 << 10, 1 << 20, 1 << 30]
    assert [32, 48, 64, 80, 144, 304] == [num_whole_blocks(length) for length in lengths]


def test_blocks_and_bytes_tell_the_same():
    for num_blocks in range(len(BLOCK_BYTES) + 1):
        num_bytes = chain_bytes(num_blocks)
        assert num_whole_blocks(num_bytes) == num_blocks
        assert num_bytes == 0 or num_whole_blocks(num_bytes - 1) == num_blocks - 1
