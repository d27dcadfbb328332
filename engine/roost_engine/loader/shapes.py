"""What a complete checkpoint holds: tensor names, shapes, and a config that makes sense.

Both loaders end here, so that the decoder may index its weights without checks of its own.
Names are Hugging Face's. One of them means two things: `post_attention_layernorm` is the norm
before the MLP, but where the outputs are normed too (Gemma) it is the norm after attention, and
the MLP's is `pre_feedforward_layernorm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from roost_engine.config import ModelConfig
from roost_engine.loader.errors import ModelFileError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

MAX_LAYERS = 4096  # far beyond any model; keeps a damaged number from costing memory


def layer_prefix(layer_idx: int) -> str:
    """Common start of the names of one layer's tensors."""
    return f"model.layers.{layer_idx}."


def check_config(path: Path, config: ModelConfig) -> None:
    """Raise ModelFileError for sizes that no decoder can have."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position": config.max_position,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ModelFileError(path, f"{name} is {size}")
    if config.num_layers > MAX_LAYERS:
        raise ModelFileError(path, f"{config.num_layers} layers announced, which no model has")
    if config.sliding_window < 0:
        raise ModelFileError(path, f"sliding_window is {config.sliding_window}")
    if config.num_heads % config.num_kv_heads:
        heads = f"{config.num_heads} attention heads over {config.num_kv_heads} key/value heads"
        raise ModelFileError(path, f"{heads} do not divide evenly")
    if config.head_dim % 2:
        raise ModelFileError(path, f"head_dim {config.head_dim} is odd; rotary needs pairs")
    sliding_theta = config.sliding_rope_theta
    numbers = (
        config.rope_theta,
        config.rms_norm_eps,
        1.0 if sliding_theta is None else sliding_theta,
    )
    if not all(0 < number < math.inf for number in numbers):
        raise ModelFileError(path, "rope_theta and rms_norm_eps must be positive")


def check_shapes(path: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless `shapes` (HF names) is exactly a checkpoint of `config`.

    An unexpected tensor is refused too: a bias or an expert that is silently left out gives a
    model that talks nonsense.
    """
    if config.num_layers > len(shapes):
        problem = f"{config.num_layers} layers announced, but only {len(shapes)} tensors stored"
        raise ModelFileError(path, problem)
    expected = _expected_shapes(config)
    for name, shape in expected.items():
        if name not in shapes:
            raise ModelFileError(path, f"tensor {name!r} is missing")
        if shapes[name] != shape:
            raise ModelFileError(path, f"tensor {name!r} has shape {shapes[name]}, not {shape}")
    unknown = sorted(shapes.keys() - expected.keys())
    if unknown:
        raise ModelFileError(path, f"tensor {unknown[0]!r} is not part of this model")


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    layer = _layer_shapes(config)
    for layer_idx in range(config.num_layers):
        shapes |= {layer_prefix(layer_idx) + name: shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }
    if config.attention_bias:
        layer["self_attn.q_proj.bias"] = (q_size,)
        layer["self_attn.k_proj.bias"] = layer["self_attn.v_proj.bias"] = (kv_size,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (config.head_dim,)
    if config.post_norms:
        layer["pre_feedforward_layernorm.weight"] = (hidden,)
        layer["post_feedforward_layernorm.weight"] = (hidden,)
    return layer
