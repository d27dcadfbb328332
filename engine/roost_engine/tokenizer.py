"""Text to token ids and back, including text that appears while tokens are generated.

A thin shell around the `tokenizers` library. Every token stands for a fixed string of bytes and a
text is the UTF-8 reading of their concatenation (token_bytes.py). This is what makes streaming
simple: `Detokenizer` looks bytes up in a table and feeds an incremental UTF-8 decoder, O(1) a
token, where re-decoding a window (as the general case needs) costs two library calls a token.
Tokenizers for which no such table exists are refused.

Encoding goes through `encode_batch_fast`, although it is one text: unlike `encode` it leaves the
interpreter to other threads (longest stall of the event loop over a text of 940 KB: 0.85 s
against 0.01 s), and it skips offsets, which nobody asks for.

Invariants: the pushes and the flush of a Detokenizer, joined, equal `Tokenizer.decode` of the
same ids, for any ids. Special tokens are shown only where that is asked for. Encoding and
decoding do not change the object, so threads may share it; a Detokenizer belongs to one request.

Not here: reading files (loader/), chat templates (chat.py).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models

from roost_engine.token_bytes import build_token_bytes, byte_of_character

# Pre-tokenizers that cut text and drop none of it; of Split that depends on its behaviour.
_LOSSLESS: Final = frozenset({"ByteLevel", "Digits", "Punctuation"})


class Tokenizer:
    """Encodes and decodes for one model.

    `special_tokens` maps the roles a chat template may name (bos_token, eos_token, ...) to
    their text. Raises UnsupportedTokenizerError for a decoder without a table of bytes.

    `backend` is taken over: truncation and padding, which a tokenizer.json may ask for, are
    turned off. They belong to training; here they would change a prompt without a word.
    """

    def __init__(
        self,
        backend: HfTokenizer,
        *,
        eos_token_ids: frozenset[int],
        chat_template: str | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._token_bytes = build_token_bytes(backend)
        self._dropped_bytes = _dropped_bytes(backend)
        self._longest_token_bytes = _longest_token_bytes(backend, self._token_bytes)
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens))

    @property
    def vocab_size(self) -> int:
        """Number of token ids the tokenizer knows; a model's logits may have more columns."""
        return len(self._token_bytes)

    def fewest_tokens(self, text: str) -> int:
        """Number of tokens that `text` has at least: its bytes over those of the longest token.

        0 where the tokenizer may shrink text before it cuts it (a normaliser, for example).
        O(text), but a hundred times faster than encoding.
        """
        if self._longest_token_bytes is None:
            return 0
        kept = text.encode().translate(None, delete=self._dropped_bytes)
        return -(-len(kept) // self._longest_token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. Other threads run meanwhile.

        Special tokens written out in the text ("<|im_end|>") become their id, as in vLLM and
        transformers: a rendered chat template relies on it, and clients of the completions
        endpoint write prompts with it.

        `add_special_tokens`: put in front what the model's tokenizer asks for (BOS). Off by
        default, because a chat template writes it itself; completion prompts turn it on.
        """
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; unknown ids and broken UTF-8 do not raise."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: none for special tokens and unknown ids."""
        if 0 <= token_id < len(self._token_bytes):
            return self._token_bytes[token_id]
        return b""

    def spelled_bytes(self, token_id: int) -> bytes:
        """Like `token_bytes`, but a special token has the bytes it is written as in a prompt."""
        return self.token_bytes(token_id) or self.vocabulary_entry(token_id).encode()

    def vocabulary_entry(self, token_id: int) -> str:
        """A token as the vocabulary lists it ("Ġthe"), "" for an unknown id."""
        return (self._backend.id_to_token(token_id) or "") if token_id >= 0 else ""


class Detokenizer:
    """Text of a growing sequence of tokens, each character as soon as its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._bytes_of = tokenizer.token_bytes if skip_special_tokens else tokenizer.spelled_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is final now, "" while a character is incomplete."""
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """End of the sequence: the replacement character if one was left incomplete, else ""."""
        return self._utf8.decode(b"", final=True)


def _longest_token_bytes(backend: HfTokenizer, token_bytes: list[bytes]) -> int | None:
    """The most bytes of text that one token can stand for; None where there is no such bound.

    There is one if every byte of a text ends up in some token, `_dropped_bytes` aside: nothing
    normalises, cuts away or strips around added tokens.
    """
    added = list(backend.get_added_tokens_decoder().values())
    model = backend.model
    is_lossless = (
        backend.normalizer is None
        and _is_lossless(backend.pre_tokenizer)
        and isinstance(model, models.BPE)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        and not any(token.lstrip or token.rstrip for token in added)
    )
    if not is_lossless:
        return None
    in_text = (len(token.content.encode()) for token in added)
    return max(*map(len, token_bytes), *in_text)


def _dropped_bytes(backend: HfTokenizer) -> bytes:
    """Bytes without a token of their own, which BPE passes over: SmolLM2 lacks some controls."""
    vocab = backend.get_vocab(with_added_tokens=False)
    return bytes(byte for character, byte in byte_of_character().items() if character not in vocab)


def _is_lossless(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return False  # no ByteLevel: characters, not bytes, are looked up
    settings = json.loads(pre_tokenizer.__getstate__())
    steps = settings.get("pretokenizers", [settings])
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    return is_byte_level and all(
        step["type"] in _LOSSLESS or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
