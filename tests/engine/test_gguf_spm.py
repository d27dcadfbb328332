"""SentencePiece out of GGUF: tokens are those of the algorithm written out, for any text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from roost_engine.loader import ModelFileError
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_tokenizer import read_tokenizer
from roost_engine.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
CHARACTERS = list("▁abcdé.")
# Better scores come first; some joins overlap, so that their order decides.
JOINED = [
    "ab",
    "▁a",
    "bc",
    "abc",
    "▁ab",
    "aa",
    "aaa",
    "ba",
    "cd",
    "▁abcd",
    "▁▁",
    "bcd",
    "..",
    "aab",
]


def _vocabulary() -> list[tuple[str, float, int]]:
    entries = [
        ("<pad>", -1000.0, CONTROL),
        ("<eos>", -1000.0, CONTROL),
        ("<bos>", -1000.0, CONTROL),
    ]
    entries += [("<unk>", -1000.0, UNKNOWN), ("  ", -1000.0, USER), ("\n\n", -1000.0, USER)]
    entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    entries += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(JOINED)]
    return entries + [(piece, -100.0 - rank, NORMAL) for rank, piece in enumerate(CHARACTERS)]


VOCABULARY = _vocabulary()
IDS = {token: token_id for token_id, (token, _, _) in enumerate(VOCABULARY)}


def _read(
    path: Path, vocabulary: list[tuple[str, float, int]] = VOCABULARY, **changes: Any
) -> Tokenizer:
    writer = GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model("llama")
    tokens, scores, types = zip(*vocabulary, strict=True)
    writer.add_token_list(list(tokens))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(types))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    for key, value in ({"add_space_prefix": False} | changes).items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_array(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read_tokenizer(GgufFile(path))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _read(tmp_path_factory.mktemp("spm") / "model.gguf")


def _join(text: str) -> list[str]:
    """Neighbours joined while their joined piece has a score: the best, leftmost first."""
    scores = {piece: score for piece, score, kind in VOCABULARY if kind == NORMAL}
    pieces = list(text.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[left + right], idx)
            for idx, (left, right) in enumerate(pairwise(pieces))
            if left + right in scores
        ]
        if not joins:
            return pieces
        _, idx = min(joins)
        pieces[idx : idx + 2] = [pieces[idx] + pieces[idx + 1]]


def _reference(text: str) -> list[int]:
    """User-defined pieces first, then joins, then bytes for what is no piece."""
    ids: list[int] = []
    start = 0
    for idx in range(len(text)):
        if idx >= start and text[idx : idx + 2] in ("  ", "\n\n"):
            ids += _ids(_join(text[start:idx]))
            ids.append(IDS[text[idx : idx + 2]])
            start = idx + 2
    return ids + _ids(_join(text[start:]))


def _ids(pieces: list[str]) -> list[int]:
    return [
        token_id
        for piece in pieces
        for token_id in (
            [IDS[piece]] if piece in IDS else [IDS[f"<0x{byte:02X}>"] for byte in piece.encode()]
        )
    ]


@given(text=st.text(" abcdé.\n", max_size=40) | st.text(max_size=20))
def test_tokens_are_those_of_the_algorithm_written_out(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)

    assert _reference(text) == ids
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_bos_comes_first_unless_the_file_says_otherwise(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    silent = _read(tmp_path / "model.gguf", add_bos_token=False)

    assert tokenizer.encode("a", add_special_tokens=True) == [2, IDS["a"]]
    assert silent.encode("a", add_special_tokens=True) == [IDS["a"]]
    assert tokenizer.encode("<bos>a<eos>") == [2, IDS["a"], 1]
    assert tokenizer.eos_token_ids == frozenset({1})


def test_a_space_goes_in_front_where_the_file_asks_for_it(tmp_path: Path) -> None:
    tokenizer = _read(tmp_path / "model.gguf", add_space_prefix=True)

    assert tokenizer.encode("ab") == [IDS["▁ab"]]
    assert tokenizer.decode([IDS["▁ab"]]) == " ab"


def _without(*tokens: str) -> list[tuple[str, float, int]]:
    return [entry for entry in VOCABULARY if entry[0] not in tokens]


@pytest.mark.parametrize(
    ("vocabulary", "changes", "problem"),
    [
        (_without("c"), {}, "piece '.*' holds a character that is no piece itself"),
        ([*VOCABULARY, ("da", -3.0, NORMAL)], {}, "scores holds a score twice"),
        (VOCABULARY, {"scores": [0.5]}, "1 scores and .* types for .* tokens"),
        (VOCABULARY, {"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not"),
        (VOCABULARY, {"precompiled_charsmap": [1, 2]}, "precompiled_charsmap is not supported"),
        ([*VOCABULARY, ("ab", -99.0, NORMAL)], {}, "holds a token twice"),
        (VOCABULARY[:3], {}, "special token id 3 is not in the vocabulary"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    tmp_path: Path, vocabulary: list[tuple[str, float, int]], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ModelFileError, match=problem):
        _read(tmp_path / "model.gguf", vocabulary, **changes)
