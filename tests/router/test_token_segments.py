"""Texts encoded in segments have the tokens of the whole, and prefixes are cut alike."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import smollm2_folder, smollm2_tokenizer, write_folder
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from roost_router.tokens import segments
from roost_router.tokens.segments import MIN_CHARACTERS, Encoder
from roost_router.tokens.tokenizer_folder import FolderTokenizer, TokenizerError

WORDS = st.sampled_from(
    [
        "the",
        "it's",
        "x",
        "don't",
        "12345",
        "Ünïcode",
        "日本語",
        "e\u0301",
        "😀",
        "\u200d",
        "s",
        "'s",
    ]
)
SIGNS = st.sampled_from(
    [",", ".", "()", "{", "--", "<|im_start|>", "<|im_end|>", "<|im_", "start|>", "<"]
)
BLANKS = st.sampled_from([" ", "  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\u00a0"])
SENTENCES = st.lists(WORDS, max_size=6).map(" ".join)
TEXTS = st.lists(st.one_of(WORDS, SENTENCES, SIGNS, BLANKS, st.text(max_size=4)), max_size=80).map(
    "".join
)


@pytest.fixture(scope="module")
def tokenizer() -> FolderTokenizer:
    return FolderTokenizer(smollm2_folder())


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """So that short texts are cut, too."""
    monkeypatch.setattr(segments, "MIN_CHARACTERS", 5)


@pytest.mark.interpreted
@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_tokens_in_segments_are_those_of_the_whole_text(tokenizer, text):
    encoded = tokenizer.encode(text, adds_special_tokens=False)

    assert list(encoded.token_ids) == smollm2_tokenizer().encode(text)


@pytest.mark.interpreted
@settings(deadline=None, max_examples=100)
@given(text=TEXTS, other=st.sampled_from(["s", "'s", "x ", " ", "\n", "<|im_start|>", "\u0301"]))
def test_what_a_text_shows_is_certain_whatever_follows(tokenizer, text, other):
    encoded = tokenizer.encode(text, adds_special_tokens=False)
    for boundary in encoded.boundaries:
        shown = text[: boundary.known_at]

        continued = tokenizer.encode(shown + other, adds_special_tokens=False).token_ids

        assert encoded.token_ids[: boundary.num_tokens] == continued[: boundary.num_tokens]


LETTERS = r"[^\r\n\p{L}\p{N}]?"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = rf"{ENDINGS}|{LETTERS}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BREAKS}"
O200K = (
    rf"{LETTERS}{UPPER}*{LOWER}+{ENDINGS}?|{LETTERS}{UPPER}+{LOWER}*{ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BREAKS}"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BREAKS}"
)
#: How the tokenizers of other families cut text into words.
PATTERNS = {
    "llama 3": [LLAMA3],
    "o200k": [O200K],
    "deepseek 3": [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK],
}


@functools.cache
def family(name: str, *, normalises: bool) -> FolderTokenizer:
    """A tokenizer that cuts as this family's does, trained on little text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[name]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if normalises:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([segments._TRIAL, "the it's don't x 12345 s " * 3], trainer)
    with tempfile.TemporaryDirectory() as folder:
        return FolderTokenizer(write_folder(Path(folder), backend.to_str()))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", PATTERNS)
@settings(deadline=None, max_examples=80)
@given(text=TEXTS, normalises=st.booleans())
def test_other_families_are_cut_where_their_words_meet(name, text, normalises):
    tokenizer = family(name, normalises=normalises)

    encoded = tokenizer.encode(text, adds_special_tokens=False)

    assert tokenizer._encoder.cuts_words
    assert list(encoded.token_ids) == tokenizer._backend.encode(text).ids


def test_real_text_is_cut_between_words(tokenizer, monkeypatch):
    monkeypatch.setattr(segments, "MIN_CHARACTERS", MIN_CHARACTERS)
    text = " ".join(Random(1).choices(["apple", "pear,", "plum\nPlum"], k=1000))

    encoded = tokenizer.encode(text, adds_special_tokens=False)

    assert len(encoded.boundaries) >= len(text) / (MIN_CHARACTERS + 20)


def test_only_what_is_new_is_encoded(monkeypatch):
    monkeypatch.setattr(segments, "MIN_CHARACTERS", 4)
    asked: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[ord(character) for character in text] for text in texts]

    encoder = Encoder(encode, ["<s>"], cuts_words=True)
    asked.clear()
    encoder.encode("<s>one two three")
    encoder.encode("<s>one two three four five")

    assert asked == ["<s>one", " two", " three", " four", " five"]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(segments, "_MAX_REMEMBERED", 100)
    encoder = Encoder(lambda texts: [[0] * len(t) for t in texts], ["<s>"], cuts_words=False)
    for number in range(50):
        encoder.encode(f"text {number}")

    assert len(encoder._known) <= 10
    assert encoder._num_remembered == sum(2 * len(text) for text in encoder._known)
    assert len(encoder.encode("x" * 1000).token_ids) == 1000  # more than is remembered


def characters(**changes: object) -> Tokenizer:
    """A tokenizer of words for tests of what is not SmolLM2's."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ġ": 2, "Ġa": 3}, merges=[("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"normalizer": normalizers.Lowercase()},
        # Words in pairs: allowed by its kind, found out by the trial.
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\w+ ?\w+"), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            "model": models.BPE(
                vocab={"d": 0, "Ġ": 1, "b": 2, "dĠ": 3, "dĠb": 4},
                merges=[("d", "Ġ"), ("dĠ", "b")],
            ),
        },
    ],
)
def test_tokenizers_that_need_more_context_are_not_cut_between_words(tmp_path, changes):
    folder = write_folder(tmp_path, characters(**changes).to_str())

    assert not FolderTokenizer(folder)._encoder.cuts_words


def test_a_tokenizer_with_special_tokens_that_look_like_words_is_not_cut_between_them(tmp_path):
    backend = characters()
    backend.add_special_tokens(["<a b>"])

    assert not FolderTokenizer(write_folder(tmp_path, backend.to_str()))._encoder.cuts_words
    assert FolderTokenizer(write_folder(tmp_path, characters().to_str()))._encoder.cuts_words


def test_tokens_that_take_in_blanks_around_them_are_no_boundary(tmp_path):
    backend = characters()
    backend.add_tokens([AddedToken("<l>", lstrip=True, normalized=False)])
    tokenizer = FolderTokenizer(write_folder(tmp_path, backend.to_str()))
    text = "aaaaaaaa <l>aaaaaaaa"

    encoded = tokenizer.encode(text, adds_special_tokens=False)

    assert encoded.boundaries == []
    assert list(encoded.token_ids) == backend.encode(text).ids


def test_tokens_for_beginning_and_end_are_added_where_they_belong(tmp_path):
    backend = characters()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)]
    )
    tokenizer = FolderTokenizer(write_folder(tmp_path, backend.to_str()))
    text = "aaaa a" * 10

    encoded = tokenizer.encode(text, adds_special_tokens=True)
    bare = tokenizer.encode(text, adds_special_tokens=False)

    assert list(encoded.token_ids) == backend.encode(text).ids
    assert list(bare.token_ids) == backend.encode(text, add_special_tokens=False).ids
    assert encoded.boundaries
    assert [b.num_tokens for b in encoded.boundaries] == [b.num_tokens + 1 for b in bare.boundaries]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", "{}", "not a readable tokenizer"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("chat_template.jinja", "{% if %}", "chat template is broken"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_folders_that_cannot_be_used_are_named_with_the_problem(tmp_path, name, content, problem):
    folder = write_folder(tmp_path, characters().to_str())
    if content is None:
        (folder / name).unlink()
    elif isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        (folder / name).write_text(content)

    with pytest.raises(TokenizerError, match=problem) as caught:
        FolderTokenizer(folder)
    assert str(folder) in str(caught.value)
