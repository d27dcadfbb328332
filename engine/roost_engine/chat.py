"""Chat messages to prompt text, by the model's own Jinja template.

Renders as transformers' `apply_chat_template(..., add_generation_prompt=True)` does: blocks are
trimmed, `raise_exception`, `strftime_now` and an unescaped `tojson` are there, the special
tokens (`bos_token`, ...) are variables. Templates come with model files, so they run in Jinja's
immutable sandbox. `{% generation %}` blocks, which mark the assistant's words for training, are
passed through.

Not here: flattening content to text (openai_api.py); turning the text into token ids
(tokenizer.py; the template has written BOS already, so encode without adding special tokens).
A text in a message that spells a special token
becomes that token, as in every engine that renders and then encodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_NO_TOKENS: Mapping[str, str] = MappingProxyType({})


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
        try:
            self._template = None if source is None else _environment().from_string(source)
        # Mostly TemplateError, but Jinja compiles to Python, which has limits of its own
        # (SyntaxError for blocks nested too deep, RecursionError).
        except Exception as error:
            raise ChatTemplateError(f"the model's chat template is broken: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Prompt text for `messages`, ending where the assistant's answer begins.

        A message has `role` and `content`, both text. ChatTemplateError for what the template
        does not take.
        """
        if self._template is None:
            raise ChatTemplateError(
                "this model has no chat template; use /v1/completions with a prompt"
            )
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        # A template runs arbitrary expressions over the client's messages: whatever they raise
        # (TypeError, SecurityError, ...) is about these messages.
        except Exception as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error


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
