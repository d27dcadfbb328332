"""Which bytes each token stands for.

Two ways to spell a token are known, and everything about streaming rests on both being fixed
tables, so that a text is the UTF-8 reading of the bytes of its tokens:

    byte-level       GPT-2's alphabet: each character of a token is one byte ("Ġthe" = " the")
    SentencePiece    "▁" is a space, "<0xE2>" one byte where the tokenizer falls back to bytes,
                     anything else the text itself

The space that a SentencePiece tokenizer puts in front of a text belongs to its first token and
is not taken away again: what is decoded here continues a prompt.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from tokenizers import Tokenizer as HfTokenizer

_SPACE: Final = "▁"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Steps of a SentencePiece decoder that the table above stands for.
_PIECE_STEPS: Final = frozenset({"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"})


class UnsupportedTokenizerError(ValueError):
    """A tokenizer of a kind that cannot be streamed here; the loader says which file it is."""


def build_token_bytes(backend: HfTokenizer) -> list[bytes]:
    """Bytes of each token id, b"" for special tokens and holes in the vocabulary.

    UnsupportedTokenizerError for a decoder of neither way.
    """
    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps]
    if kinds != ["ByteLevel"] and not _is_sentence_piece(steps):
        found = " + ".join(kinds) or "None"
        raise UnsupportedTokenizerError(
            f"decoder {found} is not supported, only ByteLevel and SentencePiece's "
            "(Replace or Metaspace, ByteFallback, Fuse, Strip)"
        )
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    special_ids = {
        token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
    }
    to_byte, falls_back = byte_of_character(), "ByteFallback" in kinds
    for token, token_id in vocab.items():
        if token_id in special_ids:
            continue
        if kinds == ["ByteLevel"]:
            table[token_id] = _from_alphabet(token, to_byte)
        else:
            table[token_id] = _from_piece(token, falls_back=falls_back)
    return table


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _decoder_steps(backend: HfTokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    settings = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = settings.get("decoders", [settings])
    return steps


def _is_sentence_piece(steps: list[dict[str, Any]]) -> bool:
    """Each step is one of the table's, and one of them makes spaces of "▁"."""
    makes_spaces = [
        (step["type"] == "Metaspace" and step["replacement"] == _SPACE)
        or (step["type"] == "Replace" and step["pattern"].get("String") == _SPACE)
        for step in steps
    ]
    num_replacing = sum(step["type"] in ("Metaspace", "Replace") for step in steps)
    strips_spaces = all(
        step["content"] in (" ", _SPACE) and step["stop"] == 0
        for step in steps
        if step["type"] == "Strip"
    )
    known = all(step["type"] in _PIECE_STEPS for step in steps)
    return known and strips_spaces and num_replacing == sum(makes_spaces) == 1


def _from_alphabet(token: str, to_byte: dict[str, int]) -> bytes:
    try:
        return bytes([to_byte[character] for character in token])
    except KeyError:  # an added token in plain text, as the library reads it too
        return token.encode()


def _from_piece(token: str, *, falls_back: bool) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token) if falls_back else None
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
