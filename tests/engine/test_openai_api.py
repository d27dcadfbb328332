"""Parsing of request bodies: what is accepted, and a large table of what is refused, and how."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_engine.openai_api import (
    IGNORED,
    NEUTRAL_VALUES,
    ApiError,
    ApiRequest,
    Chat,
    Message,
    TextPrompt,
    TokenPrompt,
    check_context,
    parse_chat,
    parse_completion,
)
from roost_engine.responses import DONE, Answer, Usage

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ApiRequest:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO} | fields).encode())


def completion(**fields: Any) -> ApiRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hello"} | fields).encode())


def test_defaults_are_those_of_openai() -> None:
    asked = chat()

    assert asked.prompt == Chat([Message("user", "Hello")])
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed) == (1.0, 1.0, 0, None)
    assert (asked.max_tokens, asked.stop, asked.stream) == (None, (), False)
    assert completion().max_tokens is None


def test_everything_that_is_implemented_arrives() -> None:
    asked = chat(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=40,
        seed=-5,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        ignore_eos=True,
    )

    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.top_k) == (7, 0.0, 0.5, 40)
    assert (asked.seed, asked.stop, asked.ignore_eos) == (-5, ("a", "b"), True)
    assert (asked.stream, asked.include_usage) == (True, True)


def test_null_means_not_given() -> None:
    names = ["max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"]

    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_parameters_change_nothing(name: str) -> None:
    assert chat(**{name: "anything"}) == chat()


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_neutral_values_change_nothing_and_others_are_refused(name: str) -> None:
    for value in [None, *NEUTRAL_VALUES[name]]:
        assert chat(**{name: value}) == chat()

    with pytest.raises(ApiError) as refused:
        chat(**{name: ["something", "else"]})
    assert refused.value.status == 400
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
    assert name in refused.value.message


def test_content_parts_and_developers_are_understood() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]

    expected = Chat(
        [Message("system", "Be brief."), Message("user", "a\nb"), Message("assistant", "")]
    )
    assert chat(messages=messages).prompt == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", TextPrompt("a")),
        (["a"], TextPrompt("a")),
        ([1, 2], TokenPrompt([1, 2])),
        ([[1, 2]], TokenPrompt([1, 2])),
    ],
)
def test_forms_of_a_prompt(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompt == expected


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": "x"}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 2**80}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": True}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"model": 3}, "model"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_VALUES, ids=str)
def test_bad_values_are_named(fields: dict[str, Any], param: str) -> None:
    for parse in (chat, completion):
        with pytest.raises(ApiError) as refused:
            parse(**fields)

        assert refused.value.status == 400
        assert (refused.value.param, refused.value.code) == (param, "invalid_value")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hi", "messages"),
        ({}, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "wizard", "content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": 1, "content": "a"}], "messages[0].role"),
        (
            [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}],
            "messages[1].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "a", "colour": "red"}], "messages[0]"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
    ids=str,
)
def test_bad_messages_are_located(messages: object, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(messages=messages)

    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "invalid_value"),
        ([], "invalid_value"),
        ([""], "invalid_value"),
        ([[]], "invalid_value"),
        (None, "invalid_value"),
        (3, "invalid_value"),
        (True, "invalid_value"),
        ({"text": "a"}, "invalid_value"),
        ([1, "a"], "invalid_value"),
        ([1.5], "invalid_value"),
        ([-1], "invalid_value"),
        ([2**40], "invalid_value"),
        ([[1], 2], "unsupported_parameter"),
        ([["a"]], "invalid_value"),
        (["a", "b"], "unsupported_parameter"),
        ([[1], [2]], "unsupported_parameter"),
    ],
    ids=str,
)
def test_bad_prompts(prompt: object, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        completion(prompt=prompt)

    assert (refused.value.status, refused.value.param, refused.value.code) == (400, "prompt", code)


@pytest.mark.parametrize("name", ["messages", "model"])
def test_missing_parameters_are_named(name: str) -> None:
    body = {"model": "m", "messages": HELLO}
    del body[name]

    with pytest.raises(ApiError) as refused:
        parse_chat(json.dumps(body).encode())

    assert (refused.value.param, refused.value.code) == (name, "missing_parameter")


def test_a_misspelt_parameter_is_not_ignored() -> None:
    with pytest.raises(ApiError) as refused:
        chat(max_token=5)

    assert (refused.value.param, refused.value.code) == ("max_token", "unknown_parameter")


def test_false_is_not_zero_and_one_is_not_true() -> None:
    for fields in ({"presence_penalty": False}, {"n": True}, {"logprobs": 0}, {"echo": 0}):
        with pytest.raises(ApiError):
            chat(**fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"model":"m",}',
        b'{"model":"m","temperature":NaN}',
        b'{"model":"m","temperature":1e999}',
        b'{"model":"\\ud800","messages":[]}',
        b'{"model":"m","messages":[{"role":"user","content":"\\udc00 alone"}]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bad_json_is_refused(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(ApiError) as refused:
            parse(body)

        assert (refused.value.status, refused.value.code) == (400, "invalid_json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.sampled_from(
    ["model", "messages", "prompt", "stop", "seed", "stream_options", "n", "top_p", "tools"]
)


@given(fields=st.dictionaries(names | st.text(max_size=4), json_values))
def test_any_object_is_a_request_or_an_api_error(fields: dict[str, Any]) -> None:
    body = msgspec.json.encode({"model": "m", "messages": HELLO, "prompt": "a"} | fields)
    for parse in (parse_chat, parse_completion):
        error = refusal(parse, body)
        if error is not None:
            assert error.status == 400
            assert json.loads(error.body())["error"]["message"]


def refusal(parse: Callable[[bytes], ApiRequest], body: bytes) -> ApiError | None:
    try:
        parse(body)
    except ApiError as error:
        return error
    return None


@given(body=st.binary(max_size=60))
def test_any_bytes_are_a_request_or_an_api_error(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(ApiError):
            parse(body)


@pytest.mark.parametrize(
    ("ask", "num_prompt_tokens", "max_tokens", "expected"),
    [
        (chat, 10, None, 90),
        (chat, 99, None, 1),
        (chat, 10, 90, 90),
        (chat, 10, 5, 5),
        (completion, 10, None, 16),
        (completion, 90, None, 10),
        (completion, 99, None, 1),
        (completion, 10, 90, 90),
    ],
)
def test_max_tokens_within_the_context(
    ask: Callable[..., ApiRequest], num_prompt_tokens: int, max_tokens: int | None, expected: int
) -> None:
    assert check_context(ask(max_tokens=max_tokens), num_prompt_tokens, 100) == expected


@pytest.mark.parametrize(
    ("ask", "num_prompt_tokens", "max_tokens", "param"),
    [
        (chat, 100, None, "messages"),
        (chat, 250, 3, "messages"),
        (chat, 10, 91, "max_tokens"),
        (completion, 100, None, "prompt"),
        (completion, 250, 3, "prompt"),
        (completion, 10, 91, "max_tokens"),
    ],
)
def test_what_exceeds_the_context_is_told_with_both_numbers(
    ask: Callable[..., ApiRequest], num_prompt_tokens: int, max_tokens: int | None, param: str
) -> None:
    with pytest.raises(ApiError) as refused:
        check_context(ask(max_tokens=max_tokens), num_prompt_tokens, 100)

    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert refused.value.param == param
    assert "100 tokens" in refused.value.message
    assert f"{num_prompt_tokens} in the prompt" in refused.value.message


def test_a_bound_is_told_as_a_bound() -> None:
    with pytest.raises(ApiError, match="at least 251 tokens") as refused:
        check_context(completion(), 250, 100, is_exact=False)

    assert refused.value.code == "context_length_exceeded"


def test_errors_have_openais_four_fields() -> None:
    error = ApiError(404, "no", param="model", code="model_not_found")

    assert json.loads(error.body()) == {
        "error": {
            "message": "no",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


# -- answers ------------------------------------------------------------------------------


def answer(endpoint: Any, *, include_usage: bool = False) -> Answer:
    return Answer(endpoint=endpoint, id="x", model="m", created=1, include_usage=include_usage)


def event(data: bytes) -> dict[str, Any]:
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    decoded: dict[str, Any] = json.loads(data[6:])
    return decoded


USAGE = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=4)


def test_a_whole_chat_answer() -> None:
    body = json.loads(answer("chat").whole("Hi", "stop", USAGE))

    assert (body["object"], body["id"], body["created"]) == ("chat.completion", "x", 1)
    assert body["choices"][0]["message"]["content"] == "Hi"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_a_whole_completion() -> None:
    body = json.loads(answer("completion").whole("Hi", "length", USAGE))

    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "Hi")


def test_chunks_of_a_chat() -> None:
    built = answer("chat")

    role, text, end = (
        event(built.head_event()),
        event(built.text_event("Hi")),
        event(built.finish_event("stop")),
    )

    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text["choices"][0]["delta"] == {"content": "Hi"}
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
    assert "usage" not in text
    assert (built.text_event(""), built.usage_event(USAGE)) == (b"", b"")
    assert DONE == b"data: [DONE]\n\n"


def test_chunks_of_a_completion_with_usage() -> None:
    built = answer("completion", include_usage=True)

    assert built.head_event() == b""
    assert event(built.text_event("Hi"))["choices"][0]["text"] == "Hi"
    assert event(built.text_event("Hi"))["usage"] is None
    last = event(built.usage_event(USAGE))
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 8)
