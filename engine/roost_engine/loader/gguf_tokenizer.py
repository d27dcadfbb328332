"""Tokenizer from GGUF metadata: the `tokenizer.ggml.*` keys.

`tokenizer.ggml.model` names the algorithm: gpt2 = byte-level BPE, llama = SentencePiece
(gguf_spm.py). For the former `tokenizer.ggml.pre` names how text is cut before it; the cut is
known by name only, so an unknown name is refused: a wrong cut gives a model that works a little
worse and no error.

    smollm      each digit alone, then GPT-2's pattern. transformers' own GGUF tokenizer lacks the
                digit split, so it is no oracle for numbers.
    llama-bpe   Llama 3 (also spelt llama3, llama-v3): a pattern of its own, with digits in threes;
                a piece that is a token as a whole is taken without merging; BOS unless the file
                says otherwise. As llama.cpp (src/llama-vocab.cpp) has it.
    qwen2       Llama 3's pattern with each digit alone, after NFC, as in Qwen's tokenizer.json.
"""

from __future__ import annotations

from typing import Final

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders as hf_decoders

from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_metadata import GgufMetadata
from roost_engine.loader.gguf_spm import read_spm
from roost_engine.tokenizer import Tokenizer

# llama.cpp's token types that are recognised in text before BPE.
_CONTROL: Final = 3  # special, not shown
_USER_DEFINED: Final = 4  # shown

_SPECIAL_ROLES: Final = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_LLAMA3_NAMES: Final = frozenset({"llama-bpe", "llama3", "llama-v3"})
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EOS_KEYS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """Build the tokenizer; ModelFileError names what is missing, damaged or unknown."""
    metadata = GgufMetadata(file)
    model = metadata.string("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        problem = f"tokenizer model {model!r} is not supported, only 'gpt2' and 'llama'"
        raise ModelFileError(file.path, problem)
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise ModelFileError(file.path, "tokenizer.ggml.tokens holds a token twice")
    specials = _special_tokens(file, metadata, tokens)
    is_spm = model == "llama"
    backend = read_spm(file, tokens) if is_spm else _read_byte_level(file, metadata, tokens)
    _add_recognised_tokens(file, metadata, tokens, backend)
    has_bos = is_spm or metadata.string("tokenizer.ggml.pre") in _LLAMA3_NAMES
    if metadata.boolean("tokenizer.ggml.add_bos_token", default=has_bos):
        _prepend_bos(file, specials, backend)
    eos_ids = [metadata.integer(key) for key in _EOS_KEYS if key in metadata]
    return Tokenizer(
        backend,
        eos_token_ids=frozenset(_checked_id(file, eos_id, tokens) for eos_id in eos_ids),
        chat_template=metadata.string("tokenizer.chat_template", "") or None,
        special_tokens=specials,
    )


def _read_byte_level(file: GgufFile, metadata: GgufMetadata, tokens: list[str]) -> HfTokenizer:
    pre = metadata.string("tokenizer.ggml.pre")
    is_llama3 = pre in _LLAMA3_NAMES
    if not is_llama3 and pre not in ("smollm", "qwen2"):
        problem = f"pre-tokenizer {pre!r} is not supported, only 'smollm', 'llama-bpe' and 'qwen2'"
        raise ModelFileError(file.path, f"{problem}; a Hugging Face folder carries its own")
    backend = HfTokenizer(_read_bpe(file, metadata, tokens, ignore_merges=is_llama3))
    backend.decoder = hf_decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _words_cut(digits="")
    else:
        backend.pre_tokenizer = _words_cut(digits="{1,3}") if is_llama3 else _smollm_cut()
    return backend


def _smollm_cut() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _words_cut(digits: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's pattern; `digits` says how many of them make a piece."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _read_bpe(
    file: GgufFile, metadata: GgufMetadata, tokens: list[str], *, ignore_merges: bool
) -> models.BPE:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for merge in metadata.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFileError(file.path, f"merge {merge!r} is not made of known tokens")
        merges.append((left, right))
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)


def _add_recognised_tokens(
    file: GgufFile, metadata: GgufMetadata, tokens: list[str], backend: HfTokenizer
) -> None:
    types = metadata.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        problem = f"{len(types)} entries in tokenizer.ggml.token_type for {len(tokens)} tokens"
        raise ModelFileError(file.path, problem)
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        special = kind == _CONTROL
        found = [
            token for token, token_type in zip(tokens, types, strict=True) if token_type == kind
        ]
        add([AddedToken(token, special=special, normalized=False) for token in found])


def _special_tokens(file: GgufFile, metadata: GgufMetadata, tokens: list[str]) -> dict[str, str]:
    return {
        role: tokens[_checked_id(file, metadata.integer(key), tokens)]
        for role, key in _SPECIAL_ROLES.items()
        if key in metadata
    }


def _checked_id(file: GgufFile, token_id: int, tokens: list[str]) -> int:
    if not 0 <= token_id < len(tokens):
        raise ModelFileError(file.path, f"special token id {token_id} is not in the vocabulary")
    return token_id


def _prepend_bos(file: GgufFile, specials: dict[str, str], backend: HfTokenizer) -> None:
    bos = specials.get("bos_token")
    if bos is None:
        raise ModelFileError(file.path, "add_bos_token is set, but there is no bos_token_id")
    try:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    except ValueError as error:  # the library has a small grammar of its own for these
        raise ModelFileError(file.path, f"cannot prepend BOS {bos!r}: {error}") from error
