"""Hugging Face folders: what transformers saves is read, what we do not implement is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from roost_engine.config import ModelConfig
from roost_engine.loader import LoadedModel, ModelFileError, load_model
from roost_engine.loader.hf_config import read_config
from roost_engine.loader.json_object import JsonObject

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 12345.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 12345.0, "rope_type": "default"},
        eos_token_id=257,
        bos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = HfTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    ).save_pretrained(path)
    return path


def _load(folder: Path) -> LoadedModel:
    return load_model(folder)


def _torch(model: LoadedModel, name: str) -> torch.Tensor:
    return model.weights[name].to_torch(torch.float32)


def _edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_folder_saved_by_transformers_is_read(folder: Path) -> None:
    model = _load(folder)

    assert model.name == "tiny-llama"
    assert model.config.rope_theta == 12345.0
    assert (
        model.config.num_kv_heads,
        model.config.head_dim,
        model.config.max_position,
    ) == (2, 8, 64)
    assert not model.config.tie_embeddings
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.weights.keys()
    assert all(torch.equal(stored[name], _torch(model, name)) for name in stored)
    assert dict(model.tokenizer.special_tokens) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert model.tokenizer.chat_template == "{{ bos_token }}{{ messages[0].content }}"
    assert model.tokenizer.decode(model.tokenizer.encode("<s>hé")) == "hé"


def test_a_path_with_a_trailing_dot_still_has_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    assert load_model(".").name == "tiny-llama"


def test_the_old_spelling_of_rope_theta_is_read(folder: Path) -> None:
    _edit(folder / "config.json", rope_parameters=None, rope_theta=777, rope_scaling=None)

    assert _load(folder).config.rope_theta == 777.0


def test_both_spellings_of_llama3_scaling_are_read(folder: Path) -> None:
    _edit(folder / "config.json", rope_parameters=LLAMA3)
    new = _load(folder).config
    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    _edit(folder / "config.json", rope_parameters=None, rope_theta=12345.0, rope_scaling=old)

    assert len(new.rope_divisors) == 4
    assert max(new.rope_divisors) == 8.0
    assert _load(folder).config == new


def test_position_interpolation_divides_every_frequency(folder: Path) -> None:
    _edit(folder / "config.json", rope_scaling={"type": "linear", "factor": 2})

    assert _load(folder).config.rope_divisors == (2.0,) * 4


def _config(folder: Path, **settings: Any) -> ModelConfig:
    """What the folder's config.json comes to as another family, without looking at weights."""
    path = folder / "config.json"
    _edit(path, architectures=None, rope_parameters=None, **settings)
    return read_config(JsonObject.read(path), frozenset())


def test_gemma3_is_read_as_transformers_4_wrote_it(folder: Path) -> None:
    """Without layer_types, with one theta beside the other."""
    config = _config(
        folder,
        model_type="gemma3_text",
        num_hidden_layers=7,
        head_dim=16,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=512,
        sliding_window_pattern=3,
        query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh",
    )

    assert (config.rope_theta, config.sliding_rope_theta) == (1e6, 1e4)
    assert config.rope_divisors == (8.0,) * 8
    assert config.sliding_layers == (True, True, False, True, True, False, True)
    assert (config.sliding_window, config.attention_scale) == (512, 1 / 16)
    assert (config.activation, config.post_norms, config.qk_norm) == ("gelu_tanh", True, True)
    assert config.embedding_scale == 32**0.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "llama", "sliding_window": 8}, (0, ())),
        ({"model_type": "mistral", "sliding_window": 8}, (8, (True, True))),
        ({"model_type": "mistral", "sliding_window": None}, (0, ())),
        ({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}, (0, ())),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "max_window_layers": 1,
                "use_sliding_window": True,
            },
            (8, (False, True)),
        ),
        (
            {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True},
            (0, ()),  # max_window_layers is 28: none of two layers
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, (True, False)),
        ),
    ],
)
def test_which_layers_slide_is_what_transformers_makes_of_it(
    folder: Path, settings: dict[str, Any], expected: tuple[int, tuple[bool, ...]]
) -> None:
    config = _config(folder, **settings)

    assert (config.sliding_window, config.sliding_layers) == expected


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types: .* does not fit 2 layers"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "does not fit"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"hidden_activation": "silu"}, "only 'gelu_pytorch_tanh'"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"rope_local_base_freq": -1.0}, "rope_theta and rms_norm_eps must be positive"),
        ({"attention_bias": True}, "attention_bias is not supported"),
    ],
)
def test_gemma3_settings_that_are_not_implemented_are_refused_by_name(
    folder: Path, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ModelFileError, match=problem):
        _config(folder, model_type="gemma3_text", hidden_act=None, **settings)


def test_truncation_and_padding_saved_by_training_are_not_obeyed(folder: Path) -> None:
    expected = _load(folder).tokenizer.encode("a rather long text")
    backend = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))

    assert _load(folder).tokenizer.encode("a rather long text") == expected


def test_generation_config_names_the_eos_ids(folder: Path) -> None:
    _edit(folder / "generation_config.json", eos_token_id=[257, 5])

    model = _load(folder)

    assert frozenset({257, 5}) == model.config.eos_token_ids == model.tokenizer.eos_token_ids


def test_without_a_generation_config_the_config_names_them(folder: Path) -> None:
    (folder / "generation_config.json").unlink()

    assert frozenset({257}) == _load(folder).config.eos_token_ids


def test_shards_are_read(folder: Path) -> None:
    expected = _load(folder)
    _shard(folder)

    actual = _load(folder)

    assert expected.weights.keys() == actual.weights.keys()
    assert all(torch.equal(_torch(expected, name), _torch(actual, name)) for name in actual.weights)


def _shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:])):
        file_name = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    _edit(folder / "model.safetensors.index.json", weight_map=weight_map)


def test_a_tied_head_and_stored_rotary_frequencies_are_passed_over(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    _edit(folder / "config.json", tie_word_embeddings=True)

    model = _load(folder)

    assert model.config.tie_embeddings
    assert "lm_head.weight" not in model.weights


def test_the_template_file_wins_over_the_setting(folder: Path) -> None:
    _edit(folder / "tokenizer_config.json", chat_template="setting")
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")

    assert _load(folder).tokenizer.chat_template == "file"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("text", "text"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tools", "template": "t"}], None),
        (None, None),
    ],
)
def test_the_template_setting_is_one_text_or_several(
    folder: Path, setting: Any, expected: str | None
) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _edit(folder / "tokenizer_config.json", chat_template=setting)

    assert expected == _load(folder).tokenizer.chat_template


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": "qwen2"}, "model_type 'qwen2', architectures .'LlamaForCausalLM'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'factor' is missing"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "makes no sense"),
        ({"rope_parameters": LLAMA3 | {"factor": 0.0}}, "makes no sense"),
        ({"rope_parameters": {"full_attention": [1]}}, "is not an object"),
        ({"rope_parameters": LLAMA3 | {"factor": "8"}}, "'factor' is '8'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_theta": 0.0, "rope_parameters": None}, "rope_theta and rms_norm_eps must be"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "32"}, "'hidden_size' is '32', expected int"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "do not divide evenly"),
        ({"num_hidden_layers": 10**12}, "layers announced"),
        ({"intermediate_size": 64}, "has shape"),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(
    folder: Path, changes: dict[str, Any], problem: str
) -> None:
    _edit(folder / "config.json", **changes)

    with pytest.raises(ModelFileError, match=problem):
        _load(folder)


def _break_eos(folder: Path) -> None:
    _edit(folder / "generation_config.json", eos_token_id=["x"])


def _escape_folder(folder: Path) -> None:
    _edit(folder / "model.safetensors.index.json", weight_map={"a": "../secret.safetensors"})


def _add_bias(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, folder / "model.safetensors")


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")


def _use_word_piece(folder: Path) -> None:
    backend = HfTokenizer(models.BPE())
    backend.decoder = decoders.WordPiece()
    backend.save(str(folder / "tokenizer.json"))


def _add_tokens(folder: Path) -> None:
    backend = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"<{idx}>" for idx in range(43)])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a readable tokenizer"),
        (
            lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"),
            "chat_template.jinja: not UTF-8",
        ),
        (_cut_weights, "model.safetensors: not a readable safetensors file"),
        (_break_eos, "eos_token_id is"),
        (_escape_folder, "not a file of this folder"),
        (_add_bias, "q_proj.bias' is not part of this model"),
        (_break_template, "the model's chat template is broken"),
        (_use_word_piece, "decoder WordPiece is not supported"),
        (_add_tokens, "301 tokens for 300 embeddings"),
    ],
)
def test_damaged_folders_are_refused_with_the_file_named(
    folder: Path, damage: Callable[[Path], object], problem: str
) -> None:
    damage(folder)

    with pytest.raises(ModelFileError, match=problem):
        _load(folder)
