"""What a complete Llama checkpoint holds: tensor names, shapes, and a config that makes sense.

Both loaders end here, so that the decoder may index its weights without checks of its own.
Names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from roost_engine.config import ModelConfig
from roost_engine.loader.errors import ModelFileError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer_idx: int) -> str:
    """Common start of the names of one layer's tensors."""
    return f"model.layers.{layer_idx}."


def check_config(path: Path, config: ModelConfig) -> None:
    """Raise ModelFileError for sizes that no Llama decoder can have."""
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
    if config.num_heads % config.num_kv_heads:
        heads = f"{config.num_heads} attention heads over {config.num_kv_heads} key/value heads"
        raise ModelFileError(path, f"{heads} do not divide evenly")
    if config.head_dim % 2:
        raise ModelFileError(path, f"head_dim {config.head_dim} is odd; rotary needs pairs")
    if not config.rope_theta > 0 or not config.rms_norm_eps > 0:
        raise ModelFileError(path, "rope_theta and rms_norm_eps must be positive")


def check_shapes(path: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless `shapes` (HF names) is exactly a Llama checkpoint of `config`.

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
        raise ModelFileError(path, f"tensor {unknown[0]!r} is not part of a Llama model")


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    layer = {
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
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer_idx in range(config.num_layers):
        shapes |= {layer_prefix(layer_idx) + name: shape for name, shape in layer.items()}
    return shapes
