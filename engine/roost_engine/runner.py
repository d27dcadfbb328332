"""Runs one step of the scheduler on the torch decoder: chunks in, logits out. Owns the KV cache.

It keeps nothing about requests: whatever the chunks' block tables say is in the cache is taken
to be there.

Cost: one pass over the weights a step, plus attention per chunk; a step of one token takes
about the time to read the weights once.

Not here: which tokens to run (scheduler.py), laying them out (step_layout.py), choosing a token
from logits (sampling.py), a model split over processes (parallel.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig
from roost_engine.loader import LoadedModel
from roost_engine.models.decoder import Decoder, LayerCache
from roost_engine.models.layer import CPU
from roost_engine.step_layout import StepLayout, build_kv_cache


class ModelRunner:
    """The model with its KV cache; not thread-safe, one step at a time.

    Weights are converted to `dtype`, which the cache has too: about a second for SmolLM2 from
    4-bit blocks to float32. The cache's memory is reserved but not touched, so on a CPU pages
    become resident as blocks are first used.

    Weights, cache and rotary tables are on `device`. A step crosses over to it in one copy,
    and its logits come back in one.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: CacheConfig,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        config = model.config
        self._vocab_size = config.vocab_size
        self._decoder = Decoder(config, model.weights, dtype, device=device)
        self._layout = StepLayout(config, cache, dtype, device)
        self._cache = build_kv_cache(
            config, cache, dtype, num_layers=config.num_layers, device=device
        )

    @property
    def cache(self) -> Sequence[LayerCache]:
        """Keys and values of each layer, for the host tier."""
        return self._cache

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute the chunks' tokens, leaving their keys and values in their blocks.

        Returns fp32 logits (number of chunks with wants_logits, vocab_size) in host memory, in
        the order of the chunks. Chunks are independent requests, but a chunk may read blocks
        that an earlier or later chunk of the same step fills.

        IndexError for a token, block or position that the model or the cache does not have;
        AssertionError for a block table that does not cover its chunk.
        """
        if not chunks:
            return torch.empty(0, self._vocab_size)
        return self._decoder.forward(self._layout.lay_out(chunks), self._cache).to(CPU)
