"""A model without weights whose next token depends on every token it finds in the KV cache.

It keeps a "cache" of token ids by slot, as the real runner keeps keys and values. A block handed
out twice, evicted too early or shared by mistake changes the tokens that come out.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from roost_engine.batch import Direction

if TYPE_CHECKING:
    import torch

    from roost_engine.batch import BlockCopy, Chunk


def next_token(context: Sequence[int], vocab_size: int) -> int:
    """The token that follows `context`."""
    return zlib.crc32(repr(list(context)).encode()) % vocab_size


def continuation(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What an endless memory would generate: the slow twin of everything the engine does."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, vocab_size))
    return tokens[len(prompt) :]


_GARBAGE = -1


class FakeModel:
    """Computes steps; `fail_on_call` makes that call raise.

    While a token is in `spoils`, chunks with it leave garbage in the cache; whoever reads that
    gets NaN for logits, now or later.
    """

    def __init__(self, block_size: int, vocab_size: int = 50) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.calls = 0
        self.fail_on_call: int | None = None
        self.spoils: set[int] = set()
        self._cache: dict[int, int] = {}
        self._host: dict[int, list[int | None]] = {}  # host block -> content of its slots

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Move blocks between the tiers, one after the other."""
        for copy in copies:
            slots = range(copy.block * self.block_size, (copy.block + 1) * self.block_size)
            if copy.direction is Direction.OUT:
                self._host[copy.host_block] = [self._cache.get(slot) for slot in slots]
                continue
            for slot, content in zip(slots, self._host[copy.host_block], strict=True):
                assert content is not None, "a block that was never filled is restored"
                self._cache[slot] = content

    def next_tokens(self, chunks: Sequence[Chunk]) -> list[int | None]:
        """Write the chunks to the cache, then read each chunk's whole context back from it.

        None stands for logits that are NaN.
        """
        self.calls += 1
        if self.calls == self.fail_on_call:
            raise RuntimeError("the model is on fire")
        written: set[int] = set()
        for chunk in chunks:
            for offset, token_id in enumerate(chunk.token_ids):
                slot = self._slot(chunk, chunk.start + offset)
                assert slot not in written, "two chunks write to one slot"
                written.add(slot)
                self._cache[slot] = _GARBAGE if token_id in self.spoils else token_id
        return [self._next_token(chunk) for chunk in chunks if chunk.wants_logits]

    def spoil(self, chunks: Sequence[Chunk]) -> None:
        """Leave garbage where these chunks would have written: their step was interrupted."""
        for chunk in chunks:
            for offset in range(len(chunk.token_ids)):
                self._cache[self._slot(chunk, chunk.start + offset)] = _GARBAGE

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits that make greedy sampling choose `next_tokens`."""
        import torch

        rows = torch.zeros(sum(chunk.wants_logits for chunk in chunks), self.vocab_size)
        for row, token_id in enumerate(self.next_tokens(chunks)):
            if token_id is None:
                rows[row] = float("nan")
            else:
                rows[row, token_id] = 100.0
        return rows

    def _next_token(self, chunk: Chunk) -> int | None:
        context = self._context(chunk)
        return None if _GARBAGE in context else next_token(context, self.vocab_size)

    def _context(self, chunk: Chunk) -> list[int]:
        return [
            self._cache[self._slot(chunk, position)]
            for position in range(chunk.start + len(chunk.token_ids))
        ]

    def _slot(self, chunk: Chunk, position: int) -> int:
        block = chunk.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size
