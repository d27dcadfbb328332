"""Runs one step of the scheduler on the model: chunks in, logits out. Owns the KV cache.

Turns block tables into slots and positions once a step (layout: roost_kernels/kv_store.py) and
hands flat tensors to the decoder. It keeps nothing about requests: whatever the chunks' block
tables say is in the cache is taken to be there.

Cost: one pass over the weights a step, plus attention per chunk; a step of one token takes
about the time to read the weights once.

Not here: which tokens to run (scheduler.py), choosing a token from logits (sampling.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig, ModelConfig
from roost_engine.loader import LoadedModel
from roost_engine.loader.shapes import EMBEDDING
from roost_engine.models.decoder import DecoderInput, LayerCache, LlamaDecoder
from roost_kernels.paged_attention import Span, build_span
from roost_kernels.rope import build_rope_table


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of KV cache one token takes over all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class ModelRunner:
    """The model with its KV cache; not thread-safe, one step at a time.

    The cache has the dtype of the weights. Its memory is reserved but not touched, so pages
    become resident as blocks are first used.
    """

    def __init__(self, model: LoadedModel, cache: CacheConfig) -> None:
        config = model.config
        dtype = model.weights[EMBEDDING].dtype
        self._block_size = cache.block_size
        self._vocab_size = config.vocab_size
        self._decoder = LlamaDecoder(config, model.weights)
        # No request can be longer than the model's context or than the whole cache.
        num_positions = min(config.max_position, cache.num_tokens)
        self._cos, self._sin = build_rope_table(
            config.head_dim, num_positions, config.rope_theta, dtype, config.rope_divisors
        )
        shape = (cache.num_tokens, config.num_kv_heads, config.head_dim)
        self._cache = [
            LayerCache(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
            for _ in range(config.num_layers)
        ]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute the chunks' tokens, leaving their keys and values in their blocks.

        Returns fp32 logits (number of chunks with wants_logits, vocab_size), in the order of
        the chunks. Chunks are independent requests, but a chunk may read blocks that an
        earlier or later chunk of the same step fills.

        IndexError for a token, block or position that the model or the cache does not have;
        AssertionError for a block table that does not cover its chunk.
        """
        if not chunks:
            return torch.empty(0, self._vocab_size)
        return self._decoder.forward(self._lay_out(chunks), self._cache)

    def _lay_out(self, chunks: Sequence[Chunk]) -> DecoderInput:
        """Flat tensors of the step: chunk after chunk."""
        token_ids: list[int] = []
        positions: list[int] = []
        logits_rows: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            num_tokens = len(chunk.token_ids)
            context_len = chunk.start + num_tokens
            spans.append(build_span(len(token_ids), num_tokens, self._context_slots(chunk)))
            positions.extend(range(chunk.start, context_len))
            token_ids.extend(chunk.token_ids)
            if chunk.wants_logits:
                logits_rows.append(len(token_ids) - 1)
        position_rows = torch.tensor(positions)
        return DecoderInput(
            token_ids=torch.tensor(token_ids),
            slots=torch.cat([span.slots[-span.num_queries :] for span in spans]),
            cos=self._cos.index_select(0, position_rows),
            sin=self._sin.index_select(0, position_rows),
            spans=spans,
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64),
        )

    def _context_slots(self, chunk: Chunk) -> torch.Tensor:
        """Slots of positions 0 .. end of the chunk, (context_len,) int64."""
        context_len = chunk.start + len(chunk.token_ids)
        num_blocks = -(-context_len // self._block_size)
        assert chunk.token_ids, "a chunk has at least one token"
        assert len(chunk.block_table) >= num_blocks, "the block table must cover the chunk"
        blocks = torch.tensor(chunk.block_table[:num_blocks]).unsqueeze(1)
        slots = blocks * self._block_size + torch.arange(self._block_size)
        return slots.flatten()[:context_len]
