"""Text to token ids and back, including text that appears while tokens are generated.

A thin shell around the `tokenizers` library. All decoders here are byte-level BPE: every token
stands for a fixed string of bytes and a text is the UTF-8 reading of their concatenation. This
is what makes streaming simple: `Detokenizer` looks bytes up in a table and feeds an incremental
UTF-8 decoder, O(1) a token, where re-decoding a window (as the general case needs) costs two
library calls a token. Tokenizers with another decoder (SentencePiece style) are refused.

Invariants: the pushes and the flush of a Detokenizer, joined, equal `Tokenizer.decode` of the
same ids, for any ids. Special tokens are never shown. Encoding and decoding do not change the
object, so threads may share it; a Detokenizer belongs to one request.

Not here: reading files (loader/), chat templates (chat.py).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders


class UnsupportedTokenizerError(ValueError):
    """A tokenizer of a kind that cannot be streamed here; the loader says which file it is."""


class Tokenizer:
    """Encodes and decodes for one model.

    `special_tokens` maps the roles a chat template may name (bos_token, eos_token, ...) to
    their text. Raises UnsupportedTokenizerError for a decoder that is not byte-level.
    """

    def __init__(
        self,
        backend: HfTokenizer,
        *,
        eos_token_ids: frozenset[int],
        chat_template: str | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            kind = type(backend.decoder).__name__
            raise UnsupportedTokenizerError(f"decoder {kind} is not supported, only ByteLevel")
        self._backend = backend
        self._token_bytes = _build_token_bytes(backend)
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens))

    @property
    def vocab_size(self) -> int:
        """Number of token ids the tokenizer knows; a model's logits may have more columns."""
        return len(self._token_bytes)

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        `parse_special`: special tokens written out in the text ("<|im_end|>") become their id.
        On by default, as in vLLM and transformers: a rendered chat template relies on it, and
        clients of the completions endpoint write prompts with it. Turn it off for text that
        must not steer the model.

        `add_special_tokens`: put in front what the model's tokenizer asks for (BOS). Off by
        default, because a chat template writes it itself; completion prompts turn it on.
        """
        backend = self._backend if parse_special else self._plain_backend
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; unknown ids and broken UTF-8 do not raise."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: none for special tokens and unknown ids."""
        if 0 <= token_id < len(self._token_bytes):
            return self._token_bytes[token_id]
        return b""

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder for one request."""
        return Detokenizer(self)

    @cached_property
    def _plain_backend(self) -> HfTokenizer:
        # The switch is a setting of the library's object, so the second mode needs its own copy.
        backend = HfTokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend


class Detokenizer:
    """Text of a growing sequence of tokens, each character as soon as its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is final now, "" while a character is incomplete."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End of the sequence: the replacement character if one was left incomplete, else ""."""
        return self._utf8.decode(b"", final=True)


def _build_token_bytes(backend: HfTokenizer) -> list[bytes]:
    """Bytes of each token id, b"" for special tokens and holes in the vocabulary."""
    to_byte = _byte_of_character()
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    special_ids = {
        token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
    }
    for token, token_id in vocab.items():
        if token_id not in special_ids:
            try:
                table[token_id] = bytes([to_byte[character] for character in token])
            except KeyError:  # an added token in plain text, as the library reads it too
                table[token_id] = token.encode()
    return table


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}
