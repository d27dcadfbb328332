"""Request bodies, as far as the router reads them. Pure.

Each `decode_` raises msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError or
RecursionError. Interpreted where the rest is compiled (decisions/0016), as answer/chunk.py is.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct):
    """One message of a chat."""

    role: str = ""
    content: Any = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")


class Chat(msgspec.Struct):
    """A body of /v1/chat/completions."""

    model: str
    messages: list[Message]
    stream: bool | None = None
    tools: msgspec.Raw = msgspec.Raw(b"")
    cache_salt: str | None = None


class Completion(msgspec.Struct):
    """A body of /v1/completions."""

    model: str
    prompt: Any = ""
    stream: bool | None = None
    cache_salt: str | None = None


class Embedding(msgspec.Struct):
    """A body of /v1/embeddings."""

    model: str
    input: Any
    cache_salt: str | None = None


class Kind(msgspec.Struct):
    """Fields that tell for which path a body is."""

    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")


decode_kind = msgspec.json.Decoder(Kind).decode
decode_embedding = msgspec.json.Decoder(Embedding).decode
decode_chat = msgspec.json.Decoder(Chat).decode
decode_completion = msgspec.json.Decoder(Completion).decode
