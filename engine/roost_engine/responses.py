"""OpenAI response bodies: the JSON of an answer, whole or in chunks of a stream. PURE.

One Answer per request; chat and text completions differ only in where the text goes.

    chat stream         role chunks, content and tool call chunks, finish chunks, [usage,] [DONE]
    completion stream                text chunks, finish chunks, [usage,] [DONE]

With several choices their chunks come as they are made, each with its `index`. The finish chunk
has no content, unless something is shown only because the answer has ended (transcript.py).

Invariants: all chunks of a stream carry one id, model and creation time; with `include_usage`
every chunk but the usage chunk has `usage: null`, as OpenAI sends it, or with
`continuous_usage` the tokens so far, as vLLM does.

Not here: request bodies and errors (openai_api.py), sending (server.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from roost_engine.logprobs_json import ShownToken, chat_logprobs, completion_logprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.openai_api import Endpoint
    from roost_engine.tool_parser import ToolDelta

#: Last event of a complete stream.
DONE: Final = b"data: [DONE]\n\n"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, over all choices; a prompt counts once, however many answers it has."""

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


class Piece(msgspec.Struct, frozen=True):
    """What may be shown next of one choice, possibly nothing."""

    text: str = ""
    tool_deltas: Sequence[ToolDelta] = ()
    tokens: Sequence[ShownToken] = ()  # if log probabilities were asked for
    finish_reason: str | None = None  # in OpenAI's words, on the last piece
    stop_reason: str | int | None = None  # stop string or stop token that ended it

    @property
    def shows_anything(self) -> bool:
        """Whether a client sees anything of it, its end aside."""
        return bool(self.text or self.tool_deltas or self.tokens)


class Choice:
    """All pieces of one choice, put together."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[ShownToken] = []
        self.calls: list[list[str]] = []  # name, arguments
        self.last = Piece()

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.last = piece
        for delta in piece.tool_deltas:
            if delta.name is not None:
                self.calls.append([delta.name, ""])
            self.calls[-1][1] += delta.arguments


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Builds the bodies of one answer."""

    endpoint: Endpoint
    id: str
    model: str
    created: int  # seconds since 1970
    call_id: str = ""  # what ids of tool calls begin with; unique to the answer
    num_choices: int = 1
    include_usage: bool = False
    continuous_usage: bool = False

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """Body of a response that is not streamed."""
        shown = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        kind = "chat.completion" if self.endpoint == "chat" else "text_completion"
        return msgspec.json.encode(self._frame(kind, shown) | {"usage": usage.as_json()})

    def head_event(self, usage: Usage) -> bytes:
        """What a stream starts with: the role chunks of a chat, else nothing."""
        if self.endpoint != "chat":
            return b""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return b"".join(self._event(index, delta, usage) for index in range(self.num_choices))

    def piece_event(self, index: int, piece: Piece, usage: Usage) -> bytes:
        """The chunk of a piece; nothing if it shows nothing and is not the last.

        Whatever the last piece shows stands in the finish chunk: a client has both or neither.
        """
        end: dict[str, Any] | None = None
        if piece.finish_reason is not None:
            end = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        elif not piece.shows_anything:
            return b""
        if self.endpoint == "completion":
            return self._event(index, {"text": piece.text}, usage, tokens=piece.tokens, end=end)
        delta: dict[str, Any] = {}
        if piece.text or (piece.tokens and not piece.tool_deltas):
            delta["content"] = piece.text
        if piece.tool_deltas:
            delta["tool_calls"] = [self._tool_delta(index, each) for each in piece.tool_deltas]
        return self._event(index, {"delta": delta}, usage, tokens=piece.tokens, end=end)

    def usage_event(self, usage: Usage) -> bytes:
        """The chunk with the usage and no choices, if it was asked for."""
        if not self.include_usage:
            return b""
        return sse_event(msgspec.json.encode(self._chunk([]) | {"usage": usage.as_json()}))

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        content: dict[str, Any] = {"text": choice.text}
        if self.endpoint == "chat":
            calls = [
                {
                    "id": self._call_id(index, place),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for place, (name, arguments) in enumerate(choice.calls)
            ]
            text = choice.text or (None if calls else "")
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message | ({"tool_calls": calls} if calls else {})}
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.last.finish_reason,
            "stop_reason": choice.last.stop_reason,
        }

    def _tool_delta(self, index: int, delta: ToolDelta) -> dict[str, Any]:
        if delta.name is None:
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        return {
            "index": delta.index,
            "id": self._call_id(index, delta.index),
            "type": "function",
            "function": {"name": delta.name, "arguments": delta.arguments},
        }

    def _call_id(self, index: int, place: int) -> str:
        return f"call_{self.call_id}{index:02x}{place:02x}"

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        if not tokens:
            return None
        return chat_logprobs(tokens) if self.endpoint == "chat" else completion_logprobs(tokens)

    def _event(
        self,
        index: int,
        content: dict[str, Any],
        usage: Usage,
        *,
        tokens: Sequence[ShownToken] = (),
        end: dict[str, Any] | None = None,
    ) -> bytes:
        logprobs = self._logprobs(tokens)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": None}
        chunk = self._chunk([choice | (end or {})])
        if self.include_usage:
            chunk["usage"] = usage.as_json() if self.continuous_usage else None
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
