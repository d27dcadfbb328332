"""Bodies of POST /tokenize and /detokenize, in vLLM's shapes.

/tokenize takes what either completion endpoint takes as its prompt, so that the count is the one
the endpoint would see:

    {prompt, add_special_tokens = true}                       text completion
    {messages, tools, chat_template_kwargs, add_special_tokens = false}     chat

Not here: the tokens (frontend.py).
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from roost_engine.api_body import check_names, decode_object, invalid, read_part
from roost_engine.chat_api import Chat, ChatFields, read_chat
from roost_engine.sampling_api import TokenId

#: Most tokens of one /detokenize; more than any context.
MAX_DETOKENIZED: Final = 1 << 20


class TokenizeRequest(msgspec.Struct, frozen=True):
    """What is to be encoded, and how it is shown."""

    model: str | None
    prompt: Chat | str
    add_special_tokens: bool
    return_token_strs: bool


class DetokenizeRequest(msgspec.Struct, frozen=True):
    """What is to be decoded."""

    model: str | None
    tokens: list[int]


class _TextFields(msgspec.Struct):
    prompt: Annotated[str, Meta(min_length=1)]


class _Options(msgspec.Struct):
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class _DetokenizeFields(msgspec.Struct):
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DETOKENIZED)]
    model: str | None = None


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Read a body of POST /tokenize. ApiError if it is not valid."""
    fields = decode_object(body)
    if "messages" in fields and "prompt" in fields:
        raise invalid("messages", "'prompt' and 'messages' exclude each other.")
    prompt: Chat | str
    if "messages" in fields:
        check_names(fields, _Options, ChatFields)
        prompt = read_chat(read_part(fields, ChatFields))[0]
    else:
        check_names(fields, _Options, _TextFields)
        prompt = read_part(fields, _TextFields).prompt
    options = read_part(fields, _Options)
    adds = options.add_special_tokens
    return TokenizeRequest(
        options.model,
        prompt,
        isinstance(prompt, str) if adds is None else adds,
        bool(options.return_token_strs),
    )


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Read a body of POST /detokenize. ApiError if it is not valid."""
    fields = decode_object(body)
    check_names(fields, _DetokenizeFields)
    asked = read_part(fields, _DetokenizeFields)
    return DetokenizeRequest(asked.model, asked.tokens)


def tokenize_answer(tokens: list[int], texts: list[str] | None, max_model_len: int) -> bytes:
    """Body of the answer; `texts` only if they were asked for."""
    answer = {
        "count": len(tokens),
        "max_model_len": max_model_len,
        "tokens": tokens,
        "token_strs": texts,
    }
    return msgspec.json.encode(answer)
