"""Text chain: two prompts share exactly their whole common blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roost_router.index.text_chain import TEXT_BLOCK_BYTES, text_chain


def test_a_partial_block_has_no_hash():
    assert [
        len(text_chain(b"a" * n))
        for n in (0, TEXT_BLOCK_BYTES - 1, TEXT_BLOCK_BYTES, 2 * TEXT_BLOCK_BYTES - 1, 512)
    ] == [0, 0, 1, 1, 2]


def test_equal_blocks_at_different_depths_differ():
    chain = text_chain(b"a" * 10 * TEXT_BLOCK_BYTES)

    assert len(set(chain)) == 10


@given(st.binary(max_size=2000), st.binary(max_size=600), st.binary(max_size=600))
def test_shared_hashes_are_shared_whole_blocks(prefix, left, right):
    one, two = prefix + left, prefix + right
    common = 0
    while common < min(len(one), len(two)) and one[common] == two[common]:
        common += 1

    a, b = text_chain(one), text_chain(two)

    shared = common // TEXT_BLOCK_BYTES
    assert a[:shared] == b[:shared]
    assert not set(a[shared:]) & set(b[shared:])
