"""OpenAI response bodies: the JSON of an answer, whole or in chunks of a stream. PURE.

One Answer per request; chat and text completions differ only in where the text goes.

    chat stream         role chunk, text chunks, finish chunk, [usage chunk,] [DONE]
    completion stream              text chunks, finish chunk, [usage chunk,] [DONE]

Invariants: all chunks of a stream carry one id, model and creation time; with
`include_usage` every chunk but the usage chunk has `usage: null`, as OpenAI sends it.

Not here: request bodies and errors (openai_api.py), sending (server.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from roost_engine.openai_api import Endpoint

#: Last event of a complete stream.
DONE: Final = b"data: [DONE]\n\n"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Builds the bodies of one answer."""

    endpoint: Endpoint
    id: str
    model: str
    created: int  # seconds since 1970
    include_usage: bool = False

    def whole(self, text: str, finish_reason: str, usage: Usage) -> bytes:
        """Body of a response that is not streamed."""
        if self.endpoint == "chat":
            message = {"role": "assistant", "content": text, "refusal": None}
            content: dict[str, Any] = {"message": message}
        else:
            content = {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion" if self.endpoint == "chat" else "text_completion"
        return msgspec.json.encode(self._frame(kind, [choice]) | {"usage": usage.as_json()})

    def head_event(self) -> bytes:
        """What a stream starts with: the role chunk of a chat, else nothing."""
        if self.endpoint != "chat":
            return b""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None)

    def text_event(self, text: str) -> bytes:
        """A piece of text; nothing if it is empty."""
        if not text:
            return b""
        if self.endpoint == "chat":
            return self._event({"delta": {"content": text}}, None)
        return self._event({"text": text}, None)

    def finish_event(self, finish_reason: str) -> bytes:
        """The chunk that says why the answer ended."""
        if self.endpoint == "chat":
            return self._event({"delta": {}}, finish_reason)
        return self._event({"text": ""}, finish_reason)

    def usage_event(self, usage: Usage) -> bytes:
        """The chunk with the usage and no choices, if it was asked for."""
        if not self.include_usage:
            return b""
        return sse_event(msgspec.json.encode(self._chunk([]) | {"usage": usage.as_json()}))

    def _event(self, content: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._chunk([choice])
        if self.include_usage:
            chunk["usage"] = None
        return sse_event(msgspec.json.encode(chunk))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.endpoint == "chat" else "text_completion"
        return self._frame(kind, choices)

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


def sse_event(data: bytes) -> bytes:
    """One event of a text/event-stream; `data` is JSON and therefore a single line."""
    return b"data: " + data + b"\n\n"


def model_list(names: list[str], created: int, max_model_len: int) -> bytes:
    """Body of GET /v1/models."""
    data = [model_object(name, created, max_model_len) for name in names]
    return msgspec.json.encode({"object": "list", "data": data})


def model_object(name: str, created: int, max_model_len: int) -> dict[str, Any]:
    """One model as /v1/models shows it; `max_model_len` is vLLM's addition."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "roost",
        "max_model_len": max_model_len,
    }
