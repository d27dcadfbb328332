"""Tool calls: found in text however it is cut, and what asks a model for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from roost_engine.chat_api import Message, Tool, ToolUse
from roost_engine.tool_calls import (
    ToolFormat,
    explain_tools,
    tool_format,
    tool_grammar,
)
from roost_engine.tool_parser import tool_parser

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def tool(name: str, *, is_strict: bool = False) -> Tool:
    return Tool(name, "It does.", SCHEMA, is_strict)


def use(choice: Any = "auto", *, is_parallel: bool = True, is_strict: bool = False) -> ToolUse:
    tools = [tool("weather", is_strict=is_strict), tool("time", is_strict=is_strict)]
    return ToolUse(tools, choice, is_parallel)


def read(style: ToolFormat, pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls; also checks what every delta must hold."""
    parser = tool_parser(style, use(**options))
    parsed = [*(parser.push(piece) for piece in pieces), parser.flush()]
    content = "".join(each.content for each in parsed)
    calls: list[list[str]] = []
    for delta in (delta for each in parsed for delta in each.deltas):
        if delta.name is not None:
            calls.append([delta.name, ""])
        assert delta.index == len(calls) - 1
        calls[-1][1] += delta.arguments
    return content, [(name, arguments) for name, arguments in calls]


def called(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


OSLO = '{"city": "Oslo"}'
TRICKY = '{"city": "}{\\"]</tool_call", "deep": [{"a": {}}, "\\\\"]}'

HERMES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Just text.", "Just text.", []),
    (f"<tool_call>\n{called('weather', OSLO)}\n</tool_call>", "", [("weather", OSLO)]),
    (f"<tool_call>{called('weather', OSLO)}</tool_call>", "", [("weather", OSLO)]),
    (
        (
            f"Let me see.\n<tool_call>\n{called('weather', OSLO)}\n</tool_call>\n"
            f"<tool_call>\n{called('time', '{}')}\n</tool_call>\n"
        ),
        "Let me see.",
        [("weather", OSLO), ("time", "{}")],
    ),
    (f"<tool_call>\n{called('time', TRICKY)}\n</tool_call>", "", [("time", TRICKY)]),
    # Members in another order; Llama's key.
    (
        '<tool_call>{"arguments": {"city":"Oslo"}, "name": "time"}</tool_call>',
        "",
        [("time", '{"city":"Oslo"}')],
    ),
    (f"<tool_call>{called('time', '{}', 'parameters')}</tool_call>", "", [("time", "{}")]),
    # Cut off: what is there is told.
    (f"<tool_call>\n{called('time', OSLO)[:-6]}", "", [("time", OSLO[:-5])]),
    # The closing tag is missing.
    (f"<tool_call>\n{called('time', OSLO)}", "", [("time", OSLO)]),
    # No calls: nothing is lost.
    ("<tool_call>\nsoon</tool_call>", "<tool_call>\nsoon</tool_call>", []),
    (
        f"<tool_call>{called('rob_a_bank', OSLO)}</tool_call>",
        f"<tool_call>{called('rob_a_bank', OSLO)}</tool_call>",
        [],
    ),
    ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ("<tool_call>{", "<tool_call>{", []),
    ("a <tool_cal b", "a <tool_cal b", []),
    ("a <tool_cal", "a <tool_cal", []),
    ("a \n", "a \n", []),
    ("a\n<tool_call>x</tool_call> b", "a\n<tool_call>x</tool_call> b", []),
]
LLAMA3: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Just text.", "Just text.", []),
    ('It is {"name": "time"}.', 'It is {"name": "time"}.', []),
    (called("weather", OSLO, "parameters"), "", [("weather", OSLO)]),
    (f" <|python_tag|>{called('time', '{}', 'parameters')}", "", [("time", "{}")]),
    (
        f"{called('weather', TRICKY, 'parameters')}; {called('time', '{}', 'parameters')}",
        "",
        [("weather", TRICKY), ("time", "{}")],
    ),
    ('{"parameters": {"city":"Oslo"}, "name": "time"}', "", [("time", '{"city":"Oslo"}')]),
    (called("time", OSLO, "parameters")[:-6], "", [("time", OSLO[:-5])]),
    ('{"answer": 42}', '{"answer": 42}', []),
    ("<|pyth", "<|pyth", []),
    ("", "", []),
]
CASES = [("hermes", *case) for case in HERMES] + [("llama3", *case) for case in LLAMA3]


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_calls_in_a_whole_text(style: Any, text: str, content: str, calls: Any) -> None:
    found, found_calls = read(style, [text])

    assert found_calls == calls
    assert found == content


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_every_cut_and_every_character_gives_the_same(
    style: Any, text: str, content: str, calls: Any
) -> None:
    whole = read(style, [text])

    assert read(style, list(text)) == whole
    for cut in range(len(text)):
        assert read(style, [text[:cut], text[cut:]]) == whole


@given(
    text=st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                called("time", OSLO),
                "{",
                "}",
                '"',
                " ",
                "\n",
                "x",
                ";",
            ]
        ),
        max_size=10,
    ),
    style=st.sampled_from(["hermes", "llama3"]),
)
@example(text=[called("time", OSLO), " ", "<tool_call>"], style="llama3")
@example(text=[called("time", OSLO), ";", " ", "x"], style="llama3")
def test_any_text_is_read_alike_in_pieces_and_whole(text: list[str], style: Any) -> None:
    assert read(style, text) == read(style, ["".join(text)])


def test_arguments_come_as_they_are_written() -> None:
    parser = tool_parser("hermes", use())
    parser.push('<tool_call>\n{"name": "time", "arguments": {"city"')
    delta = parser.push(': "Os').deltas

    assert [each.arguments for each in delta] == [': "Os']


@pytest.mark.parametrize(
    ("style", "key"), [("hermes", "arguments"), ("llama3", "parameters")], ids=str
)
def test_one_call_is_enough_where_calls_are_not_parallel(style: Any, key: str) -> None:
    one = called("time", OSLO, key)
    text = f"{one}; {one}"
    if style == "hermes":
        text = f"<tool_call>{one}</tool_call>\n<tool_call>{one}</tool_call>"
    parser = tool_parser(style, use(is_parallel=False))
    for character in text:
        parser.push(character)
        if parser.is_done:
            break

    assert parser.is_done
    assert read(style, [text], is_parallel=False) == ("", [("time", OSLO)])
    assert not tool_parser(style, use()).is_done


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ messages }}", "hermes"),
        ("<tool_call> {{ tools }}", "hermes"),
        ("<|python_tag|> {{ tools }}", "llama3"),
        ("Environment: ipython {{ tools }}", "llama3"),
        ("<tool_call> <|python_tag|>", "hermes"),
    ],
)
def test_the_template_tells_the_format(template: str, style: str) -> None:
    assert tool_format(template) == style


def test_tools_are_explained_to_a_model_whose_template_knows_none() -> None:
    shown = tool("weather").as_json()
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"a": 1}}}
    messages = [
        Message("user", "Hi"),
        Message("assistant", "Well.", tool_calls=[call]),
        Message("tool", "rain", tool_call_id="c"),
    ]

    system, user, assistant, result = explain_tools(messages, [shown])

    assert system.role == "system"
    assert json.dumps(shown) in system.content
    assert user == messages[0]
    assert (
        assistant.content
        == f'Well.\n<tool_call>\n{called("weather", "{}")[:-3]}{{"a": 1}}}}\n</tool_call>'
    )
    assert (result.role, result.content) == ("user", "<tool_response>\nrain\n</tool_response>")
    assert explain_tools(messages[:1], []) == messages[:1]


def test_an_own_system_message_comes_first() -> None:
    [system, _] = explain_tools(
        [Message("system", "Be brief."), Message("user", "Hi")], [tool("weather").as_json()]
    )

    assert system.content.startswith("Be brief.\n\n# Tools")


def test_auto_forces_nothing_unless_a_tool_is_strict() -> None:
    assert tool_grammar("hermes", use()) is None
    assert tool_grammar("hermes", use(is_strict=True)) is not None
    assert tool_grammar("hermes", use("required")) is not None
