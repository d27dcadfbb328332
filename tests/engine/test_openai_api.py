"""Parsing of request bodies: what is accepted, and a large table of what is refused, and how."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_engine.api_body import IGNORED, NEUTRAL_VALUES
from roost_engine.api_errors import ApiError
from roost_engine.chat_api import Chat, ChatFields, Message, ToolUse
from roost_engine.openai_api import (
    ApiRequest,
    TextPrompt,
    TokenPrompt,
    check_context,
    parse_chat,
    parse_completion,
)

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
BAD_ARGUMENTS = {"name": "f", "arguments": "[1]"}
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ApiRequest:
    return parse_chat(json.dumps({"model": "m", "messages": HELLO} | fields).encode())


def completion(**fields: Any) -> ApiRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hello"} | fields).encode())


def test_defaults_are_those_of_openai() -> None:
    asked = chat()
    sampling = asked.sampling

    assert asked.prompts == [Chat([Message("user", "Hello")])]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.min_p, sampling.min_tokens, sampling.logit_bias) == (0.0, 0, {})
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    assert (*penalties, sampling.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (sampling.stop, sampling.stop_token_ids, sampling.logprobs) == ((), frozenset(), None)
    assert sampling.skip_special_tokens
    assert not sampling.include_stop_in_output
    assert (asked.max_tokens, asked.seed, asked.n, asked.stream) == (None, None, 1, False)
    assert (asked.grammar, asked.tool_use, asked.priority) == (None, None, 0)
    assert completion().max_tokens is None


def test_everything_that_is_implemented_arrives() -> None:
    asked = chat(
        max_completion_tokens=7,
        min_tokens=3,
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        presence_penalty=-1.5,
        frequency_penalty=2,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "17": 2.5},
        seed=-5,
        stop=["a", "b"],
        stop_token_ids=[7, 8],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=True,
        top_logprobs=20,
        n=16,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        ignore_eos=True,
        priority=-3,
        chat_template_kwargs={"enable_thinking": False},
    )
    sampling = asked.sampling

    assert (asked.max_tokens, asked.seed, asked.n, asked.priority) == (7, -5, 16, -3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 40)
    assert (sampling.min_p, sampling.min_tokens) == (0.1, 3)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    assert (*penalties, sampling.repetition_penalty) == (-1.5, 2.0, 1.1)
    assert sampling.logit_bias == {5: -100.0, 17: 2.5}
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "b"), {7, 8})
    assert (sampling.include_stop_in_output, sampling.skip_special_tokens) == (True, False)
    assert (sampling.ignore_eos, sampling.logprobs) == (True, 20)
    assert (asked.stream, asked.include_usage, asked.continuous_usage) == (True, True, True)
    assert asked.prompts[0].template_variables == {"enable_thinking": False}  # type: ignore[union-attr]


def test_null_means_not_given() -> None:
    names = ["max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"]
    names += ["n", "logprobs", "logit_bias", "min_p", "response_format", "guided_json", "priority"]

    assert chat(**dict.fromkeys([*names, "tools", "tool_choice"])) == chat()
    assert completion(**dict.fromkeys(names)) == completion()


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_parameters_change_nothing(name: str) -> None:
    assert chat(**{name: "anything"}) == chat()


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_neutral_values_change_nothing_and_others_are_refused(name: str) -> None:
    chats_have_it = name in {*ChatFields.__struct_fields__, "top_logprobs"}
    for ask in [completion] if chats_have_it else [completion, chat]:
        for value in [None, *NEUTRAL_VALUES[name]]:
            assert ask(**{name: value}) == ask()

        with pytest.raises(ApiError) as refused:
            ask(**{name: ["something", "else"]})
        assert refused.value.status == 400
        assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
        assert name in refused.value.message


def test_logprobs_are_a_switch_in_a_chat_and_a_number_in_a_completion() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=False, top_logprobs=0).sampling.logprobs is None
    assert completion(logprobs=0).sampling.logprobs == 0
    assert completion(logprobs=20).sampling.logprobs == 20


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
    assert chat(messages=messages).prompts == [expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TextPrompt("a")]),
        (["a"], [TextPrompt("a")]),
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([1, 2], [TokenPrompt([1, 2])]),
        ([[1, 2]], [TokenPrompt([1, 2])]),
        ([[1], [2]], [TokenPrompt([1]), TokenPrompt([2])]),
    ],
)
def test_forms_of_a_prompt(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompts == expected


def test_choices_are_counted_over_prompts_and_limited() -> None:
    assert completion(prompt=["a", "b"], n=3).num_choices == 6
    assert completion(prompt=["a"] * 128).num_choices == 128
    assert completion(prompt=["a"] * 8, n=16).num_choices == 128
    for prompts, n in [(129, 1), (9, 16)]:
        with pytest.raises(ApiError, match="128 at most") as refused:
            completion(prompt=["a"] * prompts, n=n)
        assert refused.value.param == "prompt"


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
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"5": 100.5}}, "logit_bias[...]"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"priority": 1.5}, "priority"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": 1}},
        "stream_options.continuous_usage_stats",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[]"}, "guided_json"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [""]}, "guided_choice[0]"),
    ({"guided_grammar": 3}, "guided_grammar"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    ({"guided_regex": "a" * (64 * 1024 + 1)}, "guided_regex"),
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
        ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
        ([{"role": 1, "content": "a"}], "messages[0].role"),
        (
            [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}],
            "messages[1].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "a", "colour": "red"}], "messages[0]"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a", "tool_call_id": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "x"}], "messages[0].content"),
        (
            [{"role": "assistant", "tool_calls": [CALL | {"function": BAD_ARGUMENTS}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
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
        ([[1], 2], "invalid_value"),
        (["a", [1]], "invalid_value"),
        (["a", ""], "invalid_value"),
        ([["a"]], "invalid_value"),
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
    [
        "model",
        "messages",
        "prompt",
        "stop",
        "seed",
        "stream_options",
        "n",
        "top_p",
        "tools",
        "logprobs",
        "logit_bias",
        "response_format",
        "guided_json",
        "tool_choice",
    ]
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


# -- constraints and tools ----------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            SCHEMA,
        ),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structured_outputs": {"grammar": "start: A"}}, "grammar", "start: A"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type":"object"}'),
    ],
    ids=lambda value: str(value)[:50],
)
def test_one_constraint_under_many_names(fields: dict[str, Any], kind: str, text: Any) -> None:
    for ask in (chat, completion):
        grammar = ask(**fields).grammar

        assert grammar is not None
        assert grammar.kind == kind
        assert (json.loads(grammar.text) if isinstance(text, dict) else grammar.text) == text


def test_response_format_text_is_no_constraint() -> None:
    assert chat(response_format={"type": "text"}).grammar is None
    assert chat(guided_regex="a" * 64 * 1024).grammar is not None


@pytest.mark.parametrize("missing", ["json_schema", "json_schema.schema"])
def test_a_schema_that_is_not_there_is_missed(missing: str) -> None:
    given = {} if missing == "json_schema" else {"json_schema": {"name": "n"}}

    with pytest.raises(ApiError) as refused:
        chat(response_format={"type": "json_schema"} | given)

    assert refused.value.param == f"response_format.{missing}"


def use_of(**fields: Any) -> ToolUse:
    use = chat(**fields).tool_use
    assert use is not None
    return use


def test_tools_arrive_and_are_shown_to_the_template() -> None:
    asked = chat(tools=[TOOL])

    assert asked.prompts[0].tools == [TOOL]  # type: ignore[union-attr]
    use = use_of(tools=[TOOL])
    assert (use.choice, use.is_parallel, [tool.name for tool in use.tools]) == ("auto", True, ["f"])
    assert use_of(tools=[TOOL], tool_choice="required").choice == "required"
    assert not use_of(tools=[TOOL], parallel_tool_calls=False).is_parallel


def test_a_named_function_leaves_only_that_one() -> None:
    other = {"type": "function", "function": {"name": "g"}}
    named = {"type": "function", "function": {"name": "g"}}

    use = use_of(tools=[TOOL, other], tool_choice=named)

    assert (use.choice, use.is_parallel, [tool.name for tool in use.tools]) == (
        "named",
        False,
        ["g"],
    )


def test_tool_choice_none_leaves_the_tools_out() -> None:
    assert chat(tools=[TOOL], tool_choice="none") == chat()
    assert chat(tools=[]) == chat(tool_choice="auto") == chat(tool_choice="none") == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "h"}}},
            "tool_choice",
        ),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_tools_and_combinations_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)

    assert (refused.value.status, refused.value.param) == (400, param)


def test_calls_and_results_of_earlier_turns_become_what_templates_want() -> None:
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]

    called, result = chat(messages=messages).prompts[0].messages[1:]  # type: ignore[union-attr]

    assert called.tool_calls == [CALL | {"function": {"name": "f", "arguments": {"x": 1}}}]
    assert (result.role, result.tool_call_id, result.content) == ("tool", "c", "42")
    assert msgspec.to_builtins(result).keys() == {"role", "content", "tool_call_id"}
