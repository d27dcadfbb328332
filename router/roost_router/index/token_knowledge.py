"""Token knowledge: what replicas' events say about prompts that come as text. Pure.

The token index and, for each block size that replicas use, a binding of text to it. This is what
the placer asks:

    wants_tokens   is it worth tokenising this prompt?     (then tokens/, off the path)
    bind           its tokens are known
    lookup         who holds how much of it

Memory: `index_cap_bytes`, and `binding_cap_bytes` shared by all sizes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from roost_router.index.binding import Binding
from roost_router.index.token_identity import chain_root, follow, local_hashes
from roost_router.index.token_index import TokenIndex

#: Block sizes bound at once. A fleet has one or two; each more takes memory from the others.
_MAX_SIZES = 4


class Known(NamedTuple):
    """What one holder holds of a prompt."""

    matched_tokens: int  # exact, if less than
    bound_tokens: int  # as many as are known; of what lies deeper nothing is known here


class TokenKnowledge:
    """Token index and bindings."""

    def __init__(self, index_cap_bytes: int, binding_cap_bytes: int) -> None:
        self.index = TokenIndex(index_cap_bytes)
        self._cap_bytes = binding_cap_bytes
        self._bindings: dict[int, Binding] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        return self.index.num_bytes + sum(b.num_bytes for b in self._bindings.values())

    def binding(self, block_size: int) -> Binding | None:
        """The binding for token blocks of this size, if any prompt was bound."""
        return self._bindings.get(block_size)

    def wants_tokens(self, text_chain: Sequence[int]) -> bool:
        """Whether something of this prompt is not bound that replicas tell of. O(log)."""
        if not text_chain:
            return False
        for size in self.block_sizes():
            binding = self._bindings.get(size)
            if binding is None or binding.num_bound(text_chain) < len(text_chain):
                return True
        return False

    def block_sizes(self) -> list[int]:
        """The block sizes in which a prompt's tokens are wanted, in tokens."""
        sizes = self.index.holders_by_block_size()
        used = [size for size in self._bindings if size in sizes]
        used += [size for size in sizes if size not in self._bindings]
        return used[:_MAX_SIZES]

    def bind(
        self,
        text_chain: Sequence[int],
        token_chains: Mapping[int, array[int]],
        num_tokens: Sequence[int],
    ) -> None:
        """A prompt was tokenised: bind it in the block sizes that are wanted now.

        `token_chains`: by block size, see `hash_prompt`. `num_tokens`: how many tokens are certain
        by the end of each text block. O(text blocks + token blocks).
        """
        self._follow_sizes()
        for size, binding in self._bindings.items():
            if size in token_chains:
                binding.bind(text_chain, token_chains[size], num_tokens)

    def touch(self, text_chain: Sequence[int]) -> None:
        """A prompt that is bound was asked for again: keep it. O(text blocks)."""
        for binding in self._bindings.values():
            binding.touch(text_chain)

    def lookup(self, text_chain: Sequence[int], holders: int) -> dict[int, Known]:
        """What is known of each holder in the mask `holders` that has told of a block.

        All of them are in it, if anything of the prompt is bound: also those who hold nothing.
        O(holders + distinct depths * log).
        """
        known: dict[int, Known] = {}
        for size, told in self.index.holders_by_block_size().items():
            binding, mask = self._bindings.get(size), told & holders
            if binding is None or not mask:
                continue
            found = binding.lookup(self.index, text_chain, mask)
            if not found.bound_tokens:
                continue
            for matched, who in found.levels:
                mask &= ~who
                _note(known, who, Known(matched, found.bound_tokens))
            _note(known, mask, Known(0, found.bound_tokens))
        return known

    def _follow_sizes(self) -> None:
        """Bind for the sizes that replicas use now."""
        used = self.block_sizes()
        if not used:
            return  # all replicas have begun anew, and will tell the same sizes again
        if len(used) == len(self._bindings) and all(size in self._bindings for size in used):
            return
        cap = self._cap_bytes // len(used)
        old = self._bindings
        self._bindings = {size: old[size] if size in old else Binding(size, cap) for size in used}
        for binding in self._bindings.values():
            binding.set_cap(cap)


def hash_prompt(
    token_ids: Sequence[int], block_sizes: Iterable[int], adapter: str | None, salt: str | None
) -> dict[int, array[int]]:
    """Token chain ("Q") of a prompt for each block size. O(tokens * sizes), for a worker.

    `adapter` and `salt` as replicas tell them.
    """
    root = chain_root(adapter, salt)
    return {size: array("Q", follow(root, local_hashes(token_ids, size))) for size in block_sizes}


def _note(known: dict[int, Known], holders: int, what: Known) -> None:
    while holders:
        bit = holders & -holders
        known[bit.bit_length() - 1] = what
        holders ^= bit
