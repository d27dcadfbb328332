"""Llama decoder over a flat list of tokens and a paged KV cache.

    h = embedding[tokens]
    per layer:  h += O · attention(rope(QKV · norm(h)))
                h += down · (silu(gate · norm(h)) * (up · norm(h)))
    logits = head · norm(h)[rows asked for]

Tokens of different requests lie side by side, (num_tokens, hidden); only attention knows where
one request ends (its spans). Q, K, V and gate, up are fused into one matrix each: one large
product is faster than three small ones.

Invariant: in each layer all new keys and values are stored before any attention runs, so a
request may read blocks that another one fills in the same step.

Not here: block tables and positions (runner.py), reading files (loader/), sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_kernels.kv_store import store_kv
from roost_kernels.paged_attention import Span, paged_attention
from roost_kernels.rmsnorm import rms_norm
from roost_kernels.rope import apply_rope


@dataclass(frozen=True, slots=True)
class DecoderInput:
    """One step as tensors. `num_tokens` is the sum of the spans' queries."""

    token_ids: torch.Tensor  # (num_tokens,) int64
    slots: torch.Tensor  # (num_tokens,) int64, where each token's K and V go
    cos: torch.Tensor  # (num_tokens, head_dim / 2), rotary table rows of the positions
    sin: torch.Tensor
    spans: Sequence[Span]
    logits_rows: torch.Tensor  # (num_logits,) int64, tokens whose logits are wanted


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each (num_slots, num_kv_heads, head_dim)."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: torch.Tensor  # (q_size + 2 * kv_size, hidden)
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor  # (2 * intermediate, hidden)
    down: torch.Tensor


class LlamaDecoder:
    """The weights of one model and their computation; holds no state between calls.

    `weights`: Hugging Face names, complete (the loader has checked it). Fused parts are
    replaced in `weights` by views of the fused matrix, so that nothing is in memory twice.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        self._config = config
        self._embedding = weights[shapes.EMBEDDING]
        self._norm = weights[shapes.FINAL_NORM]
        self._head = self._embedding if config.tie_embeddings else weights[shapes.HEAD]
        self._layers = [_fuse_layer(weights, idx) for idx in range(config.num_layers)]

    def forward(self, step: DecoderInput, cache: Sequence[LayerCache]) -> torch.Tensor:
        """Store the step's K and V in `cache`; return logits (num_logits, vocab) fp32."""
        hidden = F.embedding(step.token_ids, self._embedding)
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            hidden = hidden + self._attention(layer, hidden, step, layer_cache)
            hidden = hidden + self._mlp(layer, hidden)
        rows = hidden.index_select(0, step.logits_rows)
        return F.linear(self._normed(rows, self._norm), self._head).float()

    def _attention(
        self, layer: _Layer, hidden: torch.Tensor, step: DecoderInput, cache: LayerCache
    ) -> torch.Tensor:
        config = self._config
        num_tokens = hidden.shape[0]
        qkv = F.linear(self._normed(hidden, layer.attention_norm), layer.qkv)
        heads = qkv.view(num_tokens, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated = apply_rope(heads[:, :num_rotated], step.cos, step.sin)
        q, k = rotated[:, : config.num_heads], rotated[:, config.num_heads :]
        v = heads[:, num_rotated:]
        store_kv(k, v, cache.k, cache.v, step.slots)
        attended = paged_attention(q, cache.k, cache.v, step.spans)
        return F.linear(attended.reshape(num_tokens, -1), layer.o)

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(self._normed(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._config.rms_norm_eps)


def _fuse_layer(weights: dict[str, torch.Tensor], layer_idx: int) -> _Layer:
    prefix = shapes.layer_prefix(layer_idx)
    attention = [f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"]
    mlp = [f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up")]
    return _Layer(
        attention_norm=weights[f"{prefix}input_layernorm.weight"],
        qkv=_fuse(weights, attention),
        o=weights[f"{prefix}self_attn.o_proj.weight"],
        mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"],
        gate_up=_fuse(weights, mlp),
        down=weights[f"{prefix}mlp.down_proj.weight"],
    )


def _fuse(weights: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Stack matrices over their rows; the entries of `weights` become views of the result."""
    parts = [weights[name] for name in names]
    fused = torch.cat(parts)
    start = 0
    for name, part in zip(names, parts, strict=True):
        weights[name] = fused[start : start + part.shape[0]]
        start += part.shape[0]
    return fused
