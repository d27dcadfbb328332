"""Configuration of one replica: frozen, validated once, handed down by the composition root."""

from __future__ import annotations

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a Llama-family decoder, as read from a GGUF header or an HF config.json."""

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


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV cache. More blocks: more conversations stay warm, more memory."""

    num_blocks: int
    block_size: int = 16  # tokens a block; smaller shares more of a prefix, hashes more

    def __post_init__(self) -> None:
        """Refuse sizes that could never serve a request."""
        if self.block_size < 1 or self.num_blocks < 1:
            raise ValueError("block_size and num_blocks must be at least 1")

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
