"""The judge of every fault test: what it must call lost, and what whole."""

from __future__ import annotations

import json

import pytest

from roost_loadtest.fault_answer import Answer, Ending, Expected, Verdict

WANTED = Expected("one two", "stop", completion_tokens=2, prompt_tokens=5)


def event(delta: dict | None = None, *, finish: str | None = None, **fields) -> bytes:
    chunk = {"id": "a", "choices": [{"delta": delta or {}, "finish_reason": finish}]} | fields
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


ROLE = event({"role": "assistant", "content": ""})
ONE, TWO = event({"content": "one"}), event({"content": " two"})
FINISH = event(finish="stop")


def usage(prompt: int, completion: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


USAGE = usage(5, 2)
ERROR = b'data: {"error":{"message":"lost","code":"upstream_lost"}}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = [ROLE, ONE, TWO, FINISH, USAGE, DONE]


def judge(
    parts: list[bytes], ending: Ending = Ending.COMPLETE, status: int = 200
) -> tuple[Verdict, str]:
    answer = Answer()
    answer.status = status
    for part in parts:
        answer.feed(part, 0.0)
    return answer.judge(ending, WANTED)


def test_a_whole_answer_is_whole_however_it_is_cut_into_reads():
    data = b": a comment\n\n" + b"".join(WHOLE)
    for at in range(len(data)):
        assert judge([data[:at], data[at:]]) == (Verdict.OK, "")


def test_a_client_with_everything_does_not_care_how_the_connection_ends():
    assert judge(WHOLE, Ending.BROKEN)[0] is Verdict.OK


@pytest.mark.parametrize(
    ("parts", "ending", "verdict"),
    [
        ([ROLE, ONE], Ending.BROKEN, Verdict.CUT),
        ([ROLE, ONE, TWO, FINISH, USAGE], Ending.BROKEN, Verdict.CUT),
        ([ROLE, ONE], Ending.COMPLETE, Verdict.SILENT),
        ([ROLE, ONE, DONE], Ending.COMPLETE, Verdict.SILENT),
        ([ROLE, ONE, TWO, FINISH, USAGE], Ending.COMPLETE, Verdict.SILENT),
        ([ROLE, ONE, ERROR], Ending.BROKEN, Verdict.ERROR),
        ([ROLE, ONE, ERROR, DONE], Ending.COMPLETE, Verdict.ERROR_DONE),
        ([ROLE, ONE], Ending.SILENCE, Verdict.HANG),
        ([], Ending.SILENCE, Verdict.HANG),
        ([], Ending.REFUSED, Verdict.REFUSED),
        ([ROLE], Ending.LEFT, Verdict.LEFT),
    ],
)
def test_every_way_to_lose_an_answer_has_its_name(parts, ending, verdict):
    assert judge(parts, ending)[0] is verdict


def test_an_error_status_is_told_as_such():
    assert judge([b'{"error":{}}'], status=503) == (Verdict.STATUS, "503")


@pytest.mark.parametrize(
    ("parts", "flaw"),
    [
        ([ROLE, ONE, FINISH, USAGE, DONE], "text differs at 3"),
        ([ROLE, ONE, TWO, TWO, FINISH, USAGE, DONE], "text differs at 7"),
        ([ROLE, ONE, ROLE, TWO, FINISH, USAGE, DONE], "roles: 2"),
        ([ONE, TWO, FINISH, USAGE, DONE], "roles: 0"),
        ([ROLE, ONE, event({"content": " two"}, id="b"), FINISH, USAGE, DONE], "ids: 2"),
        ([ROLE, ONE, TWO, FINISH, FINISH, USAGE, DONE], "finish reasons"),
        ([ROLE, ONE, TWO, event(finish="length"), USAGE, DONE], "finish reasons"),
        ([ROLE, ONE, TWO, FINISH, DONE], "usages: 0"),
        ([ROLE, ONE, TWO, FINISH, USAGE, USAGE, DONE], "usages: 2"),
        ([ROLE, ONE, TWO, FINISH, USAGE, DONE, DONE], "[DONE]s: 2"),
        ([ROLE, ONE, TWO, FINISH, USAGE, DONE, USAGE], "events after [DONE]: 1"),
        ([ROLE, ONE, b"data: {\n\n", TWO, FINISH, USAGE, DONE], "unreadable events"),
        (
            [
                *WHOLE[:4],
                event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 1}),
                DONE,
            ],
            "completion tokens: 1",
        ),
        (
            [
                *WHOLE[:4],
                event(choices=[], usage={"prompt_tokens": 6, "completion_tokens": 2}),
                DONE,
            ],
            "prompt tokens: 6",
        ),
    ],
)
def test_an_answer_that_only_looks_whole_is_wrong(parts, flaw):
    verdict, detail = judge(parts)

    assert verdict is Verdict.WRONG
    assert flaw in detail
