"""GGUF files of every architecture: config and weights equal those of the Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from msgspec import structs
from tiny_models import hf_model, load_saved

from roost_engine.loader import ModelFileError
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_model import check_architecture, read_config, read_weights

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
#: Tiny model, what llama.cpp calls it, and the keys it writes beyond the common ones.
FAMILIES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("llama", "llama", {}, {"rope.freq_base": 5000.0}),
    ("linear rotary", "llama", {}, {"rope.freq_base": 5000.0, "rope.scaling.factor": 4.0}),
    ("qwen2", "qwen2", {}, {"rope.freq_base": 5000.0}),
    ("qwen3", "qwen3", {}, {}),
    (
        "gemma3",
        "gemma3",
        {"query_pre_attn_scalar": 24},
        {
            "rope.freq_base": 5000.0,
            "rope.scaling.factor": 4.0,
            "rope.freq_base_swa": 100.0,
            "attention.sliding_window": 6,
        },
    ),
]


def _gguf_name(name: str, names: dict[str, str]) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    _, _, layer_idx, kind = name.split(".", maxsplit=3)
    stem, role = kind.rsplit(".", 1)
    return f"blk.{layer_idx}.{names[stem]}.{role}"


def _write(path: Path, architecture: str, hf: Any, extra: dict[str, Any]) -> GgufFile:
    config, writer = hf.config, GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    for key, value in (keys | extra).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    if "rope.scaling.factor" in extra:
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
    names = _GEMMA_NAMES if architecture == "gemma3" else _NAMES
    for name, weight in hf.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = array.reshape(-1, 2, head_dim // 2, array.shape[1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)  # as convert_hf_to_gguf permutes
        writer.add_tensor(_gguf_name(name, names), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize(("name", "architecture", "changes", "extra"), FAMILIES)
def test_a_gguf_file_is_the_same_model_as_the_folder(
    name: str, architecture: str, changes: dict[str, Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    hf = hf_model(name, **changes)
    expected = load_saved(hf, tmp_path / "folder")
    file = _write(tmp_path / "model.gguf", architecture, hf, extra)

    check_architecture(file)
    config = read_config(file, frozenset({0}))
    weights = read_weights(file, config)

    eps = structs.replace(config, rms_norm_eps=expected.config.rms_norm_eps)  # stored as float32
    assert expected.config == eps
    assert config.rms_norm_eps == pytest.approx(expected.config.rms_norm_eps)
    assert expected.weights.keys() == weights.keys()
    for tensor_name, weight in weights.items():
        assert torch.equal(
            expected.weights[tensor_name].to_torch(torch.float32), weight.to_torch(torch.float32)
        )


def test_gemma3_of_62_layers_scales_attention_by_its_hidden_size(tmp_path: Path) -> None:
    """The 27B model; hidden_size / num_heads is 16 here, head_dim 24."""
    extra = {"attention.sliding_window": 6, "block_count": 62}
    file = _write(tmp_path / "model.gguf", "gemma3", hf_model("gemma3"), extra)

    assert read_config(file, frozenset()).attention_scale == 1 / 4


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({}, "'gemma3.attention.sliding_window' is missing"),
        ({"attention.value_length": 16}, "value_length other than head_dim 24 is not supported"),
        ({"attention.sliding_window": 6, "rope.freq_base_swa": 0.0}, "rope_theta and"),
        ({"attention.sliding_window": 6, "rope.scaling.factor": 0.0}, "scaling.factor is 0.0"),
        ({"attention.sliding_window": 6, "final_logit_softcapping": 30.0}, "softcapping is not"),
    ],
)
def test_gemma3_files_that_make_no_sense_are_refused(
    extra: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    file = _write(tmp_path / "model.gguf", "gemma3", hf_model("gemma3"), extra)

    with pytest.raises(ModelFileError, match=problem):
        check_architecture(file)
        read_config(file, frozenset())
