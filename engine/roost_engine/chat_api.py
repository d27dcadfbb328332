"""Messages and tools of a chat body, read to what a chat template takes.

Content parts are joined to text. Arguments of earlier tool calls come as JSON text, as OpenAI
has it, and leave as objects, as templates want them. Tools are checked as far as names go; their
parameter schemas are checked when a grammar is made of them.

`tool_choice` "none" leaves the tools out of the prompt: a model that does not see them does not
call them, which no instruction could promise.

Not here: the text of a prompt (chat.py), formats of tool calls (tool_calls.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from roost_engine.api_body import invalid, missing

#: OpenAI's limit.
MAX_TOOLS = 128

_Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a chat, its content flattened to text."""

    role: str
    content: str
    name: str | None = None  # of the function whose result a tool message is
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None  # arguments are objects


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None  # JSON schema; None: any object
    is_strict: bool

    def as_json(self) -> dict[str, Any]:
        """What templates show."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}


class ToolUse(msgspec.Struct, frozen=True):
    """Tools of a request; at least one."""

    tools: list[Tool]  # those that may be called now
    choice: Literal["auto", "required", "named"]
    is_parallel: bool  # several calls in one answer


class Chat(msgspec.Struct, frozen=True):
    """A prompt that the model's chat template renders."""

    messages: list[Message]
    tools: list[dict[str, Any]] = []
    template_variables: dict[str, Any] = {}


# -- shapes on the wire -------------------------------------------------------------------


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    type: Literal["function"]
    function: _CalledFunction
    index: int | None = None  # left over from a stream's deltas


class _MessageFields(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    name: str | None = None  # of a person: no template here shows it
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None  # echoed back by SDKs from earlier answers; ignored


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _ToolFields(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Function


class _FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _NamedChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _FunctionName


class ChatFields(msgspec.Struct):
    """As they stand in a body."""

    messages: Annotated[list[_MessageFields], Meta(min_length=1)]
    tools: Annotated[list[_ToolFields], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# -- reading ------------------------------------------------------------------------------


def read_chat(fields: ChatFields) -> tuple[Chat, ToolUse | None]:
    """The prompt, and the tools that may be called; ApiError if they are not valid."""
    messages = [_read_message(message, index) for index, message in enumerate(fields.messages)]
    tools = _read_tools(fields.tools or [])
    use = _read_tool_use(fields, tools)
    shown = [tool.as_json() for tool in tools] if use is not None else []
    return Chat(messages, shown, fields.chat_template_kwargs or {}), use


def _read_message(message: _MessageFields, index: int) -> Message:
    param = f"messages[{index}]"
    if message.content is None and message.role != "assistant":
        raise missing(f"{param}.content")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{param}.tool_calls", "Only an assistant's message has 'tool_calls'.")
    if (message.tool_call_id is not None) != (message.role == "tool"):
        if message.role == "tool":
            raise missing(f"{param}.tool_call_id")
        raise invalid(f"{param}.tool_call_id", "Only a tool's message has a 'tool_call_id'.")
    if isinstance(message.content, list):
        content = "\n".join(part.text for part in message.content)
    else:
        content = message.content or ""
    calls = [
        _read_tool_call(call, f"{param}.tool_calls[{place}]")
        for place, call in enumerate(message.tool_calls or [])
    ]
    return Message(
        role="system" if message.role == "developer" else message.role,
        content=content,
        name=message.name if message.role == "tool" else None,
        tool_call_id=message.tool_call_id,
        tool_calls=calls or None,
    )


def _read_tool_call(call: _ToolCall, param: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        at = f"{param}.function.arguments"
        raise invalid(at, f"{at!r} is not a JSON object: {error}.") from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _read_tools(given: list[_ToolFields]) -> list[Tool]:
    tools: dict[str, Tool] = {}
    for index, tool in enumerate(given):
        function = tool.function
        if function.name in tools:
            raise invalid(
                f"tools[{index}].function.name", f"Two tools are named {function.name!r}."
            )
        tools[function.name] = Tool(
            function.name, function.description, function.parameters, bool(function.strict)
        )
    return list(tools.values())


def _read_tool_use(fields: ChatFields, tools: list[Tool]) -> ToolUse | None:
    choice = fields.tool_choice
    is_parallel = fields.parallel_tool_calls is not False
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if not tools:
        raise invalid("tool_choice", "'tool_choice' needs 'tools' to choose from.")
    if isinstance(choice, _NamedChoice):
        name = choice.function.name
        named = [tool for tool in tools if tool.name == name]
        if not named:
            raise invalid("tool_choice", f"'tool_choice' names {name!r}, which is not in 'tools'.")
        return ToolUse(named, "named", is_parallel=False)
    return ToolUse(tools, "required" if choice == "required" else "auto", is_parallel)
