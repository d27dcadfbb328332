"""Answers and chunks as OpenAI words them."""

from __future__ import annotations

import json
from typing import Any

from roost_engine.logprobs_json import ShownToken
from roost_engine.responses import DONE, Answer, Choice, Piece, Usage
from roost_engine.tool_parser import ToolDelta

USAGE = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=4)
TOKENS = [
    ShownToken(b"Hi", -0.5, [(b"Hi", -0.5), (b"\xf0\x9f", -1.0)], 0),
    ShownToken(b"\xf0\x9f", float("-inf"), [], 2),
]


def answer(endpoint: Any, **options: Any) -> Answer:
    return Answer(endpoint=endpoint, id="x", model="m", created=1, call_id="c", **options)


def choice(*pieces: Piece) -> Choice:
    together = Choice()
    for piece in pieces:
        together.add(piece)
    return together


def event(data: bytes) -> dict[str, Any]:
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    decoded: dict[str, Any] = json.loads(data[6:])
    return decoded


def test_a_whole_chat_answer() -> None:
    spoken = choice(Piece("H"), Piece("i", finish_reason="stop", stop_reason="END"))
    body = json.loads(answer("chat").whole([spoken], USAGE))

    assert (body["object"], body["id"], body["created"]) == ("chat.completion", "x", 1)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": "END",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_whole_completions_with_several_choices() -> None:
    body = json.loads(answer("completion").whole([choice(Piece("a")), choice(Piece("b"))], USAGE))

    assert body["object"] == "text_completion"
    assert [(each["index"], each["text"]) for each in body["choices"]] == [(0, "a"), (1, "b")]


def test_tool_calls_of_a_whole_answer() -> None:
    called = choice(
        Piece("", [ToolDelta(0, "f", '{"x"')]),
        Piece("", [ToolDelta(0, None, ":1}"), ToolDelta(1, "g", "{}")]),
        Piece(finish_reason="tool_calls"),
    )
    [first] = json.loads(answer("chat").whole([called], USAGE))["choices"]
    calls = first["message"]["tool_calls"]

    assert first["message"]["content"] is None
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": '{"x":1}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert {call["type"] for call in calls} == {"function"}
    assert len({call["id"] for call in calls}) == 2


def test_chunks_of_a_chat() -> None:
    built = answer("chat", num_choices=2)

    roles = built.head_event(USAGE).split(b"\n\n")[:-1]
    text = event(built.piece_event(1, Piece("Hi"), USAGE))
    end = event(built.piece_event(1, Piece(finish_reason="stop"), USAGE))

    assert [event(role + b"\n\n")["choices"][0]["index"] for role in roles] == [0, 1]
    assert event(roles[0] + b"\n\n")["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (text["choices"][0]["delta"], text["choices"][0]["index"]) == ({"content": "Hi"}, 1)
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
    assert "usage" not in text
    assert (built.piece_event(0, Piece(), USAGE), built.usage_event(USAGE)) == (b"", b"")
    assert DONE == b"data: [DONE]\n\n"


def test_chunks_of_a_tool_call() -> None:
    built = answer("chat")

    first = event(built.piece_event(0, Piece("", [ToolDelta(0, "f", "")]), USAGE))
    more = event(built.piece_event(0, Piece("", [ToolDelta(0, None, "{}")]), USAGE))

    [begun] = first["choices"][0]["delta"]["tool_calls"]
    assert (begun["index"], begun["type"]) == (0, "function")
    assert begun["function"] == {"name": "f", "arguments": ""}
    assert begun["id"].startswith("call_")
    assert more["choices"][0]["delta"] == {
        "tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]
    }


def test_chunks_of_a_completion_with_usage() -> None:
    built = answer("completion", include_usage=True)

    assert built.head_event(USAGE) == b""
    assert event(built.piece_event(0, Piece("Hi"), USAGE))["choices"][0]["text"] == "Hi"
    assert event(built.piece_event(0, Piece("Hi"), USAGE))["usage"] is None
    last = event(built.usage_event(USAGE))
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 8)


def test_continuous_usage_is_in_every_chunk() -> None:
    built = answer("completion", include_usage=True, continuous_usage=True)

    assert event(built.piece_event(0, Piece("Hi"), USAGE))["usage"]["completion_tokens"] == 3


def test_log_probabilities_of_a_chat() -> None:
    chunk = event(answer("chat").piece_event(0, Piece("Hi", tokens=TOKENS), USAGE))

    assert chunk["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.5,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
                    {"token": "\\xf0\\x9f", "logprob": -1.0, "bytes": [240, 159]},
                ],
            },
            {"token": "\\xf0\\x9f", "logprob": -9999.0, "bytes": [240, 159], "top_logprobs": []},
        ],
        "refusal": None,
    }


def test_log_probabilities_of_a_completion() -> None:
    spoken = choice(Piece("Hi", tokens=TOKENS))
    [only] = json.loads(answer("completion").whole([spoken], USAGE))["choices"]

    assert only["logprobs"] == {
        "text_offset": [0, 2],
        "token_logprobs": [-0.5, -9999.0],
        "tokens": ["Hi", "bytes:\\xf0\\x9f"],
        "top_logprobs": [
            {"Hi": -0.5, "bytes:\\xf0\\x9f": -1.0},
            {"bytes:\\xf0\\x9f": -9999.0},
        ],
    }
