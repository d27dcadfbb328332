"""Model shapes for tests that need one without the weights."""

from __future__ import annotations

from roost_engine.config import ModelConfig

#: SmolLM2-135M: 46,080 bytes of KV cache a token in float32.
SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    max_position=8192,
    tie_embeddings=True,
    eos_token_ids=frozenset({2}),
)
