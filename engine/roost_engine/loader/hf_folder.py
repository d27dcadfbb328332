"""A Hugging Face folder as ModelConfig, weights and tokenizer.

    config.json               shape of the decoder
    generation_config.json    eos ids (optional; else config.json has them)
    model.safetensors         weights, or shards named by model.safetensors.index.json
    tokenizer.json            tokenizer
    tokenizer_config.json     special tokens (optional)
    chat_template.jinja       chat template, or `chat_template` in tokenizer_config.json

transformers 4 writes `rope_theta` beside `rope_scaling`, transformers 5 inside
`rope_parameters`; both are read. Of the scalings Llama 3.1's is implemented (`llama3`). A setting
that changes the computation and that the decoder does not implement is refused by name, never
ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as HfTokenizer

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.json_object import JsonObject
from roost_engine.tokenizer import Tokenizer, UnsupportedTokenizerError
from roost_kernels.rope import llama3_divisors

_ARCHITECTURE: Final = "LlamaForCausalLM"
_SPECIAL_ROLES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
_DEFAULT_THETA: Final = 10000.0
_ROPE_KEYS: Final = ("rope_parameters", "rope_scaling")  # transformers 5 and 4

# Old checkpoints store the rotary frequencies, which follow from the config.
_DERIVED_SUFFIX: Final = ".rotary_emb.inv_freq"


def read_folder(
    folder: Path, dtype: torch.dtype
) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Read all parts; ModelFileError names the file that is missing, damaged or unsupported."""
    config_json = JsonObject.read(folder / "config.json")
    _check_supported(config_json)
    generation_json = JsonObject.read(folder / "generation_config.json", required=False)
    eos_token_ids = _read_eos_ids(generation_json) or _read_eos_ids(config_json)
    config = _read_config(config_json, eos_token_ids)
    tokenizer = _read_tokenizer(folder, eos_token_ids)
    if tokenizer.vocab_size > config.vocab_size:
        problem = f"{tokenizer.vocab_size} tokens for {config.vocab_size} embeddings"
        raise ModelFileError(folder, problem)
    return config, _read_weights(folder, config, dtype), tokenizer


def _check_supported(config: JsonObject) -> None:
    architectures = config.get("architectures", list, [])
    model_type = config.get("model_type", str, "")
    if model_type != "llama" or (architectures and _ARCHITECTURE not in architectures):
        found = f"model_type {model_type!r}, architectures {architectures}"
        config.fail(f"{found}: not supported, only 'llama' / {_ARCHITECTURE}")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key, bool, False):
            config.fail(f"{key} is not supported")
    activation = config.get("hidden_act", str, "silu")
    if activation != "silu":
        config.fail(f"hidden_act {activation!r} is not supported, only 'silu'")
    if config.get("quantization_config", dict, {}):
        config.fail("quantization_config: quantised safetensors are not supported, GGUF is")
    for key in _ROPE_KEYS:
        rope = config.get(key, dict, {})
        kind = _rope_type(rope)
        if kind not in ("default", "llama3"):
            problem = f"{key}: rope type {kind!r} is not supported, only 'default' and 'llama3'"
            config.fail(problem)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            config.fail(f"{key}: partial_rotary_factor is not supported")


def _read_config(config: JsonObject, eos_token_ids: frozenset[int]) -> ModelConfig:
    hidden_size = config.get("hidden_size", int)
    num_heads = config.get("num_attention_heads", int)
    if num_heads < 1:
        config.fail(f"num_attention_heads is {num_heads}")
    head_dim = config.get("head_dim", int, hidden_size // num_heads)
    rope = JsonObject(config.path, config.get("rope_parameters", dict, {}))
    theta = rope.get("rope_theta", float, config.get("rope_theta", float, _DEFAULT_THETA))
    model_config = ModelConfig(
        vocab_size=config.get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=config.get("intermediate_size", int),
        num_layers=config.get("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=config.get("rms_norm_eps", float, 1e-6),
        max_position=config.get("max_position_embeddings", int, 2048),
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        eos_token_ids=eos_token_ids,
    )
    shapes.check_config(config.path, model_config)
    divisors = _read_rope_divisors(config, model_config)
    return msgspec.structs.replace(model_config, rope_divisors=divisors)


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _read_rope_divisors(config: JsonObject, model: ModelConfig) -> tuple[float, ...]:
    """What `rope_type: llama3` comes to; nothing for other models."""
    for key in _ROPE_KEYS:
        values = config.get(key, dict, {})
        if _rope_type(values) != "llama3":
            continue
        rope = JsonObject(config.path, values)
        factor = rope.get("factor", float)
        low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
        original = rope.get("original_max_position_embeddings", int)
        if not (factor > 0 and 0 < low < high < math.inf and original > 0):
            config.fail(f"{key}: {values!r:.200} makes no sense")
        return llama3_divisors(
            model.head_dim,
            model.rope_theta,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
    return ()


def _read_eos_ids(source: JsonObject) -> frozenset[int]:
    """`eos_token_id`: an integer, a list of integers, or nothing."""
    value = source.get("eos_token_id", int | list, [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) for token_id in ids):
        source.fail(f"eos_token_id is {value!r}")
    return frozenset(ids)


def _read_weights(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        weights |= _read_safetensors(path, dtype)
    if config.tie_embeddings:
        weights.pop(shapes.HEAD, None)  # some checkpoints store the copy
    shapes.check_shapes(folder, config, {name: tuple(w.shape) for name, w in weights.items()})
    return weights


def _weight_files(folder: Path) -> list[Path]:
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        return [folder / "model.safetensors"]
    index = JsonObject.read(index_path)
    names = set(index.get("weight_map", dict).values())
    for name in names:
        # A shard lies in the folder: the index must not point the engine at other files.
        if not isinstance(name, str) or Path(name).name != name:
            index.fail(f"weight_map names {name!r}, which is not a file of this folder")
    return [folder / name for name in sorted(names)]


def _read_safetensors(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelFileError(path, "missing (the weights of the model)")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(_DERIVED_SUFFIX)]  # noqa: SIM118
            return {name: file.get_tensor(name).to(dtype) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelFileError(path, f"not a readable safetensors file: {error}") from error


def _read_tokenizer(folder: Path, eos_token_ids: frozenset[int]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFileError(path, "missing (only tokenizer.json is read, no other format)")
    try:
        backend = HfTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ModelFileError(path, f"not a readable tokenizer: {error}") from error
    settings = JsonObject.read(folder / "tokenizer_config.json", required=False)
    try:
        return Tokenizer(
            backend,
            eos_token_ids=eos_token_ids,
            chat_template=_read_chat_template(folder, settings),
            special_tokens=_read_special_tokens(settings),
        )
    except UnsupportedTokenizerError as error:
        raise ModelFileError(path, str(error)) from error


def _read_special_tokens(settings: JsonObject) -> dict[str, str]:
    """Roles to text; a token is written as a string or as an AddedToken object."""
    tokens: dict[str, str] = {}
    for role in _SPECIAL_ROLES:
        value = settings.get(role, str | dict, "")
        text = value.get("content") if isinstance(value, dict) else value
        if text and isinstance(text, str):
            tokens[role] = text
    return tokens


def _read_chat_template(folder: Path, settings: JsonObject) -> str | None:
    """The file wins over the setting, as in transformers; of several templates, "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelFileError(path, "not UTF-8") from None
    value = settings.get("chat_template", str | list, "")
    if isinstance(value, str):
        return value or None
    named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    default = named.get("default")
    return default if isinstance(default, str) else None
