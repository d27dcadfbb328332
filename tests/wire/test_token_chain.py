"""Token chain: layout pinned by vectors computed from the definition, step by step."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from roost_wire.token_chain import block_hashes, next_block_hash


def test_the_chain_is_the_documented_one():
    tokens = list(range(32))
    local = [
        xxhash.xxh3_64(struct.pack("<16I", *tokens[i : i + 16]), seed=1337).intdigest()
        for i in (0, 16)
    ]
    second = xxhash.xxh3_64(struct.pack("<QQ", *local), seed=1337).intdigest()

    assert [local[0], second] == block_hashes(tokens, 16)


def test_the_values_do_not_change_between_releases():
    """Replicas of different releases share an index: a change here is a new wire format."""
    assert block_hashes(list(range(40)), 16) == [15310707395893867146, 13769157705258532664]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=70), st.integers(1, 20), st.integers(0, 70))
def test_prompts_share_as_many_hashes_as_whole_blocks(tokens, block_size, cut):
    cut = min(cut, len(tokens))
    other = tokens[:cut] + [token ^ 1 for token in tokens[cut:]]

    one, two = block_hashes(tokens, block_size), block_hashes(other, block_size)

    shared = cut // block_size
    assert one[:shared] == two[:shared]
    assert all(a != b for a, b in zip(one[shared:], two[shared:], strict=True))
    assert len(one) == len(tokens) // block_size


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_outside_32_bits_is_refused(token):
    with pytest.raises(struct.error):
        next_block_hash(None, [token])
