"""A GGUF file as ModelConfig and weights under Hugging Face's names.

Architectures: llama, qwen2, qwen3, gemma3. For `llama` only, llama.cpp stores the rows of Q and K
of each head interleaved, (x0, x_{d/2}, x1, x_{d/2+1}, ...), for its adjacent-pair rotary; ours is
Hugging Face's rotate-half, so the rows are put back, in whatever encoding they are:

    hf = gguf.reshape(heads, d/2, 2, hidden).swapaxes(1, 2)

The scaled rotary embedding of Llama 3.1 comes as the tensor `rope_freqs.weight`: what each
frequency is divided by. Gemma's norms have their 1 added already, and some of its settings are
not in the file but in llama.cpp (src/models/gemma3.cpp, llama-model.cpp): each sixth layer sees
everything, sliding layers rotate with theta 10,000, the embedding is scaled by sqrt(hidden_size),
and the 27B model (62 layers) alone scales attention by sqrt(hidden_size / num_heads).

Only what the decoder implements is accepted, the rest is refused by name.
Not here: the container (gguf.py), the tokenizer (gguf_tokenizer.py).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from msgspec import structs

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_metadata import GgufMetadata
from roost_engine.loader.stored import StoredTensor
from roost_kernels.rope_scaling import linear_divisors

_ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", "gemma3")
_ROPE_DIVISORS: Final = "rope_freqs.weight"
_GEMMA3_PATTERN: Final = 6
_GEMMA3_27B_LAYERS: Final = 62

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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_POST_NORM_NAMES: Final = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def check_architecture(file: GgufFile) -> None:
    """Raise ModelFileError, by name, for a model that the decoder does not implement."""
    metadata = GgufMetadata(file)
    name = metadata.string("general.architecture")
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelFileError(file.path, f"architecture {name!r} is not supported, only {known}")
    scaling = metadata.string(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelFileError(file.path, f"rope scaling {scaling!r} is not supported")
    if metadata.integer(f"{name}.expert_count", 0):
        raise ModelFileError(
            file.path, f"mixture of experts ({name}.expert_count) is not supported"
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if metadata.number(f"{name}.{key}", 0.0):
            raise ModelFileError(file.path, f"{name}.{key} is not supported")


def read_config(file: GgufFile, eos_token_ids: frozenset[int]) -> ModelConfig:
    """The decoder's shape. Call `check_architecture` first."""
    metadata = GgufMetadata(file)
    name = metadata.string("general.architecture")
    hidden_size = metadata.integer(f"{name}.embedding_length")
    num_heads = metadata.integer(f"{name}.attention.head_count")
    if num_heads < 1:
        raise ModelFileError(file.path, f"{name}.attention.head_count is {num_heads}")
    head_dim = metadata.integer(f"{name}.attention.key_length", hidden_size // num_heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if metadata.integer(f"{name}.{key}", head_dim) != head_dim:
            problem = f"{name}.{key} other than head_dim {head_dim} is not supported"
            raise ModelFileError(file.path, problem)
    embedding = file.tensors.get("token_embd.weight")
    config = ModelConfig(
        vocab_size=embedding.shape[0] if embedding else 0,
        hidden_size=hidden_size,
        intermediate_size=metadata.integer(f"{name}.feed_forward_length"),
        num_layers=metadata.integer(f"{name}.block_count"),
        num_heads=num_heads,
        num_kv_heads=metadata.integer(f"{name}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rope_theta=metadata.number(f"{name}.rope.freq_base", 10000.0),
        rope_divisors=_read_rope_divisors(file, name, head_dim),
        rms_norm_eps=metadata.number(f"{name}.attention.layer_norm_rms_epsilon"),
        max_position=metadata.integer(f"{name}.context_length"),
        tie_embeddings="output.weight" not in file.tensors,
        eos_token_ids=eos_token_ids,
        attention_bias=name == "qwen2",
        qk_norm=name in ("qwen3", "gemma3"),
    )
    if name == "gemma3":
        config = _with_gemma3(metadata, config)
    shapes.check_config(file.path, config)
    return config


def _with_gemma3(metadata: GgufMetadata, config: ModelConfig) -> ModelConfig:
    num_layers, hidden_size = config.num_layers, config.hidden_size
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    attention_dim = hidden_size / config.num_heads if is_27b else config.head_dim
    return structs.replace(
        config,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(hidden_size),
        attention_scale=1 / math.sqrt(max(attention_dim, 1)),
        sliding_window=metadata.integer("gemma3.attention.sliding_window"),
        sliding_layers=tuple(
            (layer_idx + 1) % _GEMMA3_PATTERN != 0
            for layer_idx in range(min(num_layers, shapes.MAX_LAYERS))
        ),
        sliding_rope_theta=metadata.number("gemma3.rope.freq_base_swa", 10000.0),
    )


def _read_rope_divisors(file: GgufFile, name: str, head_dim: int) -> tuple[float, ...]:
    metadata = GgufMetadata(file)
    info = file.tensors.get(_ROPE_DIVISORS)
    if info is None:
        if metadata.string(f"{name}.rope.scaling.type", "none") == "none":
            return ()
        factor = metadata.number(f"{name}.rope.scaling.factor")
        if not 0 < factor < math.inf:
            raise ModelFileError(file.path, f"{name}.rope.scaling.factor is {factor}")
        return linear_divisors(head_dim, factor)
    if info.shape != (head_dim // 2,):
        problem = f"tensor {_ROPE_DIVISORS!r} has shape {info.shape}, not {(head_dim // 2,)}"
        raise ModelFileError(file.path, problem)
    divisors = file.read(_ROPE_DIVISORS).to_numpy()
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        problem = f"tensor {_ROPE_DIVISORS!r} holds numbers that are not positive"
        raise ModelFileError(file.path, problem)
    return tuple(divisors.tolist())


def read_weights(file: GgufFile, config: ModelConfig) -> dict[str, StoredTensor]:
    """All tensors, checked to be complete before the first is read."""
    names = _POST_NORM_NAMES if config.post_norms else _LAYER_NAMES
    hf_names = {
        name: _hf_name(file, name, names) for name in file.tensors if name != _ROPE_DIVISORS
    }
    stored = {hf_name: file.tensors[name].shape for name, hf_name in hf_names.items()}
    shapes.check_shapes(file.path, config, stored)
    weights = {hf_name: file.read(name) for name, hf_name in hf_names.items()}
    if GgufMetadata(file).string("general.architecture") == "llama":
        return {name: _restore_rows(tensor, name, config) for name, tensor in weights.items()}
    return weights


def _hf_name(file: GgufFile, name: str, layer_names: dict[str, str]) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match name.split("."):
        case ["blk", layer_idx, kind, ("weight" | "bias") as role] if (
            layer_idx.isdecimal() and kind in layer_names
        ):
            return f"{shapes.layer_prefix(int(layer_idx))}{layer_names[kind]}.{role}"
    raise ModelFileError(file.path, f"tensor {name!r} is not part of this model")


def _restore_rows(tensor: StoredTensor, hf_name: str, config: ModelConfig) -> StoredTensor:
    """Undo llama.cpp's row order of Q and K; other tensors pass through."""
    if hf_name.endswith("q_proj.weight"):
        num_heads = config.num_heads
    elif hf_name.endswith("k_proj.weight"):
        num_heads = config.num_kv_heads
    else:
        return tensor
    order = np.arange(tensor.shape[0]).reshape(num_heads, config.head_dim // 2, 2)
    return structs.replace(tensor, rows=tensor.rows[order.swapaxes(1, 2).ravel()])
