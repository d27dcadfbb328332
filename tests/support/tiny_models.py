"""Tiny random models of each family, made by transformers and saved as folders.

Its classes take seconds to import, so they are when the first model is made.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from gguf.quants import quantize
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from roost_engine.chat import ChatTemplate
from roost_engine.loader import LoadedModel
from roost_engine.loader.hf_folder import read_checkpoint
from roost_engine.loader.stored import QUANT_TYPES, Encoding, StoredTensor
from roost_engine.token_bytes import byte_of_character
from roost_engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    # Large enough that logits differ clearly, as in a trained model.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_ROPE = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
# Of 8 frequencies 2 stay, 2 are in the passage and 4 are divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
_GEMMA_ROPE = {
    "full_attention": _LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

#: Name of a tiny model -> names of its class and its configuration's, and what makes it different.
TINY_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _ROPE | {"tie_word_embeddings": True}),
    "llama, one to one, untied": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 4}),
    "llama, one kv head, wide": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"num_key_value_heads": 1, "head_dim": 24},
    ),
    "llama3 rotary": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": _LLAMA3}),
    "linear rotary": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": _LINEAR}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 9}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _ROPE),
    "qwen2, sliding": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 24,
            "num_hidden_layers": 7,
            "sliding_window": 6,
            "query_pre_attn_scalar": 40,
            "rope_parameters": _GEMMA_ROPE,
        },
    ),
}


def hf_model(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model in float32 with weights that are the same each time."""
    import transformers

    torch.manual_seed(0)
    model_class, config_class, settings = TINY_MODELS[name]
    config = getattr(transformers, config_class)(**(_COMMON | settings | changes))
    model: PreTrainedModel = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        # transformers starts biases at 0 and norms at 1 (Gemma's at 0): then they would not show.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif parameter_name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def load_saved(model: PreTrainedModel, folder: Path) -> LoadedModel:
    """Through files, as a replica would; without a tokenizer."""
    model.save_pretrained(folder)
    config, weights = read_checkpoint(folder)
    return LoadedModel("tiny", config, weights, Tokenizer.__new__(Tokenizer), ChatTemplate(None))


def stored_as(model: LoadedModel, *encodings: Encoding) -> LoadedModel:
    """The model with its matrices in these encodings, in turn, as a GGUF file may hold them."""
    weights, next_encoding = dict(model.weights), itertools.cycle(encodings)
    for name, tensor in model.weights.items():
        if len(tensor.shape) == 2:
            encoding = next(next_encoding)
            rows = quantize(tensor.to_numpy(), QUANT_TYPES[encoding]).view(np.uint8)
            weights[name] = StoredTensor(encoding, tensor.shape, rows)
    return msgspec.structs.replace(model, weights=weights)


def save_servable(model: PreTrainedModel, folder: Path) -> Path:
    """A folder that `load_model` takes, with a tokenizer of two letters."""
    model.save_pretrained(folder)
    backend = HfTokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


#: Bytes of these characters are tokens of their own, so that characters span tokens.
_WIDE = "é€😀"


def save_talking(folder: Path) -> Path:
    """A llama with a tokenizer of 160 tokens that can write JSON, and characters in pieces."""
    hf_model("llama", vocab_size=160, max_position_embeddings=2048).save_pretrained(folder)
    ascii_bytes = [ord("\n"), *range(32, 127)]
    wide_bytes = sorted(set(_WIDE.encode()))
    spelling = {byte: character for character, byte in byte_of_character().items()}
    words = ["<end>", "<special>"]
    words += [spelling[byte] for byte in [*ascii_bytes, *wide_bytes]]
    merges: list[tuple[str, str]] = []
    for left, right in itertools.product("aeob{x", "aob"):
        if len(words) < 160:
            merges.append((left, right))
            words.append(left + right)
    backend = HfTokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    )
    backend.add_special_tokens(words[:2])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
