"""Chunks of a step to the flat tensors that the torch decoder takes; allocates its KV cache.

Turns block tables into slots and positions once a step (layout: roost_kernels/kv_store.py), on
the host; all numbers of a step go to the device in one copy. They are checked before, since a
GPU tells of a wrong index late and then computes nothing any more.

Models with sliding layers get a second view of the step: other rotary tables, and spans that
hold only what a window reaches, so such a layer never reads more than window + chunk positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig, ModelConfig
from roost_engine.models.decoder import DecoderInput, LayerCache, View
from roost_engine.models.layer import CPU, WHOLE, Share
from roost_kernels.paged_attention import Span, build_span
from roost_kernels.rope import build_rope_table


def build_kv_cache(
    config: ModelConfig,
    cache: CacheConfig,
    dtype: torch.dtype,
    *,
    num_layers: int,
    share: Share = WHOLE,
    device: torch.device = CPU,
) -> list[LayerCache]:
    """Memory for `num_layers` layers and a share of the heads, reserved but not touched."""
    shape = (cache.num_tokens, config.num_kv_heads // share.size, config.head_dim)
    return [
        LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in "kv"))
        for _ in range(num_layers)
    ]


class StepLayout:
    """Lays out steps for one model and cache; holds the rotary tables."""

    def __init__(
        self,
        config: ModelConfig,
        cache: CacheConfig,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self._device = device
        self._vocab_size = config.vocab_size
        self._num_blocks = cache.num_blocks
        self._block_size = cache.block_size
        self._window = config.sliding_window if any(config.sliding_layers) else 0
        # No request can be longer than the model's context or than the whole cache.
        self._num_positions = min(config.max_position, cache.num_tokens)

        def build_table(
            theta: float, divisors: Sequence[float]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            # Computed on the host: another device would round its sines otherwise.
            cos, sin = build_rope_table(
                config.head_dim, self._num_positions, theta, dtype, divisors
            )
            return cos.to(device), sin.to(device)

        self._table = build_table(config.rope_theta, config.rope_divisors)
        self._sliding_table = self._table
        if config.sliding_rope_theta is not None:
            self._sliding_table = build_table(config.sliding_rope_theta, ())

    def lay_out(self, chunks: Sequence[Chunk]) -> DecoderInput:
        """Flat tensors of a step, chunk after chunk; at least one.

        IndexError for a token, block or position that the model or the cache does not have;
        AssertionError for a block table that does not cover its chunk.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        logits_rows: list[int] = []
        contexts: list[torch.Tensor] = []
        for chunk in chunks:
            contexts.append(self._context_slots(chunk))
            positions.extend(range(chunk.start, chunk.start + len(chunk.token_ids)))
            token_ids.extend(chunk.token_ids)
            if chunk.wants_logits:
                logits_rows.append(len(token_ids) - 1)
        _check_range("token", token_ids, self._vocab_size)
        _check_range("position", positions, self._num_positions)
        ids, rows, logits, *slots = self._to_device([token_ids, positions, logits_rows], contexts)
        spans = list(_spans(chunks, slots, window=0))
        full = _view(self._table, rows, spans)
        sliding = full
        if self._window:
            sliding = _view(self._sliding_table, rows, list(_spans(chunks, slots, self._window)))
        return DecoderInput(
            token_ids=ids,
            slots=torch.cat([span.slots[-span.num_queries :] for span in spans]),
            full=full,
            sliding=sliding,
            logits_rows=logits,
        )

    def _context_slots(self, chunk: Chunk) -> torch.Tensor:
        """Slots of positions 0 .. end of the chunk, (context_len,) int64, in host memory."""
        context_len = chunk.start + len(chunk.token_ids)
        num_blocks = -(-context_len // self._block_size)
        assert chunk.token_ids, "a chunk has at least one token"
        assert len(chunk.block_table) >= num_blocks, "the block table must cover the chunk"
        table = chunk.block_table[:num_blocks]
        _check_range("block", table, self._num_blocks)
        blocks = torch.tensor(table, device=CPU).unsqueeze(1)
        slots = blocks * self._block_size + torch.arange(self._block_size, device=CPU)
        return slots.flatten()[:context_len]

    def _to_device(
        self, lists: Sequence[Sequence[int]], tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Each list and tensor of numbers as int64 on the device: parts of one copy."""
        parts = [torch.tensor(each, dtype=torch.int64, device=CPU) for each in lists]
        parts.extend(tensors)
        packed = torch.cat(parts).to(self._device)
        return list(packed.split_with_sizes([len(part) for part in parts]))


def _check_range(what: str, values: Sequence[int], end: int) -> None:
    least, largest = min(values, default=0), max(values, default=0)
    if least < 0 or largest >= end:
        raise IndexError(f"{what} {least if least < 0 else largest} of {end}")


def _spans(
    chunks: Sequence[Chunk], contexts: Sequence[torch.Tensor], window: int
) -> Iterator[Span]:
    start = 0
    for chunk, slots in zip(chunks, contexts, strict=True):
        num_tokens = len(chunk.token_ids)
        yield build_span(start, num_tokens, slots, window)
        start += num_tokens


def _view(
    table: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor, spans: Sequence[Span]
) -> View:
    cos, sin = table
    return View(cos.index_select(0, rows), sin.index_select(0, rows), spans)
