"""Chunks of a step to the flat tensors that the torch decoder takes; allocates its KV cache.

Turns block tables into slots and positions once a step (layout: roost_kernels/kv_store.py).
Models with sliding layers get a second view of the step: other rotary tables, and spans that
hold only what a window reaches, so such a layer never reads more than window + chunk positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig, ModelConfig
from roost_engine.models.decoder import DecoderInput, LayerCache, View
from roost_engine.models.layer import WHOLE, Share
from roost_kernels.paged_attention import Span, build_span
from roost_kernels.rope import build_rope_table


def build_kv_cache(
    config: ModelConfig,
    cache: CacheConfig,
    dtype: torch.dtype,
    *,
    num_layers: int,
    share: Share = WHOLE,
) -> list[LayerCache]:
    """Memory for `num_layers` layers and a share of the heads, reserved but not touched."""
    shape = (cache.num_tokens, config.num_kv_heads // share.size, config.head_dim)
    return [
        LayerCache(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
        for _ in range(num_layers)
    ]


class StepLayout:
    """Lays out steps for one model and cache; holds the rotary tables."""

    def __init__(self, config: ModelConfig, cache: CacheConfig, dtype: torch.dtype) -> None:
        self._block_size = cache.block_size
        self._window = config.sliding_window if any(config.sliding_layers) else 0
        # No request can be longer than the model's context or than the whole cache.
        num_positions = min(config.max_position, cache.num_tokens)
        self._table = build_rope_table(
            config.head_dim, num_positions, config.rope_theta, dtype, config.rope_divisors
        )
        self._sliding_table = self._table
        if config.sliding_rope_theta is not None:
            self._sliding_table = build_rope_table(
                config.head_dim, num_positions, config.sliding_rope_theta, dtype
            )

    def lay_out(self, chunks: Sequence[Chunk]) -> DecoderInput:
        """Flat tensors of a step, chunk after chunk; at least one.

        IndexError for a position beyond the tables; AssertionError for a block table that does
        not cover its chunk.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        logits_rows: list[int] = []
        spans: list[Span] = []
        sliding_spans: list[Span] = []
        for chunk in chunks:
            start, num_tokens = len(token_ids), len(chunk.token_ids)
            slots = self._context_slots(chunk)
            spans.append(build_span(start, num_tokens, slots))
            if self._window:
                sliding_spans.append(build_span(start, num_tokens, slots, self._window))
            positions.extend(range(chunk.start, chunk.start + num_tokens))
            token_ids.extend(chunk.token_ids)
            if chunk.wants_logits:
                logits_rows.append(len(token_ids) - 1)
        rows = torch.tensor(positions)
        full = _view(self._table, rows, spans)
        return DecoderInput(
            token_ids=torch.tensor(token_ids),
            slots=torch.cat([span.slots[-span.num_queries :] for span in spans]),
            full=full,
            sliding=_view(self._sliding_table, rows, sliding_spans) if self._window else full,
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


def _view(
    table: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor, spans: Sequence[Span]
) -> View:
    cos, sin = table
    return View(cos.index_select(0, rows), sin.index_select(0, rows), spans)
