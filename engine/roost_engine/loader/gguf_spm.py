"""SentencePiece BPE out of GGUF metadata (`tokenizer.ggml.model` "llama": Gemma, Llama 2).

The file has pieces and scores but no merges. SentencePiece joins the two neighbours whose joined
piece has the highest score, leftmost first; the `tokenizers` library applies merges by rank. The
two agree when every way to cut a piece in two pieces is a merge, ranked by the piece's score,
provided that

- no two pieces have the same score, so that rank and position cannot contradict each other,
- every character of a piece is a piece, so that no join starts from an unknown character.

A file that breaks this is refused: it would be tokenised a little differently, without an error.
User-defined pieces are found in the text before anything is joined, longest first. Characters
without a piece become the pieces of their UTF-8 bytes. Source: github.com/google/sentencepiece
(src/bpe_model.cc); the merges are those of transformers' convert_slow_tokenizer.py.
"""

from __future__ import annotations

from typing import Final

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers

from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_metadata import GgufMetadata

_SPACE: Final = "▁"
_NORMAL: Final = 1  # llama.cpp's token types
_BYTE: Final = 6


def read_spm(file: GgufFile, tokens: list[str]) -> HfTokenizer:
    """The tokenizer without its special tokens; ModelFileError if it cannot be exact.

    O(characters of all pieces) table look-ups.
    """
    metadata = GgufMetadata(file)
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if key in metadata and file.metadata[key]:
            raise ModelFileError(file.path, f"{key} is not supported")
    scores = metadata.numbers("tokenizer.ggml.scores")
    types = metadata.integers("tokenizer.ggml.token_type")
    if not len(scores) == len(types) == len(tokens):
        problem = f"{len(scores)} scores and {len(types)} types for {len(tokens)} tokens"
        raise ModelFileError(file.path, problem)
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == _NORMAL
    }
    _check_exact(file, pieces)
    backend = HfTokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=_merges(pieces),
            byte_fallback=_has_all_bytes(tokens, types),
            fuse_unk=True,
            unk_token=_unknown_token(file, metadata, tokens),
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if metadata.boolean("tokenizer.ggml.add_space_prefix", default=True):
        steps.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Each cut of each piece in two pieces, best score first."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=pieces.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def _check_exact(file: GgufFile, pieces: dict[str, float]) -> None:
    joined = [score for piece, score in pieces.items() if len(piece) > 1]
    if len(set(joined)) != len(joined):
        raise ModelFileError(file.path, "tokenizer.ggml.scores holds a score twice")
    alphabet = {piece for piece in pieces if len(piece) == 1}
    for piece in pieces:
        if not alphabet.issuperset(piece):
            problem = f"piece {piece!r} holds a character that is no piece itself"
            raise ModelFileError(file.path, f"tokenizer.ggml.tokens: {problem}")


def _has_all_bytes(tokens: list[str], types: list[int]) -> bool:
    found = {token for token, kind in zip(tokens, types, strict=True) if kind == _BYTE}
    return found >= {f"<0x{byte:02X}>" for byte in range(256)}


def _unknown_token(file: GgufFile, metadata: GgufMetadata, tokens: list[str]) -> str:
    token_id = metadata.integer("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= token_id < len(tokens):
        raise ModelFileError(file.path, f"special token id {token_id} is not in the vocabulary")
    return tokens[token_id]
