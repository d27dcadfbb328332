"""Chat messages to prompt text, by the model's own Jinja template.

Renders as transformers' `apply_chat_template(..., add_generation_prompt=True)` does: blocks are
trimmed, `raise_exception`, `strftime_now` and an unescaped `tojson` are there, the special
tokens (`bos_token`, ...) are variables. Templates come with model files, so they run in Jinja's
immutable sandbox.

Not here: turning the text into token ids (tokenizer.py; the template has written BOS already,
so encode without adding special tokens). A text in a message that spells a special token
becomes that token, as in every engine that renders and then encodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_NO_TOKENS: Mapping[str, str] = MappingProxyType({})


class ChatTemplateError(ValueError):
    """The messages cannot be rendered: the client's fault, status 400, not to be retried."""


class ChatTemplate:
    """A compiled template; `source` None is a model without one, which refuses every chat.

    Compiling happens once, here; a template that does not compile raises ChatTemplateError at
    start-up. Rendering does not change the object, so threads may share it.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] = _NO_TOKENS) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is broken: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Prompt text for `messages`, ending where the assistant's answer begins.

        A message has `role` and `content`: a string, or a list of {"type": "text", "text": ...}
        parts, which are joined with newlines. Other keys (name, tool calls) reach the template
        unchanged. Raises ChatTemplateError for anything the template or we cannot use.
        """
        if self._template is None:
            raise ChatTemplateError(
                "this model has no chat template; use /v1/completions with a prompt"
            )
        if not messages:
            raise ChatTemplateError("messages must not be empty")
        flat = [_flatten(message, idx) for idx, message in enumerate(messages)]
        try:
            return self._template.render(
                messages=flat, add_generation_prompt=True, **self._special_tokens
            )
        # A template runs arbitrary expressions over the client's messages: whatever they raise
        # (TypeError on a missing content, SecurityError, ...) is about these messages.
        except Exception as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error


def _flatten(message: Mapping[str, Any], idx: int) -> dict[str, Any]:
    """A copy with content as one string (or None, as in a message that only calls tools)."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"messages[{idx}] must be an object with a role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, list):
        raise ChatTemplateError(f"messages[{idx}].content must be a string or a list of parts")
    return dict(message) | {"content": "\n".join(_text_of(part, idx) for part in content)}


def _text_of(part: object, idx: int) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise ChatTemplateError(f"messages[{idx}]: {kind!r} content is not supported")
    raise ChatTemplateError(f"messages[{idx}]: a text part needs a string `text`")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
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
