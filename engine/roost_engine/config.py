"""Configuration of one replica: frozen, validated once, handed down by the composition root."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a decoder, as read from a GGUF header or an HF config.json.

    The defaults of the optional fields make a Llama; Qwen2, Qwen3 and Gemma 3 set some of them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_divisors: tuple[float, ...] = ()  # one for each rotary frequency; (): not scaled
    rms_norm_eps: float
    max_position: int  # longest context the weights were trained for, in tokens
    tie_embeddings: bool  # the output head is the embedding matrix
    eos_token_ids: frozenset[int]
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    qk_norm: bool = False  # RMS norm of each head of q and k, before the rotation (Qwen3, Gemma 3)
    post_norms: bool = False  # attention and MLP outputs are normed before they are added (Gemma)
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0  # Gemma: sqrt(hidden_size)
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    sliding_window: int = 0  # positions a query of a sliding layer sees, its own included
    sliding_layers: tuple[bool, ...] = ()  # which layers slide; (): none
    sliding_rope_theta: float | None = None  # of sliding layers, never scaled; None: rope_theta


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV cache. More blocks: more conversations stay warm, more memory."""

    num_blocks: int
    block_size: int = 16  # tokens a block; smaller shares more of a prefix, hashes more
    num_host_blocks: int = 0  # evicted blocks kept in host memory; 0: evicted is gone

    def __post_init__(self) -> None:
        """Refuse sizes that could never serve a request."""
        if self.block_size < 1 or self.num_blocks < 1:
            raise ValueError("block_size and num_blocks must be at least 1")
        if self.num_host_blocks < 0:
            raise ValueError("num_host_blocks must not be negative")

    @property
    def num_tokens(self) -> int:
        """Capacity in tokens."""
        return self.num_blocks * self.block_size


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one step may hold."""

    max_step_tokens: int = 512  # budget of a step; larger prefills faster, delays decodes more
    max_running: int = 64  # requests that hold blocks at the same time
    max_waiting: int = 1024  # beyond it requests are refused with 429
    max_model_len: int = 8192  # prompt and completion together, in tokens

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run.

        A step must hold one decode of each running request.
        """
        for name in ("max_step_tokens", "max_running", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_waiting < 0:
            raise ValueError("max_waiting must not be negative")
        if self.max_step_tokens < self.max_running:
            raise ValueError("max_step_tokens must be at least max_running")
