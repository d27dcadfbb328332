r"""Prompt text: from a body to the text that is encoded, and back to its text blocks. Pure.

The text chain is over the canonical prompt (openai_request.py), tokens are of the rendered one:

    canonical   chat \x1f model \x1f salt \x1f tools \x1e user \x1f What is the ... \x1f \x1e
    rendered    <|im_start|>system\n...<|im_end|>\n<|im_start|>user\nWhat is the ...<|im_end|>\n

Both have the contents of the messages in the same order. `align` finds them in both, and says for
each text block how many characters of the rendered text follow from what comes before its end. A
content that is found too early in the rendered text makes that less, never more; one that is not
found (some templates leave out what a model thought) ends the alignment: what lies behind is not
bound.

A template may let later messages change how earlier ones are rendered. Then prompts that begin
alike bind different tokens to the same text, and the later one wins; what is bound may be wrong
for others until they are tokenised themselves. Replicas' own counts tell (drift.py), and
`cached_tokens` corrects, as they do for all beliefs.

Not here: templates (template.py), tokens (segments.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import msgspec

from roost_router.index.text_chain import chain_bytes, num_whole_blocks
from roost_router.openai_request import CHAT_PATH, COMPLETIONS_PATH
from roost_router.tokens.segments import Boundary


class NotTokenisedError(ValueError):
    """A request whose prompt has no tokens that could be known here; the message says why."""


class Prompt(msgspec.Struct):
    """What is to be rendered and encoded. One of the first three is given."""

    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}
    asks_for_answer: bool = True  # the text ends where the assistant's turn begins
    adds_special_tokens: bool = False  # a token for the beginning, where the tokenizer has one
    cache_salt: str | None = None


class _Body(msgspec.Struct):
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    cache_salt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None


_decode = msgspec.json.Decoder(_Body).decode


def read_prompt(path: str, body: bytes) -> Prompt:
    """The prompt of a body that was routed. NotTokenisedError for what only a replica can tell."""
    try:
        fields = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotTokenisedError(f"the body cannot be read: {error}") from None
    if path == CHAT_PATH:
        if fields.chat_template is not None or fields.continue_final_message:
            raise NotTokenisedError("the request has a template of its own, or continues an answer")
        return Prompt(
            messages=[_message(message) for message in fields.messages or []],
            tools=fields.tools or None,
            variables=fields.chat_template_kwargs or {},
            asks_for_answer=fields.add_generation_prompt,
            adds_special_tokens=fields.add_special_tokens is True,
            cache_salt=fields.cache_salt,
        )
    if path != COMPLETIONS_PATH:
        raise NotTokenisedError("only chats and completions stay in a cache")
    salt = fields.cache_salt
    if isinstance(fields.prompt, str):
        adds = fields.add_special_tokens is not False
        return Prompt(text=fields.prompt, adds_special_tokens=adds, cache_salt=salt)
    if isinstance(fields.prompt, list) and all(type(token) is int for token in fields.prompt):
        return Prompt(token_ids=fields.prompt, cache_salt=salt)
    raise NotTokenisedError("several prompts in one request")


def align(canonical: bytes, prompt: Prompt, rendered: str) -> list[int]:
    """For each text block, how many characters of `rendered` follow from the bytes up to its end.

    O(bytes). `canonical`: as read_routing_fields makes it of the same body.
    """
    if prompt.text is not None:
        encoded = prompt.text.encode()
        anchors = [(len(canonical) - len(encoded), encoded, 0, len(prompt.text))]
    else:
        anchors = _find_contents(canonical, prompt.messages or [], rendered)
    known: list[int] = []
    number = -1
    for place in range(num_whole_blocks(len(canonical))):
        end = chain_bytes(place + 1)
        while number + 1 < len(anchors) and anchors[number + 1][0] <= end:
            number += 1
        if number < 0:
            known.append(0)
            continue
        start, content, at, length = anchors[number]
        shown = content[: end - start]
        whole = len(shown) == len(content)
        known.append(at + (length if whole else len(shown.decode(errors="ignore"))))
    return known


def certain_tokens(known: Sequence[int], boundaries: Sequence[Boundary]) -> list[int]:
    """For each text block, how many tokens are certain by its end. O(blocks * log)."""
    shown_at = [boundary.known_at for boundary in boundaries]
    counts = [0, *(boundary.num_tokens for boundary in boundaries)]
    return [counts[bisect_right(shown_at, characters)] for characters in known]


def certain_given_tokens(canonical: bytes, num_tokens: int) -> list[int]:
    """The same for a prompt that came as token ids, four bytes each."""
    start = len(canonical) - 4 * num_tokens
    blocks = range(num_whole_blocks(len(canonical)))
    return [max(0, chain_bytes(place + 1) - start) // 4 for place in blocks]


def _find_contents(
    canonical: bytes, messages: Sequence[dict[str, Any]], rendered: str
) -> list[tuple[int, bytes, int, int]]:
    """(place in `canonical`, bytes, place in `rendered`, characters) of contents, in order."""
    anchors: list[tuple[int, bytes, int, int]] = []
    at_bytes = max(0, canonical.find(b"\x1e"))  # before it: model, salt, tools
    at_characters = 0
    for message in messages:
        content: str = message["content"]
        shown = content.strip()  # templates often trim
        if not shown:
            continue
        encoded = content.encode()
        start = canonical.find(b"\x1f" + encoded + b"\x1f", at_bytes)
        place = rendered.find(shown, at_characters)
        if start < 0 or place < 0:
            break
        at_bytes, at_characters = start + 1 + len(encoded), place + len(shown)
        blank = len(content) - len(content.lstrip())
        shown_bytes = shown.encode()
        anchors.append((start + 1 + len(content[:blank].encode()), shown_bytes, place, len(shown)))
    return anchors


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates take it: content as text, arguments of calls as objects."""
    shown = {**message, "content": _content(message.get("content"))}
    if not isinstance(message.get("role"), str):
        raise NotTokenisedError("a message without a role")
    if shown.get("tool_calls"):
        shown["tool_calls"] = [_tool_call(call) for call in shown["tool_calls"]]
    return shown


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    raise NotTokenisedError("a message is more than text")


def _tool_call(call: Any) -> dict[str, Any]:
    try:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            function["arguments"] = msgspec.json.decode(function["arguments"] or "{}")
    except (TypeError, KeyError, ValueError, RecursionError):
        raise NotTokenisedError("a tool call that cannot be read") from None
    return {**call, "function": function}
