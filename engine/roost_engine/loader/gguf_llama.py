"""A GGUF file of architecture `llama` as ModelConfig and weights under Hugging Face's names.

llama.cpp stores the rows of Q and K of each head interleaved, (x0, x_{d/2}, x1, x_{d/2+1}, ...),
for its adjacent-pair rotary; ours is Hugging Face's rotate-half, so the rows are put back:

    hf = gguf.reshape(heads, d/2, 2, hidden).swapaxes(1, 2)

The scaled rotary embedding of Llama 3.1 comes as the tensor `rope_freqs.weight`: what each
frequency is divided by.

Only what the decoder implements is accepted: no other rotary scaling, no biases, no experts.
Not here: the container (gguf.py), the tokenizer (gguf_tokenizer.py).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_metadata import GgufMetadata

_ARCHITECTURE: Final = "llama"
_ROPE_DIVISORS: Final = "rope_freqs.weight"

_GLOBAL_NAMES: Final = {
    "token_embd.weight": shapes.EMBEDDING,
    "output_norm.weight": shapes.FINAL_NORM,
    "output.weight": shapes.HEAD,
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def check_architecture(file: GgufFile) -> None:
    """Raise ModelFileError, by name, for a model that the decoder does not implement."""
    metadata = GgufMetadata(file)
    architecture = metadata.string("general.architecture")
    if architecture != _ARCHITECTURE:
        problem = f"architecture {architecture!r} is not supported, only {_ARCHITECTURE!r}"
        raise ModelFileError(file.path, problem)
    scaling = metadata.string("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelFileError(file.path, f"rope scaling {scaling!r} is not supported")
    if metadata.integer("llama.expert_count", 0):
        raise ModelFileError(file.path, "mixture of experts (llama.expert_count) is not supported")


def read_config(file: GgufFile, eos_token_ids: frozenset[int]) -> ModelConfig:
    """The decoder's shape. Call `check_architecture` first."""
    metadata = GgufMetadata(file)
    hidden_size = metadata.integer("llama.embedding_length")
    num_heads = metadata.integer("llama.attention.head_count")
    if num_heads < 1:
        raise ModelFileError(file.path, f"llama.attention.head_count is {num_heads}")
    head_dim = metadata.integer("llama.attention.key_length", hidden_size // num_heads)
    rotary_dim = metadata.integer("llama.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        problem = f"rotary over {rotary_dim} of {head_dim} dimensions is not supported"
        raise ModelFileError(file.path, problem)
    embedding = file.tensors.get("token_embd.weight")
    config = ModelConfig(
        vocab_size=embedding.shape[0] if embedding else 0,
        hidden_size=hidden_size,
        intermediate_size=metadata.integer("llama.feed_forward_length"),
        num_layers=metadata.integer("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=metadata.integer("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope_theta=metadata.number("llama.rope.freq_base", 10000.0),
        rope_divisors=_read_rope_divisors(file, head_dim),
        rms_norm_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        max_position=metadata.integer("llama.context_length"),
        tie_embeddings="output.weight" not in file.tensors,
        eos_token_ids=eos_token_ids,
    )
    shapes.check_config(file.path, config)
    return config


def _read_rope_divisors(file: GgufFile, head_dim: int) -> tuple[float, ...]:
    info = file.tensors.get(_ROPE_DIVISORS)
    if info is None:
        return ()
    if info.shape != (head_dim // 2,):
        problem = f"tensor {_ROPE_DIVISORS!r} has shape {info.shape}, not {(head_dim // 2,)}"
        raise ModelFileError(file.path, problem)
    divisors = file.read(_ROPE_DIVISORS)
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        problem = f"tensor {_ROPE_DIVISORS!r} holds numbers that are not positive"
        raise ModelFileError(file.path, problem)
    return tuple(divisors.tolist())


def read_weights(
    file: GgufFile, config: ModelConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """All tensors in `dtype`, checked to be complete before the first is dequantised."""
    hf_names = {name: _hf_name(file, name) for name in file.tensors if name != _ROPE_DIVISORS}
    stored = {hf_name: file.tensors[name].shape for name, hf_name in hf_names.items()}
    shapes.check_shapes(file.path, config, stored)
    return {
        hf_name: torch.from_numpy(_restore_rows(file.read(name), hf_name, config)).to(dtype)
        for name, hf_name in hf_names.items()
    }


def _hf_name(file: GgufFile, name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match name.split("."):
        case ["blk", layer_idx, kind, "weight"] if layer_idx.isdecimal() and kind in _LAYER_NAMES:
            return f"{shapes.layer_prefix(int(layer_idx))}{_LAYER_NAMES[kind]}.weight"
    raise ModelFileError(file.path, f"tensor {name!r} is not part of a Llama model")


def _restore_rows(
    weight: npt.NDArray[np.float32], hf_name: str, config: ModelConfig
) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order of Q and K; other tensors pass through."""
    if hf_name.endswith("q_proj.weight"):
        num_heads = config.num_heads
    elif hf_name.endswith("k_proj.weight"):
        num_heads = config.num_kv_heads
    else:
        return weight
    pairs = weight.reshape(num_heads, config.head_dim // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)
