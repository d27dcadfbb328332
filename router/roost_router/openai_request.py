"""Read from a request's body what routing needs, and nothing else. Pure.

The body itself is forwarded byte for byte; whatever is not looked at here is the replica's to
judge. The *canonical prompt* is the bytes that the text chain hashes: what decides the prompt's
tokens, in the order in which a chat template lays it out, so that a conversation's next turn
extends the bytes of the turn before.

    chat         "chat" model salt tools, then for each message: role, content, tool calls
    completions  "text" model salt, then the text, or the token ids as u32; of several prompts all,
                 one after the other: the first decides the place, their sum the work
    embeddings   "embed" model salt, then the inputs likewise; nothing of them stays in a cache that
                 another request could use, but their work counts
"""

from __future__ import annotations

import re
from struct import error as StructError
from struct import pack
from typing import Any, Final

import msgspec
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from roost_router.errors import BadRequestError
from roost_router.index.text_chain import text_chain
from roost_router.openai_body import (
    Chat,
    decode_chat,
    decode_completion,
    decode_embedding,
    decode_kind,
)

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
EMBEDDINGS_PATH = "/v1/embeddings"

_PARAM = re.compile(r"at `\$\.([^`]+)`|required field `([^`]+)`$")
_FIELD = b"\x1f"  # ends a field, and
_RECORD = b"\x1e"  # a message: neither occurs in text that a template would render


class RoutingFields:
    """What placement is decided on, each time that a request is looked at."""

    def __init__(self, model: str, *, stream: bool, prompt: bytes) -> None:
        self.model: Final = model
        self.stream: Final = stream
        self.prompt: Final = prompt  # canonical prompt
        self.chain: Final = text_chain(prompt)  # of its blocks
        #: Of its first block, or of all of a shorter one: 64 bits.
        self.prompt_key: Final = self.chain[0] if self.chain else xxh3_64_intdigest(prompt)
        #: Tokens of the prompt, once it was tokenised here (tokens/).
        self.counted_tokens: int | None = None


def read_routing_fields(path: str, body: bytes) -> RoutingFields:
    """Decode `body` of a request to `path`, one of the three above. O(bytes).

    Raises BadRequestError, with `param` where one field is at fault.
    """
    try:
        if path == CHAT_PATH:
            chat = decode_chat(body)
            return RoutingFields(chat.model, stream=bool(chat.stream), prompt=_chat_prompt(chat))
        if path == EMBEDDINGS_PATH:
            embedding = decode_embedding(body)
            head = _head(b"embed", embedding.model, embedding.cache_salt)
            return RoutingFields(
                embedding.model, stream=False, prompt=head + _prompts(embedding.input)
            )
        completion = decode_completion(body)
        prompt = _head(b"text", completion.model, completion.cache_salt)
        prompt += _prompts(completion.prompt)
        return RoutingFields(completion.model, stream=bool(completion.stream), prompt=prompt)
    except msgspec.ValidationError as error:
        raise BadRequestError(str(error), param=_param(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise BadRequestError("the body is nested too deeply", code="invalid_json") from None


def guess_path(body: bytes) -> str:
    """Which of the paths above `body` is for, by the fields that it has. BadRequestError."""
    try:
        found = decode_kind(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    for path, field in ((CHAT_PATH, found.messages), (EMBEDDINGS_PATH, found.input)):
        if field:
            return path
    return COMPLETIONS_PATH


def _chat_prompt(chat: Chat) -> bytes:
    if len(chat.messages) == 1 and not chat.tools:
        message = chat.messages[0]
        content, salt = message.content, chat.cache_salt or ""
        if isinstance(content, str) and not (
            message.name or message.tool_call_id or message.tool_calls
        ):  # the usual first turn, encoded at once
            start = f"chat\x1f{chat.model}\x1f{salt}\x1f\x1e{message.role}\x1f"
            return f"{start}{content}\x1f\x1e".encode()
    parts = [_head(b"chat", chat.model, chat.cache_salt), bytes(chat.tools), _RECORD]
    for message in chat.messages:
        parts += (message.role.encode(), _FIELD, _content(message.content), _FIELD)
        if message.name or message.tool_call_id or message.tool_calls:
            named = f"{message.name or ''}\x1f{message.tool_call_id or ''}\x1f"
            parts += (named.encode(), bytes(message.tool_calls))
        parts.append(_RECORD)
    return b"".join(parts)


def _content(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, list):  # typed parts: engines join their texts with newlines
        return b"\n".join(
            part["text"].encode()
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else _digest(part)
            for part in content
        )
    return b"" if content is None else msgspec.json.encode(content)


def _digest(part: Any) -> bytes:
    """A part that is not text, say an image: its bytes say nothing about its tokens."""
    return xxh3_128_hexdigest(msgspec.json.encode(part)).encode()


def _prompts(prompt: Any) -> bytes:
    """One prompt, or several, one after the other."""
    has_several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return _RECORD.join([_prompt_bytes(one) for one in (prompt if has_several else [prompt])])


def _prompt_bytes(prompt: Any) -> bytes:
    """One prompt: its text, or its token ids."""
    if isinstance(prompt, str):
        return prompt.encode()
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        try:
            return pack(f"<{len(prompt)}I", *prompt)
        except StructError:
            raise BadRequestError(
                "token ids must be integers from 0 to 4294967295", param="prompt"
            ) from None
    return msgspec.json.encode(prompt)


def _head(kind: bytes, model: str, salt: str | None) -> bytes:
    return b"\x1f".join((kind, model.encode(), (salt or "").encode(), b""))


def _param(message: str) -> str | None:
    """`model` out of msgspec's "... - at `$.model`" or "... required field `model`"."""
    found = _PARAM.search(message)
    return found[1] or found[2] if found else None
