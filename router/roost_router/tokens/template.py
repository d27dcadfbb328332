"""Chat templates: messages to text, in Jinja's sandbox. Needs jinja2 (extra `tokens`).

Renders as transformers' `apply_chat_template` does: blocks are trimmed, `raise_exception`,
`strftime_now`, an unescaped `tojson` and the special tokens are there, `{% generation %}` is passed
through. What a template writes is bounded.

The engine has the same in roost_engine/chat.py: the router must not import it, and the contract
they share (roost_wire) is free of libraries. tests/router/test_token_prompts.py holds them alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from roost_router.tokens.prompt_text import NotTokenisedError, Prompt

#: Longest text of a prompt.
_MAX_CHARACTERS: Final = 32 << 20


class Template:
    """A compiled template. jinja2.TemplateError if it does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        self._takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))

    def render(self, prompt: Prompt) -> str:
        """The text of a chat. NotTokenisedError if the template refuses it."""
        if prompt.tools and not self._takes_tools:
            raise NotTokenisedError("the template shows no tools: each engine has its own way")
        given = {"tools": prompt.tools} if prompt.tools else {}
        try:
            pieces = self._template.generate(
                **{**prompt.variables, **self._special_tokens, **given},
                messages=prompt.messages,
                add_generation_prompt=prompt.asks_for_answer,
            )
            return _bounded(pieces)
        except NotTokenisedError:
            raise
        # A template runs arbitrary expressions over what a client sent.
        except Exception as error:
            raise NotTokenisedError(f"the template refuses the messages: {error}") from error


def _bounded(pieces: Iterable[str]) -> str:
    written: list[str] = []
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > _MAX_CHARACTERS:
            raise NotTokenisedError("the template writes too much")
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
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)
