"""A model's tokenizer out of a local Hugging Face folder. Needs tokenizers (extra `tokens`).

    tokenizer.json          the tokenizer
    tokenizer_config.json   special tokens, maybe the chat template (optional)
    chat_template.jinja     the chat template (optional)

The engine's loader reads the same files, and much more (roost_engine/loader/hf_folder.py). A GGUF
file becomes such a folder once: `roost` composes router and engine and may write it.

Nothing is downloaded, and nothing outside the folder is read.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any, Final

import jinja2
from tokenizers import Tokenizer as HfTokenizer

from roost_router.tokens.prompt_text import NotTokenisedError, Prompt
from roost_router.tokens.segments import Encoded, Encoder
from roost_router.tokens.template import Template

_SPECIAL_ROLES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
# Pre-tokenizers that cut text into words without looking further than a word's neighbours.
_WORD_STEPS: Final = frozenset({"ByteLevel", "Digits", "Punctuation", "Split"})


class TokenizerError(ValueError):
    """A folder that holds no usable tokenizer; the message names the file and the problem."""


class FolderTokenizer:
    """Renders and encodes for one model."""

    def __init__(self, folder: Path) -> None:
        """Reads the folder; TokenizerError."""
        self._backend = backend = _read_backend(folder / "tokenizer.json")
        settings = _read_json(folder / "tokenizer_config.json")
        source = _read_template(folder, settings)
        try:
            self._template = Template(source, _special_texts(settings)) if source else None
        # Mostly TemplateError; Jinja compiles to Python, which has limits of its own.
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise TokenizerError(f"{folder}: the chat template is broken: {error}") from error
        added = [t for t in backend.get_added_tokens_decoder().values() if t.content]
        self._encoder = Encoder(
            self._encode_alone,
            [token.content for token in added if _splits_text(token)],
            [token.content for token in added],
            cuts_words=_cuts_words(backend),
        )
        self._before, self._behind = self._added_tokens()

    def render(self, prompt: Prompt) -> str:
        """The text of a prompt that is not token ids. NotTokenisedError."""
        if prompt.text is not None:
            return prompt.text
        if self._template is None:
            raise NotTokenisedError("the model has no chat template")
        return self._template.render(prompt)

    def encode(self, text: str, *, adds_special_tokens: bool) -> Encoded:
        """Token ids of `text`, as the whole text encoded at once has them."""
        encoded = self._encoder.encode(text)
        if not adds_special_tokens or not (self._before or self._behind):
            return encoded
        tokens = array("I", self._before) + encoded.token_ids + array("I", self._behind)
        shift = len(self._before)
        moved = [b._replace(num_tokens=b.num_tokens + shift) for b in encoded.boundaries]
        return Encoded(tokens, moved)

    def _encode_alone(self, texts: list[str]) -> list[list[int]]:
        """Without offsets, which nobody needs and which cost a third of the time."""
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text, and behind it."""
        [alone] = self._encode_alone(["a"])
        whole: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[:start], whole[start + len(alone) :]
        raise TokenizerError("the tokenizer changes a text when it adds special tokens")


def _read_backend(path: Path) -> Any:
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: --tokenizer takes a folder that holds it")
    try:
        backend = HfTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(f"{path} is not a readable tokenizer: {error}") from error
    backend.no_truncation()  # these belong to training
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return found


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The file wins over the setting, as in transformers; of several templates, "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise TokenizerError(f"{path} is not UTF-8") from None
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


def _special_texts(settings: dict[str, Any]) -> dict[str, str]:
    """Roles to text; a token is written as a string or as an object."""
    texts: dict[str, str] = {}
    for role in _SPECIAL_ROLES:
        value = settings.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if text and isinstance(text, str):
            texts[role] = text
    return texts


def _splits_text(token: Any) -> bool:
    """Whether what is before and behind the token is encoded as if alone."""
    return not (token.normalized or token.lstrip or token.rstrip or token.single_word)


def _cuts_words(backend: Any) -> bool:
    """Whether words are encoded by themselves: worth a trial (segments.py)."""
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {}
    if backend.pre_tokenizer is None or normalizer.get("type", "NFC") != "NFC":
        return False
    settings = json.loads(backend.pre_tokenizer.__getstate__())
    steps = settings.get("pretokenizers", [settings])
    return any(step["type"] == "ByteLevel" for step in steps) and all(
        step["type"] in _WORD_STEPS and not step.get("add_prefix_space") for step in steps
    )
