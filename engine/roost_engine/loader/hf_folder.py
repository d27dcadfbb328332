"""A Hugging Face folder as ModelConfig, weights and tokenizer.

    config.json               shape of the decoder
    generation_config.json    eos ids (optional; else config.json has them)
    model.safetensors         weights, or shards named by model.safetensors.index.json
    tokenizer.json            tokenizer
    tokenizer_config.json     special tokens (optional)
    chat_template.jinja       chat template, or `chat_template` in tokenizer_config.json

Gemma's norms are stored as their distance from 1; it is added here, so that a norm is the same
thing in every model (GGUF files have it added already).

Not here: what the settings of config.json mean (hf_config.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer as HfTokenizer

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.hf_config import GEMMA3, read_config
from roost_engine.loader.json_object import JsonObject
from roost_engine.loader.safetensors import read_safetensors
from roost_engine.loader.stored import StoredTensor, stored_floats
from roost_engine.token_bytes import UnsupportedTokenizerError
from roost_engine.tokenizer import Tokenizer

_SPECIAL_ROLES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")

# Old checkpoints store the rotary frequencies, which follow from the config.
_DERIVED_SUFFIX: Final = ".rotary_emb.inv_freq"


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, StoredTensor], Tokenizer]:
    """Read all parts; ModelFileError names the file that is missing, damaged or unsupported."""
    config, weights = read_checkpoint(folder)
    tokenizer = _read_tokenizer(folder, config.eos_token_ids)
    if tokenizer.vocab_size > config.vocab_size:
        problem = f"{tokenizer.vocab_size} tokens for {config.vocab_size} embeddings"
        raise ModelFileError(folder, problem)
    return config, weights, tokenizer


def read_checkpoint(folder: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Config and weights alone."""
    config_json = JsonObject.read(folder / "config.json")
    generation_json = JsonObject.read(folder / "generation_config.json", required=False)
    eos_token_ids = _read_eos_ids(generation_json) or _read_eos_ids(config_json)
    config = read_config(config_json, eos_token_ids)
    weights = _read_weights(folder, config)
    if config_json.get("model_type", str, "") == GEMMA3:
        weights = {name: _add_one(name, weight) for name, weight in weights.items()}
    return config, weights


def _read_eos_ids(source: JsonObject) -> frozenset[int]:
    """`eos_token_id`: an integer, a list of integers, or nothing."""
    value = source.get("eos_token_id", int | list, [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) for token_id in ids):
        source.fail(f"eos_token_id is {value!r}")
    return frozenset(ids)


def _read_weights(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    weights: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        weights |= read_safetensors(path, ignored_suffix=_DERIVED_SUFFIX)
    if config.tie_embeddings:
        weights.pop(shapes.HEAD, None)  # some checkpoints store the copy
    shapes.check_shapes(folder, config, {name: weight.shape for name, weight in weights.items()})
    return weights


def _add_one(name: str, weight: StoredTensor) -> StoredTensor:
    """A norm of Gemma as other models have it; other tensors pass through."""
    return stored_floats(1.0 + weight.to_numpy()) if name.endswith("norm.weight") else weight


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
