"""Tokenizer and Detokenizer: streaming equals decoding, for any ids and any text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from roost_engine.loader import load
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_tokenizer import read_tokenizer
from roost_engine.tokenizer import Tokenizer, UnsupportedTokenizerError

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
    path: Path = load._resolve("smollm2")
    return read_tokenizer(GgufFile(path))


def _stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@given(st.lists(st.integers(0, SMALL.vocab_size + 5), max_size=60))
def test_streaming_any_ids_equals_decoding_them(ids: list[int]) -> None:
    assert SMALL.decode(ids) == _stream(SMALL, ids)


@given(st.text(max_size=80))
def test_text_survives_the_round_trip(text: str) -> None:
    ids = SMALL.encode(text, parse_special=False)

    assert text == SMALL.decode(ids) == _stream(SMALL, ids)


@given(st.text(max_size=40))
def test_pushed_text_is_final(text: str) -> None:
    """Every prefix of the pushes is a prefix of the text: nothing is taken back."""
    detokenizer = SMALL.detokenizer()
    shown = ""
    for token_id in SMALL.encode(text, parse_special=False):
        shown += detokenizer.push(token_id)
        assert text.startswith(shown)


def test_an_incomplete_character_waits_for_its_last_byte() -> None:
    detokenizer = SMALL.detokenizer()
    ids = SMALL.encode("🙂")

    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_a_character_cut_off_at_the_end_is_flushed_as_a_replacement() -> None:
    detokenizer = SMALL.detokenizer()
    first_byte = SMALL.encode("🙂")[0]

    assert detokenizer.push(first_byte) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_recognised_unless_told_otherwise() -> None:
    end = min(SMALL.eos_token_ids)

    assert [end] == SMALL.encode("<|end|>")
    plain = SMALL.encode("<|end|>", parse_special=False)
    assert end not in plain
    assert SMALL.decode(plain) == "<|end|>"
    assert [end] == SMALL.encode("<|end|>")  # the other mode left this one as it was


def test_special_tokens_are_not_shown_but_added_text_is() -> None:
    ids = SMALL.encode("he<|end|>→ größer")

    assert "he→ größer" == SMALL.decode(ids) == _stream(SMALL, ids)


def test_a_decoder_that_is_not_byte_level_is_refused_by_name() -> None:
    backend = HfTokenizer(models.BPE())
    backend.decoder = decoders.Metaspace()

    with pytest.raises(UnsupportedTokenizerError, match="decoder Metaspace is not supported"):
        Tokenizer(backend, eos_token_ids=frozenset(), chat_template=None, special_tokens={})


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)

    assert text == smollm2.decode(ids) == _stream(smollm2, ids)


@pytest.mark.model
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 49151), max_size=80))
def test_smollm2_streams_any_ids_as_it_decodes_them(smollm2: Tokenizer, ids: list[int]) -> None:
    assert smollm2.decode(ids) == _stream(smollm2, ids)


@pytest.mark.model
def test_smollm2_splits_digits_and_hides_its_special_tokens(smollm2: Tokenizer) -> None:
    digits = smollm2.encode("0123456789")

    assert len(digits) == 10
    assert smollm2.vocab_size == 49152
    assert frozenset({2}) == smollm2.eos_token_ids
    assert smollm2.encode("<|im_start|><|im_end|>") == [1, 2]
    assert _stream(smollm2, [0, 1, 2, 16]) == ""
    assert smollm2.chat_template is not None
