"""Prompts of a tokenizer that takes each four bytes as a number, bound and told of."""

from __future__ import annotations

from roost_router.index.text_chain import chain_bytes, text_chain
from roost_router.index.token_knowledge import TokenKnowledge, hash_prompt
from roost_wire.kv_events import BlockStored, Tier
from roost_wire.token_chain import block_hashes

SIZE = 16  # tokens a block
WIDTH = 4  # bytes a token


def tokens_of(prompt: bytes) -> list[int]:
    return [
        int.from_bytes(prompt[at : at + WIDTH], "little") for at in range(0, len(prompt), WIDTH)
    ]


def certain(prompt: bytes, *, behind: int = 0) -> list[int]:
    """Tokens by each text block's end; `behind` fewer, as if a word might go on."""
    ends = [chain_bytes(place + 1) for place in range(len(text_chain(prompt)))]
    return [max(0, end // WIDTH - behind) for end in ends]


def stored(prompt: bytes, num_blocks: int, size: int = SIZE) -> BlockStored:
    tokens = tokens_of(prompt)[: num_blocks * size]
    chain = block_hashes(tokens, size)
    return BlockStored(tuple(chain), None, tuple(tokens), size, Tier.DEVICE)


def learn(knowledge: TokenKnowledge, prompt: bytes, adapter: str | None = None) -> None:
    """Bind a prompt, as a worker's answer would."""
    chains = hash_prompt(tokens_of(prompt), knowledge.block_sizes(), adapter, None)
    knowledge.bind(text_chain(prompt), chains, certain(prompt))
