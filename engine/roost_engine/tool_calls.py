"""Tool calls in a model's own words: how they are asked for, and how they are forced.

Two formats, told apart by the model's chat template:

    hermes   <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>     Hermes, Qwen
             text may come before; several calls follow each other
    llama3   {"name": "f", "parameters": {...}}                               Llama 3
             the whole answer, maybe after <|python_tag|>; several are separated by ";"

A template that knows no tools gets them as Qwen's system message has them, and calls in the
Hermes format: clients send `tools` with "auto" to whatever model they have, and a model that was
shown functions and a format mostly keeps to it. Refusing would be no help to them.

"required" and a named function are forced by a grammar made of the tools' own schemas, so
that the first token is the beginning of a call and arguments always fit. With "auto" nothing is
forced, unless a tool is `strict`: then text is free, but a call that begins must be right.

Not here: finding calls in what a model writes (tool_parser.py), bodies (chat_api.py,
responses.py), masks (grammar.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from struct import pack
from typing import Any, Final, Literal

from xxhash import xxh3_128_hexdigest

from roost_engine.chat_api import Message, Tool, ToolUse
from roost_engine.structured_api import JSON_WHITESPACE, GrammarSpec

ToolFormat = Literal["hermes", "llama3"]

#: Most calls a grammar allows in one answer; a small model might repeat itself up to max_tokens.
MAX_PARALLEL_CALLS: Final = 16

#: Around a call in the Hermes format; before the calls in Llama's.
OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
PYTHON_TAG: Final = "<|python_tag|>"

# From Qwen2.5's chat template.
_SYSTEM_PROMPT: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def tool_format(template: str) -> ToolFormat:
    """The format that a model was trained on, by its chat template."""
    is_llama = OPEN not in template and (PYTHON_TAG in template or "ipython" in template)
    return "llama3" if is_llama else "hermes"


def call_id(prompt_ids: Sequence[int], seed: int) -> str:
    """What ids of an answer's calls begin with: 20 hexadecimal digits.

    A function of what decides the answer, so that whoever continues it elsewhere goes on with the
    same ids, and the next turn, whose prompt differs, has others.
    """
    described = pack(f"<{len(prompt_ids)}Iq", *prompt_ids, seed)
    return xxh3_128_hexdigest(described)[:20]


# -- prompts ------------------------------------------------------------------------------


def explain_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Messages for a template that knows no tools: tools, calls and results as plain text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    explained = _SYSTEM_PROMPT.format(tools=listed)
    if plain[0].role == "system":
        return [Message("system", f"{plain[0].content}\n\n{explained}"), *plain[1:]]
    return [Message("system", explained), *plain]


def _plain(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = [
        f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
        for call in message.tool_calls
    ]
    return Message(message.role, "\n".join([message.content, *calls] if message.content else calls))


# -- grammars -----------------------------------------------------------------------------


def tool_grammar(style: ToolFormat, use: ToolUse) -> GrammarSpec | None:
    """What an answer may look like; None: anything."""
    is_forced = use.choice != "auto"
    if not is_forced and not any(tool.is_strict for tool in use.tools):
        return None
    options = " | ".join(f"call_{index}" for index in range(len(use.tools)))
    calls = [_call_rule(style, tool, index) for index, tool in enumerate(use.tools)]
    more = f"{{0,{MAX_PARALLEL_CALLS - 1}}}"
    if style == "llama3":
        calls_rule = f'calls: call ("; " call){more}' if use.is_parallel else "calls: call"
        rules = [calls_rule, f"call: {options}"]
        free = "start: calls | TEXT\nTEXT: /[^{<](.|\\n)*/"
        start = "start: calls" if is_forced else free
    elif is_forced:
        start = f'start: call ("\\n" call){more}' if use.is_parallel else "start: call"
        rules = [f'call: "{OPEN}\\n" ({options}) "\\n{CLOSE}"']
    else:
        # Any number of calls: after the last one allowed, text could pretend to be another. Who
        # wants one only stops reading after it.
        start = "start: call* TEXT"
        rules = [
            f'begin[lazy]: TEXT "{OPEN}"',
            f'call: begin "\\n" ({options}) "\\n{CLOSE}"',
            "TEXT: /(.|\\n)*/",
        ]
    text = "\n".join([start, *rules, *calls])
    return GrammarSpec("lark", text, "tools")


def _call_rule(style: ToolFormat, tool: Tool, index: int) -> str:
    key = "parameters" if style == "llama3" else "arguments"
    head = json.dumps(f'{{"name": "{tool.name}", "{key}": ')
    return f'call_{index}: {head} %json {json.dumps(_arguments_schema(tool))} "}}"'


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """The tool's schema. Keywords that cannot be enforced count only if the tool is strict."""
    schema = tool.parameters or {}
    if schema.get("type", "object") != "object":
        schema = {}
    guidance = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not tool.is_strict}
    return {"type": "object", **schema, "x-guidance": guidance}
