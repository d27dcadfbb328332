"""Tiny random models of each family, made by transformers and saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from roost_engine.chat import ChatTemplate
from roost_engine.loader import LoadedModel
from roost_engine.loader.hf_folder import read_checkpoint
from roost_engine.tokenizer import Tokenizer

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

#: Name of a tiny model -> its class, its configuration's class and what makes it different.
TINY_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _ROPE | {"tie_word_embeddings": True}),
    "llama, one to one, untied": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "llama, one kv head, wide": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 1, "head_dim": 24},
    ),
    "llama3 rotary": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA3}),
    "linear rotary": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LINEAR}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 9}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _ROPE),
    "qwen2, sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
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
    torch.manual_seed(0)
    model_class, config_class, settings = TINY_MODELS[name]
    model: PreTrainedModel = model_class(config_class(**(_COMMON | settings | changes))).eval()
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


def save_servable(model: PreTrainedModel, folder: Path) -> Path:
    """A folder that `load_model` takes, with a tokenizer of two letters."""
    model.save_pretrained(folder)
    backend = HfTokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder
