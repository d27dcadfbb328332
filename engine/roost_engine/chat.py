"""Chat messages to prompt text, by the model's own Jinja template.

Renders as transformers' `apply_chat_template(..., add_generation_prompt=True)` does: blocks are
trimmed, `raise_exception`, `strftime_now` and an unescaped `tojson` are there, the special
tokens (`bos_token`, ...) are variables. Templates come with model files, so they run in Jinja's
immutable sandbox, and what they write is bounded. `{% generation %}` blocks, which mark the
assistant's words for training, are passed through.

A text in a message that spells a special token becomes that token, as in every engine that
renders and then encodes.

Not here: flattening content to text (chat_api.py); turning the text into token ids
(tokenizer.py; the template has written BOS already, so encode without adding special tokens).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from roost_engine.tool_calls import ToolFormat, tool_format

#: Longest text of a prompt; the longest body the server takes has as many bytes. Jinja's sandbox
#: bounds each loop, not what nested loops write.
MAX_PROMPT_CHARACTERS: Final = 32 * 1024 * 1024

_NO_TOKENS: Mapping[str, str] = MappingProxyType({})
_NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
# What `render` gives a template; a client's variables must not replace it.
_RESERVED: Final = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplateError(ValueError):
    """A template that does not compile (the model's fault), or messages that it cannot render.

    The latter is the client's fault: status 400, not to be retried.
    """


class ChatTemplate:
    """A compiled template; `source` None is a model without one, which refuses every chat.

    Compiling happens once, here: a template that does not compile raises ChatTemplateError when
    the model is loaded. Rendering does not change the object, so threads may share it.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] = _NO_TOKENS) -> None:
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            self._template = None if source is None else environment.from_string(source)
            variables = meta.find_undeclared_variables(environment.parse(source or ""))
        # Mostly TemplateError, but Jinja compiles to Python, which has limits of its own
        # (SyntaxError for blocks nested too deep, RecursionError).
        except Exception as error:
            raise ChatTemplateError(f"the model's chat template is broken: {error}") from error
        #: Whether the template shows tools and their results to the model.
        self.takes_tools = "tools" in variables
        #: How a model with this template writes tool calls.
        self.tool_format: ToolFormat = tool_format(source or "") if self.takes_tools else "hermes"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = _NO_VARIABLES,
    ) -> str:
        """Prompt text for `messages`, ending where the assistant's answer begins.

        A message has `role` and `content`, both text, maybe `tool_calls`, `tool_call_id` and
        `name`. `variables` are further ones of this template, such as `enable_thinking`.
        ChatTemplateError for what the template does not take, or writes too much about.
        """
        if self._template is None:
            raise ChatTemplateError(
                "this model has no chat template; use /v1/completions with a prompt"
            )
        taken = variables.keys() & (_RESERVED | self._special_tokens.keys())
        if taken:
            raise ChatTemplateError(f"the template variable {min(taken)!r} cannot be set")
        given = {"tools": list(tools)} if tools else {}
        try:
            pieces = self._template.generate(
                **variables,
                messages=messages,
                add_generation_prompt=True,
                **given,
                **self._special_tokens,
            )
            return _bounded(pieces)
        except ChatTemplateError:
            raise
        # A template runs arbitrary expressions over the client's messages: whatever they raise
        # (TypeError, SecurityError, ...) is about these messages.
        except Exception as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error


def _bounded(pieces: Iterable[str]) -> str:
    written: list[str] = []
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > MAX_PROMPT_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template wrote more than {MAX_PROMPT_CHARACTERS} characters"
            )
        written.append(piece)
    return "".join(written)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` is its body, with variables of its own."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Called by Jinja at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML, which a model has not been trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    """Local time, as templates that print today's date expect."""
    return datetime.now().astimezone().strftime(layout)
