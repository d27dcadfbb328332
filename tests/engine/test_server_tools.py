"""Tool calls over real sockets through the openai SDK; SmolLM2's template knows no tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import Replica, served_replica

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with served_replica() as served:
        yield served


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


def check_arguments(name: str, text: str) -> None:
    arguments = json.loads(text)
    if name == "get_weather":
        assert arguments.keys() == {"city", "unit"}
        assert arguments["unit"] in ("celsius", "fahrenheit")
        assert len(arguments["city"]) <= 20
    else:
        assert name == "get_time"
        assert arguments in ({"zone": "UTC"}, {"zone": "CET"})


def test_required_always_calls_with_arguments_that_fit(replica: Replica) -> None:
    for seed in range(4):
        [choice] = replica.chat(
            "What is the weather in Oslo?",
            tools=[WEATHER, TIME],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1.2,
            seed=seed,
            max_tokens=200,
        ).choices

        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls
        assert call.type == "function"
        check_arguments(call.function.name, call.function.arguments)


def test_a_named_function_is_the_one_that_is_called(replica: Replica) -> None:
    [choice] = replica.chat(
        "What is the weather in Oslo?",
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "get_time"}},
        max_tokens=100,
    ).choices

    assert choice.finish_reason == "stop"  # as OpenAI says for a function the client named
    [call] = choice.message.tool_calls
    check_arguments("get_time", call.function.arguments)
    assert call.function.name == "get_time"


def test_a_streamed_call_is_the_whole_one_in_deltas(replica: Replica) -> None:
    asked: Any = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300, "n": 2}
    asked |= {"temperature": 1, "seed": 3, "parallel_tool_calls": False}
    whole = replica.chat("Weather in Rome, please.", **asked)
    calls: list[dict[str, str]] = [{}, {}]
    num_deltas = 0
    for chunk in replica.chat("Weather in Rome, please.", stream=True, **asked):
        for choice in chunk.choices:
            assert not choice.delta.content
            for delta in choice.delta.tool_calls or []:
                assert delta.index == 0
                call = calls[choice.index]
                num_deltas += 1
                if delta.id:
                    call |= {"id": delta.id, "name": delta.function.name, "arguments": ""}
                call["arguments"] += delta.function.arguments or ""

    assert num_deltas > 6  # arguments come as they are written
    for choice, call in zip(whole.choices, calls, strict=True):
        [expected] = choice.message.tool_calls
        assert call["name"] == expected.function.name
        assert call["arguments"] == expected.function.arguments
    assert calls[0]["id"] != calls[1]["id"]


def test_auto_answers_or_calls_but_never_mixes_them_up(replica: Replica) -> None:
    """A model of this size does either; what it does is passed on without loss."""
    for seed in range(3):
        [choice] = replica.chat(
            "What is the weather in Oslo?",
            tools=[WEATHER],
            temperature=0.7,
            seed=seed,
            max_tokens=100,
        ).choices

        if choice.message.tool_calls:
            assert {call.function.name for call in choice.message.tool_calls} == {"get_weather"}
        else:
            assert choice.message.content
        assert choice.finish_reason in ("stop", "tool_calls", "length")


def test_a_conversation_with_calls_and_results_goes_on(replica: Replica) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages: Any = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "Half past ten."},
    ]
    answer = replica.sdk.chat.completions.create(
        model="smol", messages=messages, tools=[TIME], max_tokens=20, temperature=0
    )
    without = replica.sdk.chat.completions.create(
        model="smol", messages=messages[:1], max_tokens=1, temperature=0
    )

    assert answer.usage is not None
    assert without.usage is not None
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens + 100  # the tools are shown
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_tools_that_cannot_be_enforced_are_refused(replica: Replica) -> None:
    import openai

    function = {"name": "f", "strict": True, "parameters": {"type": "object", "foo$": {}}}
    function["parameters"] = {"type": "object", "properties": {"a": {"type": "strnig"}}}
    with pytest.raises(openai.BadRequestError, match="strnig") as refused:
        replica.chat("Hi", tools=[{"type": "function", "function": function}])

    assert refused.value.param == "tools"
