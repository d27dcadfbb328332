"""Transcripts: what is shown does not depend on how tokens come, nor on where the answer began."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_engine.chat_api import Tool, ToolUse
from roost_engine.request import FinishReason, SamplingParams, TokenLogprobs
from roost_engine.responses import Piece
from roost_engine.token_stream import Delta
from roost_engine.tool_parser import tool_parser
from roost_engine.transcript import Transcript

EOS, SPECIAL = 0, 1
#: Ends of sequence, parts of characters, of stop strings and of tool calls, and plain text.
SPELLINGS = [
    b"<end>", b"<special>", b"\xf0\x9f", b"\x98\x80", b"\xe2\x82", b"\xac", b"a", b"b", b"ab",
    b"ba", b"aab", b" ", b"\n", b"c d", "é".encode(), b"<tool_", b"call>", b"<tool_call>",
    b"</tool_call>", b'{"name": "f", "arguments": {', b'"x": 1', b"}}", b"}", b"; ", b"<", b"{",
]  # fmt: skip
STOPS = ["aba", "bb", "b\n", "c d\n", "a<", "é"]


class Words:
    """A tokenizer of these spellings."""

    eos_token_ids = frozenset({EOS})

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in (EOS, SPECIAL) else SPELLINGS[token_id]

    def spelled_bytes(self, token_id: int) -> bytes:
        return SPELLINGS[token_id]


class Case:
    """An answer as the engine gives it: tokens up to its end, and why it ended."""

    def __init__(
        self, token_ids: list[int], sampling: SamplingParams, use: ToolUse | None, style: Any
    ) -> None:
        self.sampling, self.use, self.style = sampling, use, style
        self.reason: FinishReason | None = None
        self.token_ids: list[int] = []
        for token_id in token_ids:
            is_early = len(self.token_ids) < sampling.min_tokens
            if is_early and token_id in {EOS, *sampling.stop_token_ids}:
                continue  # the rules forbid it
            self.token_ids.append(token_id)
            if token_id == EOS and not sampling.ignore_eos:
                self.reason = FinishReason.STOP
            elif len(self.token_ids) == sampling.max_tokens:
                self.reason = FinishReason.LENGTH
            elif token_id in sampling.stop_token_ids:
                self.reason = FinishReason.STOP
            if self.reason is not None:
                break

    def transcript(self) -> Transcript:
        tools = None if self.use is None else (self.use, tool_parser(self.style, self.use))
        return Transcript(Words(), self.sampling, tools)  # type: ignore[arg-type]

    def deltas(self, start: int, ends: Iterable[int]) -> list[Delta]:
        """The tokens from `start` on, cut at these places."""
        count = len(self.token_ids)
        cuts = sorted({start, count, *(end for end in ends if start < end < count)})
        return [
            Delta(
                self.token_ids[first:end],
                self.reason if end == count else None,
                [self._logprobs(place) for place in range(first, end)]
                if self.sampling.logprobs is not None
                else [],
            )
            for first, end in pairwise(cuts)
        ]

    def _logprobs(self, place: int) -> TokenLogprobs:
        """Others at every place."""
        return TokenLogprobs(-float(place), [(place % len(SPELLINGS), -0.5)])


class Seen:
    """What a client has of an answer."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, list[str]] = {}
        self.tokens: list[Any] = []
        self.end: tuple[str, Any] | None = None

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            assert self.end is None, "a piece after the last"
            self.text += piece.text
            self.tokens += piece.tokens
            for delta in piece.tool_deltas:
                if delta.name is not None:
                    assert delta.index not in self.calls, "a call is begun twice"
                    self.calls[delta.index] = [delta.name, ""]
                self.calls[delta.index][1] += delta.arguments
            if piece.finish_reason is not None:
                self.end = (piece.finish_reason, piece.stop_reason)

    def read(self, transcript: Transcript, deltas: Iterable[Delta]) -> Seen:
        for delta in deltas:
            if self.end is None:
                self.add(transcript.read(delta))
        return self

    @property
    def all(self) -> Any:
        return self.text, self.calls, self.tokens, self.end


@st.composite
def cases(draw: st.DrawFn) -> Case:
    token_ids = draw(st.lists(st.integers(0, len(SPELLINGS) - 1), min_size=1, max_size=24))
    sampling = SamplingParams(
        max_tokens=draw(st.integers(1, 24)),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        stop=tuple(draw(st.lists(st.sampled_from(STOPS), max_size=3, unique=True))),
        stop_token_ids=frozenset(draw(st.sets(st.sampled_from([11, 23]), max_size=2))),
        include_stop_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, 0, 2])),
    )
    use = None
    if draw(st.booleans()):
        use = ToolUse([Tool("f", "", {}, False)], "auto", draw(st.booleans()))
    case = Case(token_ids, sampling, use, draw(st.sampled_from(["hermes", "llama3"])))
    if case.reason is None:
        case.reason = FinishReason.LENGTH
        limit = max(1, len(case.token_ids))
        case.sampling = msgspec.structs.replace(sampling, max_tokens=limit)
    return case


places = st.lists(st.integers(0, 24), max_size=6)


@settings(max_examples=500)
@given(cases(), places)
def test_how_tokens_are_cut_into_deltas_changes_nothing(case: Case, ends: list[int]) -> None:
    one_by_one, cut = case.transcript(), case.transcript()

    expected = Seen().read(one_by_one, case.deltas(0, range(len(case.token_ids))))
    seen = Seen().read(cut, case.deltas(0, ends))

    assert seen.all == expected.all
    assert cut.num_completion_tokens == one_by_one.num_completion_tokens
    assert expected.end is not None or not case.token_ids


@settings(max_examples=500)
@given(cases(), places, places, st.integers(0, 24), st.booleans())
def test_an_answer_goes_on_where_it_was_left(
    case: Case, first_ends: list[int], then_ends: list[int], cut: int, has_grammar: bool
) -> None:
    undisturbed = case.transcript()
    expected = Seen().read(undisturbed, case.deltas(0, []))
    first, seen = case.transcript(), Seen()
    for delta in case.deltas(0, [*first_ends, cut]):
        pieces = first.read(delta)
        # The last piece is lost, what came before it in the same delta is not.
        seen.add([piece for piece in pieces if piece.finish_reason is None])
        if first.num_completion_tokens >= cut or pieces[-1].finish_reason is not None:
            break
    ids = first.take_ids()

    second = case.transcript()
    num_owed = second.replay(ids, has_grammar=has_grammar)
    assert second.num_completion_tokens == len(ids)
    seen.read(second, case.deltas(len(ids) - num_owed, then_ends))

    assert seen.all == expected.all
    assert ids + second.take_ids() == undisturbed.take_ids()
    assert second.num_completion_tokens == undisturbed.num_completion_tokens


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 10} | options))


def ids_of(*spellings: str) -> list[int]:
    return [SPELLINGS.index(spelling.encode()) for spelling in spellings]


def replay(sampling: SamplingParams, *spellings: str, has_grammar: bool = False) -> int:
    transcript = Transcript(Words(), sampling)  # type: ignore[arg-type]
    return transcript.replay(ids_of(*spellings), has_grammar=has_grammar)


@pytest.mark.parametrize(
    ("sampling", "spellings"),
    [
        (greedy(max_tokens=2), ["a", "b", "a"]),
        (greedy(), ["a", "<end>", "a"]),
        (greedy(stop_token_ids=frozenset(ids_of(" "))), ["a", " ", "a"]),
        (greedy(stop=("aba",)), ["a", "ba", "a"]),
    ],
    ids=["limit", "end of sequence", "stop token", "stop string"],
)
def test_tokens_after_the_end_are_no_answer(sampling: SamplingParams, spellings: list[str]) -> None:
    with pytest.raises(ValueError, match="the answer ends after 2"):
        replay(sampling, *spellings)
    assert replay(sampling, *spellings[:-1]) == 1


def test_only_what_is_needed_comes_once_more() -> None:
    assert replay(greedy()) == 0
    assert replay(greedy(), has_grammar=True) == 0
    assert replay(greedy(), "a", "b") == 0
    assert replay(greedy(), "a", "b", has_grammar=True) == 1
    assert replay(greedy(stop=("aba",)), "b", "a", "b") == 0
    assert replay(greedy(stop=("aba",), logprobs=0), "b", "a", "b") == 2
    assert replay(greedy(logprobs=0), "a", "b") == 0
    assert replay(greedy(logprobs=0), "a", "<special>") == 1
    assert replay(greedy(stop=("aba",), logprobs=0), "a", "b", "<end>") == 3


def test_the_last_piece_holds_what_only_the_end_shows() -> None:
    transcript = Transcript(Words(), greedy(stop=("aba",)))  # type: ignore[arg-type]

    first, last = transcript.read(Delta(ids_of("b", "a", "b"), FinishReason.LENGTH))

    assert (first.text, first.finish_reason) == ("b", None)
    assert (last.text, last.finish_reason) == ("ab", "length")
