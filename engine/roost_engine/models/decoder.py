"""The decoder in torch: Llama, Mistral, Qwen2, Qwen3 and Gemma 3 over a paged KV cache.

    h = embedding[tokens] · embedding_scale
    per layer:  h += post(O · attention(rope(qk_norm(QKV · norm(h) + bias))))
                h += post(down · (act(gate · norm(h)) * (up · norm(h))))
    logits = head · norm(h)[rows asked for]

bias, qk_norm, post (norms of the outputs) and the scale are there where ModelConfig says so.
Tokens of different requests lie side by side, (num_tokens, hidden); only attention knows where
one request ends (its spans). The native decoder computes the same, faster; this one is its slow
twin, runs where no compiler is and on a GPU, and is what is split over processes (parallel.py).

Invariant: in each layer all new keys and values are stored before any attention runs, so a
request may read blocks that another one fills in the same step.

What a row may depend on: in float32 products are padded to `_ROW_MULTIPLE` rows, so that a row
of a product is the same whatever its neighbours; norms, rotation and activation are row by row.
Attention is not the same bit for bit between one query and several (paged_attention), and
other CPUs may have other kernels: equal tokens in any batch and chunking are what is seen here
and what the native decoder promises.

Not here: block tables and positions (step_layout.py), reading weights (layer.py), sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_engine.loader.stored import StoredTensor
from roost_engine.models.layer import CPU, WHOLE, Layer, Share, read_layer
from roost_kernels.kv_store import store_kv
from roost_kernels.paged_attention import Span, paged_attention
from roost_kernels.rmsnorm import rms_norm
from roost_kernels.rope import apply_rope

# Torch's float32 product computes the last M mod 4 rows in another order, so that their last bits
# differ; padded to 4 none of 1 to 64 rows did, in six shapes, on one CPU (AVX-512).
_ROW_MULTIPLE: Final = 4


@dataclass(frozen=True, slots=True)
class View:
    """What a kind of layer, full or sliding, sees of a step."""

    cos: torch.Tensor  # (num_tokens, head_dim / 2), rotary table rows of the positions
    sin: torch.Tensor
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class DecoderInput:
    """One step as tensors. `num_tokens` is the sum of the spans' queries."""

    token_ids: torch.Tensor  # (num_tokens,) int64
    slots: torch.Tensor  # (num_tokens,) int64, where each token's K and V go
    full: View
    sliding: View  # the same as `full` in models without sliding layers
    logits_rows: torch.Tensor  # (num_logits,) int64, tokens whose logits are wanted


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each (num_slots, num_kv_heads, head_dim)."""

    k: torch.Tensor
    v: torch.Tensor


def _leave(x: torch.Tensor) -> torch.Tensor:
    return x


class Decoder:
    """The weights of one model, or of a part of it, and their computation; keeps no state.

    `weights`: Hugging Face names, complete (the loader has checked it). They are converted one
    after the other, so what is in memory beside the result is one matrix.

    All tensors it is given later are on `device` too; it makes none of its own elsewhere.

    A part is the layers `layers` (a pipeline stage) and of each the share `share` of its heads
    and of the head's rows; `sum_up` then adds a tensor over the processes of the stage.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        *,
        layers: range | None = None,
        share: Share = WHOLE,
        sum_up: Callable[[torch.Tensor], torch.Tensor] = _leave,
        device: torch.device = CPU,
    ) -> None:
        self._config = config
        self._sum_up = sum_up
        self._num_heads = config.num_heads // share.size
        self._num_kv_heads = config.num_kv_heads // share.size
        self._layer_idxs = range(config.num_layers) if layers is None else layers
        self._layers = [
            read_layer(config, weights, layer_idx, dtype, share, device=device)
            for layer_idx in self._layer_idxs
        ]
        self._read_ends(weights, dtype, share, device)

    def _read_ends(
        self,
        weights: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        share: Share,
        device: torch.device,
    ) -> None:
        """Embedding for the first stage; final norm and head for the last."""

        def read(name: str) -> torch.Tensor:
            return weights[name].to_torch(dtype).to(device)

        is_first = self._layer_idxs.start == 0
        is_last = self._layer_idxs.stop == self._config.num_layers
        tied = self._config.tie_embeddings
        empty = torch.empty(0, device=device)
        needs_embedding = is_first or (is_last and tied)
        embedding = read(shapes.EMBEDDING) if needs_embedding else empty
        self._embedding = embedding if is_first else empty
        self._norm = read(shapes.FINAL_NORM) if is_last else empty
        head = embedding if tied or not is_last else read(shapes.HEAD)
        rows = head[share.of(self._config.vocab_size)] if is_last else empty
        # A share of a head that nothing else needs is copied, to let go of the rest.
        self._head = rows if is_first or share.size == 1 else rows.clone()

    def forward(self, step: DecoderInput, cache: Sequence[LayerCache]) -> torch.Tensor:
        """Store the step's K and V in `cache`; return logits (num_logits, vocab) fp32."""
        return self.logits(self.run_layers(self.embed(step), step, cache), step)

    def embed(self, step: DecoderInput) -> torch.Tensor:
        """What the first layer takes, (num_tokens, hidden)."""
        hidden = F.embedding(step.token_ids, self._embedding)
        scale = self._config.embedding_scale
        return hidden if scale == 1.0 else hidden * scale

    def run_layers(
        self, hidden: torch.Tensor, step: DecoderInput, cache: Sequence[LayerCache]
    ) -> torch.Tensor:
        """The layers of this part, one `cache` each."""
        slides = self._config.sliding_layers
        for layer_idx, layer, layer_cache in zip(
            self._layer_idxs, self._layers, cache, strict=True
        ):
            view = step.sliding if slides and slides[layer_idx] else step.full
            attended = self._attention(layer, hidden, step.slots, view, layer_cache)
            hidden = hidden + self._normed(attended, layer.attention_post_norm)
            mixed = self._mlp(layer, hidden)
            hidden = hidden + self._normed(mixed, layer.mlp_post_norm)
        return hidden

    def logits(self, hidden: torch.Tensor, step: DecoderInput) -> torch.Tensor:
        """Logits (num_logits, this share of vocab) fp32 of what the last layer gave."""
        rows = hidden.index_select(0, step.logits_rows)
        return _linear(self._normed(rows, self._norm), self._head).float()

    def _attention(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        view: View,
        cache: LayerCache,
    ) -> torch.Tensor:
        num_tokens, num_heads = hidden.shape[0], self._num_heads
        qkv = _linear(self._normed(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        heads = qkv.view(num_tokens, num_heads + 2 * self._num_kv_heads, self._config.head_dim)
        num_rotated = num_heads + self._num_kv_heads
        rotated = heads[:, :num_rotated]
        if layer.q_norm is not None:
            q, k = rotated[:, :num_heads], rotated[:, num_heads:]
            parts = (self._normed(q, layer.q_norm), self._normed(k, layer.k_norm))
            rotated = torch.cat(parts, dim=1)
        rotated = apply_rope(rotated, view.cos, view.sin)
        q, k = rotated[:, :num_heads], rotated[:, num_heads:]
        store_kv(k, heads[:, num_rotated:], cache.k, cache.v, slots)
        scale = self._config.attention_scale
        attended = paged_attention(q, cache.k, cache.v, view.spans, scale)
        return self._sum_up(_linear(attended.reshape(num_tokens, -1), layer.o))

    def _mlp(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = _linear(self._normed(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        is_silu = self._config.activation == "silu"
        activated = F.silu(gate) if is_silu else F.gelu(gate, approximate="tanh")
        return self._sum_up(_linear(activated * up, layer.down))

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """RMS norm over the last axis; `x` itself where the model has no such norm."""
        return x if weight is None else rms_norm(x, weight, self._config.rms_norm_eps)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Product of each row of `x` (num_rows, in) with `weight` (out, in), plus `bias`."""
    num_rows = x.shape[0]
    missing = -num_rows % _ROW_MULTIPLE
    if x.dtype != torch.float32 or missing == 0:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, missing)), weight, bias)[:num_rows]
