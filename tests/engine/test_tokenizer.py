"""Tokenizer and Detokenizer: streaming equals decoding, for any ids and any text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from roost_engine.loader import load
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_tokenizer import read_tokenizer
from roost_engine.token_bytes import UnsupportedTokenizerError
from roost_engine.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "Hello, world!",
    "naïve café — “quotes” …",
    "日本語のテキスト、漢字かな混じり。한국어 中文",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200f",
    "def f(x):\n\treturn x ** 2  # 12345\r\n",
    "   leading and trailing   ",
    "\x00\x7f\x80\uffff\U0010ffff",
    "",
]


def _byte_level(merges: list[tuple[str, str]]) -> Tokenizer:
    """One token for each byte, the merges, a special token and one in plain text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *[left + right for left, right in merges]]
    vocab = {token: idx for idx, token in enumerate(tokens)}
    backend = HfTokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("→ größer", special=False, normalized=False)])
    return Tokenizer(
        backend, eos_token_ids=frozenset({len(tokens)}), chat_template=None, special_tokens={}
    )


SMALL = _byte_level([("h", "e"), ("l", "l"), ("he", "ll"), ("Ã", "©")])


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    path: Path = load.resolve("smollm2")
    return read_tokenizer(GgufFile(path))


def _stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@given(st.lists(st.integers(0, SMALL.vocab_size + 5), max_size=60))
def test_streaming_any_ids_equals_decoding_them(ids: list[int]) -> None:
    assert SMALL._backend.decode(ids) == SMALL.decode(ids) == _stream(SMALL, ids)


@given(st.text(max_size=80))
def test_text_survives_the_round_trip(text: str) -> None:
    ids = SMALL.encode(text)

    assert text == SMALL.decode(ids) == _stream(SMALL, ids)


@given(st.text(max_size=40))
def test_pushed_text_is_final(text: str) -> None:
    """Every prefix of the pushes is a prefix of the text: nothing is taken back."""
    detokenizer = Detokenizer(SMALL)
    shown = ""
    for token_id in SMALL.encode(text):
        shown += detokenizer.push(token_id)
        assert text.startswith(shown)


def test_an_incomplete_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(SMALL)
    ids = SMALL.encode("🙂")

    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_a_character_cut_off_at_the_end_is_flushed_as_a_replacement() -> None:
    detokenizer = Detokenizer(SMALL)
    first_byte = SMALL.encode("🙂")[0]

    assert detokenizer.push(first_byte) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_recognised() -> None:
    assert [*SMALL.eos_token_ids] == SMALL.encode("<|end|>")


def _tokenizer(backend: HfTokenizer) -> Tokenizer:
    return Tokenizer(backend, eos_token_ids=frozenset(), chat_template=None, special_tokens={})


def _backend() -> HfTokenizer:
    """A copy that a test may change."""
    return HfTokenizer.from_str(SMALL._backend.to_str())


def test_truncation_and_padding_of_the_file_are_turned_off() -> None:
    backend = _backend()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=50)

    assert _tokenizer(backend).encode("hello world") == SMALL.encode("hello world")


@given(st.text(max_size=80) | st.text("hel →größ<|nd>", max_size=80))
def test_ids_are_those_of_the_librarys_plain_encode(text: str) -> None:
    assert SMALL._backend.encode(text, add_special_tokens=False).ids == SMALL.encode(text)


LONG_TOKENS = st.lists(st.sampled_from(["→ größer", "<|end|>", "hell"])).map("".join)


@given(st.text(max_size=80) | LONG_TOKENS)
def test_a_text_never_has_fewer_tokens_than_its_bytes_allow(text: str) -> None:
    assert SMALL.fewest_tokens(text) <= len(SMALL.encode(text))


def test_the_fewest_tokens_follow_from_the_longest() -> None:
    """That is "→ größer" with 12 bytes."""
    texts = ["", "x", "x" * 12, "ä" * 6 + "x", "→ größer" * 100]

    assert [SMALL.fewest_tokens(text) for text in texts] == [0, 1, 1, 2, 100]


@given(st.text("abc", max_size=20))
def test_bytes_without_a_token_do_not_count(text: str) -> None:
    backend = _backend()
    backend.model = models.BPE(vocab={"a": 0, "b": 1, "aa": 2}, merges=[("a", "a")])
    tokenizer = _tokenizer(backend)
    num_kept = text.count("a") + text.count("b")

    assert tokenizer.fewest_tokens(text) == -(-num_kept // 12)
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))


def _normalise(backend: HfTokenizer) -> None:
    backend.normalizer = normalizers.Strip()


def _drop_spaces(backend: HfTokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _strip_around_tokens(backend: HfTokenizer) -> None:
    backend.add_special_tokens([AddedToken("<pad>", lstrip=True)])


@pytest.mark.parametrize("change", [_normalise, _drop_spaces, _strip_around_tokens])
def test_where_text_may_shrink_no_number_of_tokens_is_promised(
    change: Callable[[HfTokenizer], None],
) -> None:
    backend = _backend()
    change(backend)

    assert _tokenizer(backend).fewest_tokens("x" * 10_000) == 0


def test_special_tokens_are_not_shown_but_added_text_is() -> None:
    ids = SMALL.encode("he<|end|>→ größer")

    assert "he→ größer" == SMALL.decode(ids) == _stream(SMALL, ids)


PIECES = ["<unk>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *"▁abhelo", "▁he", "ll"]


def _sentence_piece(decoder: decoders.Decoder, *, prepends: bool) -> Tokenizer:
    """As Gemma and Llama 2 spell their tokens: "▁" for a space, bytes where nothing else fits."""
    vocab = {piece: idx for idx, piece in enumerate(PIECES)}
    merges = [("▁", "h"), ("l", "l"), ("▁h", "e")]
    vocab["▁h"] = len(PIECES)
    backend = HfTokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    steps = [normalizers.Prepend("▁")] if prepends else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return _tokenizer(backend)


_GEMMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_LLAMA2 = [*_GEMMA, decoders.Strip(content=" ", left=1, right=0)]
_METASPACE = [decoders.ByteFallback(), decoders.Metaspace()]
SPELLED = [
    _sentence_piece(decoders.Sequence(_GEMMA), prepends=False),
    _sentence_piece(decoders.Sequence(_LLAMA2), prepends=True),
    _sentence_piece(decoders.Sequence(_METASPACE), prepends=True),
]


@pytest.mark.parametrize("tokenizer", SPELLED, ids=["gemma", "llama2", "metaspace"])
@given(text=st.text(max_size=60) | st.text(" helo→é", max_size=60))
def test_sentence_piece_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """A space that the tokenizer puts in front stays: the text continues a prompt.

    "▁" itself becomes a space, as it does in the library.
    """
    ids = tokenizer.encode(text)
    added = " " if text and tokenizer is not SPELLED[0] else ""

    assert added + text.replace("▁", " ") == tokenizer.decode(ids) == _stream(tokenizer, ids)


@given(st.lists(st.sampled_from([0, 1, *range(258, len(PIECES) + 1)]), max_size=40))
def test_whole_pieces_decode_as_the_library_decodes_them(ids: list[int]) -> None:
    tokenizer = SPELLED[0]

    assert tokenizer._backend.decode(ids) == tokenizer.decode(ids) == _stream(tokenizer, ids)


def test_bytes_of_a_character_wait_for_the_last_one() -> None:
    detokenizer = Detokenizer(SPELLED[0])

    assert [detokenizer.push(token_id) for token_id in SPELLED[0].encode("€")] == ["", "", "€"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Replace("_", " "),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([*_GEMMA, decoders.Replace("a", "b")]),
        decoders.Sequence([*_GEMMA, decoders.Strip(content="x", left=1, right=0)]),
        decoders.Sequence([*_GEMMA, decoders.Strip(content=" ", left=1, right=1)]),
        None,
    ],
    ids=str,
)
def test_a_decoder_without_a_table_of_bytes_is_refused_by_name(
    decoder: decoders.Decoder | None,
) -> None:
    backend = HfTokenizer(models.BPE())
    if decoder is not None:
        backend.decoder = decoder

    with pytest.raises(UnsupportedTokenizerError, match=r"decoder .* is not supported"):
        Tokenizer(backend, eos_token_ids=frozenset(), chat_template=None, special_tokens={})


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)

    assert smollm2._backend.encode(text, add_special_tokens=False).ids == ids
    assert text == smollm2.decode(ids) == _stream(smollm2, ids)


@pytest.mark.model
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 49151), max_size=80))
def test_smollm2_streams_any_ids_as_it_decodes_them(smollm2: Tokenizer, ids: list[int]) -> None:
    assert smollm2.decode(ids) == _stream(smollm2, ids)


@pytest.mark.model
@pytest.mark.parametrize("text", [*TEXTS, "\x04\x06 \x13" * 50, " " * 500, "=" * 500])
def test_smollm2_has_no_fewer_tokens_than_its_bytes_allow(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.fewest_tokens(text) <= len(smollm2.encode(text))
    assert smollm2.fewest_tokens("a" * 81 * 7 + "a") == 8


@pytest.mark.model
def test_smollm2_splits_digits_and_hides_its_special_tokens(smollm2: Tokenizer) -> None:
    digits = smollm2.encode("0123456789")

    assert len(digits) == 10
    assert smollm2.vocab_size == 49152
    assert frozenset({2}) == smollm2.eos_token_ids
    assert smollm2.encode("<|im_start|><|im_end|>") == [1, 2]
    assert _stream(smollm2, [0, 1, 2, 16]) == ""
    assert smollm2.chat_template is not None
