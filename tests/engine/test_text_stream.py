"""Stop strings across pieces, and that nothing is shown too early or lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_engine.text_stream import TextStream


def run(pieces: list[str], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    shown = [stream.push(piece) for piece in pieces]
    return [*shown, stream.flush()], stream.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "stopped"),
    [
        (["ab", "cd"], [], ["ab", "cd", ""], False),
        (["abSTOPcd"], ["STOP"], ["ab", ""], True),
        (["abST", "OPcd"], ["STOP"], ["ab", "", ""], True),
        (["a", "S", "T", "O", "P"], ["STOP"], ["a", "", "", "", "", ""], True),
        (["abST", "ART"], ["STOP"], ["ab", "START", ""], False),
        (["abST"], ["STOP"], ["ab", "ST"], False),
        (["aa", "ab"], ["aab"], ["", "a", ""], True),
        (["STOP"], ["STOP"], ["", ""], True),
        (["x", "", "y"], ["STOP"], ["x", "", "y", ""], False),
        (["one two"], ["two", "one"], ["", ""], True),
        (["abc"], ["abcd", "bc"], ["a", ""], True),
        (["zabc"], ["bc", "abc"], ["z", ""], True),
        (["done\n\nUs", "er: hi"], ["\n\nUser:"], ["done", "", ""], True),
        (["é", "→", "x"], ["→x"], ["é", "", "", ""], True),
    ],
)
def test_table(pieces: list[str], stop: list[str], shown: list[str], stopped: bool) -> None:
    assert run(pieces, stop) == (shown, stopped)


def test_nothing_is_shown_after_the_stop() -> None:
    stream = TextStream(["x"])
    stream.push("ax")

    assert (stream.push("more"), stream.flush()) == ("", "")


def expected(text: str, stop: list[str]) -> str:
    """Slow twin: look for a stop string after every character."""
    for end in range(len(text) + 1):
        starts = [end - len(word) for word in stop if text[:end].endswith(word)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_the_result_does_not_depend_on_the_pieces(pieces: list[str], stop: list[str]) -> None:
    shown, _ = run(pieces, stop)

    assert "".join(shown) == expected("".join(pieces), stop)


def test_a_stop_string_may_be_shown_and_is_told() -> None:
    stream = TextStream(["STOP", "ST!"], shows_stop=True)

    assert [stream.push("abST"), stream.push("OPcd"), stream.flush()] == ["ab", "STOP", ""]
    assert stream.matched == "STOP"


def test_stop_strings_do_not_count_in_unchecked_text() -> None:
    stream = TextStream(["ab"])

    shown = [stream.push_unchecked("xab"), stream.push_unchecked("a"), stream.push("b ab")]
    assert shown == ["xab", "a", "b "]
    assert stream.stopped
